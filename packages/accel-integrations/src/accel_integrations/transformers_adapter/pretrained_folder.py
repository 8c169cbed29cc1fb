"""Write a folder for `from_pretrained` that is complete or absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accel_core import CheckpointError, ConfigurationError
from accel_core.extending import files, with_full_stop

_ENDINGS = frozenset([".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".md"])
"""Endings of the files of a saved model and its tokenizer."""
_CONFIGS = ("config.json", "adapter_config.json")
"""Files of which a saved model has at least one."""


def write_pretrained_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and give it the name `folder`.

    A model that was saved there before is replaced at the end.

    Raises:
        ConfigurationError: something else than a saved model is there.
        CheckpointError: the disk refused it; what was there before is untouched.
    """
    folder = folder.absolute()
    staging = folder.with_name(folder.name + ".incomplete")
    replaced = folder.with_name(folder.name + ".replaced")
    # Before anything is written: the last two may be there after a crash.
    for path in (folder, staging, replaced):
        _check_is_own(path)
    try:
        if staging.exists():
            files.remove_folder(staging)
        files.make_folder(staging)
        write(staging)
        # On the disk before the name is given, else a power cut could leave a complete name with empty files.
        for path in [*staging.iterdir(), staging]:
            files.sync(path)
        # Without `folder` a crash came between the two renames, and the replaced model is the only one.
        if replaced.exists() and folder.exists():
            files.remove_folder(replaced)
        _replace(folder, staging, replaced)
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' could not be written: {with_full_stop(error)} What was there is untouched. Choose "
            "another folder, or let this process write there."
        ) from error


def _replace(folder: Path, staging: Path, replaced: Path) -> None:
    # A folder that is not empty cannot be replaced by one rename.
    if folder.exists():
        files.rename(folder, replaced)
    try:
        files.rename(staging, folder)
    except OSError:
        files.rename(replaced, folder)
        raise
    if replaced.exists():
        files.remove_folder(replaced)


def _check_is_own(path: Path) -> None:
    """Raise if `path` is something that must not be removed."""
    if not path.exists():
        return
    # An interrupted write may have left no configuration yet, but its folder has our own ending.
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    is_model = path.is_dir() and all(
        (path / name).is_file() and Path(name).suffix in _ENDINGS for name in names
    )
    if names and not (is_model and (path.suffix == ".incomplete" or names.intersection(_CONFIGS))):
        raise ConfigurationError(
            f"'{path}' is in the way: it holds something else than a saved model, so it is not replaced. "
            "Choose an empty or a new folder."
        )
