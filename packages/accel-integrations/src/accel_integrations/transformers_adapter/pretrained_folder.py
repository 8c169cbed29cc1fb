"""A folder for `from_pretrained`, written so that it is there as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accel_core import CheckpointError, ConfigurationError
from accel_core.extending import files

_ENDINGS = frozenset([".json", ".safetensors", ".bin", ".txt", ".model", ".jinja", ".md"])
_CONFIGS = ("config.json", "adapter_config.json")


def write_pretrained_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and give it the name `folder`.

    A model that was saved there before gives way at the end.

    Raises:
        ConfigurationError: something else than a saved model is there.
        CheckpointError: the disk refused it; what was there before is untouched.
    """
    folder = folder.absolute()
    aside, replaced = (folder.with_name(folder.name + ending) for ending in (".incomplete", ".replaced"))
    for path in (folder, aside, replaced):
        _check_is_own(path)
    try:
        if aside.exists():
            files.remove_folder(aside)
        files.make_folder(aside)
        write(aside)
        for path in [*aside.iterdir(), aside]:
            files.sync(path)
        if replaced.exists() and folder.exists():
            files.remove_folder(replaced)
        _replace(folder, aside, replaced)
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' could not be written; what was there is untouched: {error}"
        ) from error


def _replace(folder: Path, aside: Path, replaced: Path) -> None:
    if folder.exists():
        files.rename(folder, replaced)
    try:
        files.rename(aside, folder)
    except OSError:
        files.rename(replaced, folder)
        raise
    if replaced.exists():
        files.remove_folder(replaced)


def _check_is_own(path: Path) -> None:
    """Raise if `path` is something that must not be removed."""
    if not path.exists():
        return
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name}
    is_model = path.is_dir() and all(
        (path / name).is_file() and Path(name).suffix in _ENDINGS for name in names
    )
    if names and not (is_model and (path.suffix == ".incomplete" or names.intersection(_CONFIGS))):
        raise ConfigurationError(
            f"'{path}' is in the way: it is no folder that holds a saved model and nothing else, so it is "
            "not replaced. Choose an empty or a new folder."
        )
