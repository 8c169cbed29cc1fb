"""How a checkpoint folder is written by several processes, so that it is complete or absent."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import AccelError, CheckpointError, ConfigurationError
from . import files
from .checkpoint import (
    FORMAT_VERSION,
    STATE_FILE,
    RunState,
    examine,
    is_same_state,
    process_file,
    refuse_other_run,
    remove_checkpoint,
    remove_leftovers,
    sibling,
)


def save_folder(
    path: str | Path,
    state: RunState,
    create_main_files: Callable[[], Mapping[str, Any]],
    create_process_state: Callable[[], Mapping[str, Any]],
    *,
    process_index: int,
    gather: Callable[[Any], Sequence[Any]],
    write_engine: Callable[[Path], None] | None = None,
    is_known: bool = True,
) -> bool:
    """Write a checkpoint folder. Every process takes part, and either all of them return or all raise.

    Args:
        path: of the folder. A state of the same run that is there gives way once the new one is complete.
        state: for trainer_state.json; that of the main process counts.
        create_main_files: called on the main process; contents by file name: tensors for `.safetensors`, else
            plain.
        create_process_state: returns what this process keeps in its own file.
        process_index: 0 is the main process.
        gather: returns the values of all processes in their order, once all have called it.
        write_engine: called on every process with the folder in which an engine writes its own files.
        is_known: what stands at `path` is of this very run, and not of one that had gone on from an earlier
            state.

    Returns:
        Whether something was written: not if this state is known to stand there already.

    Raises:
        CheckpointError: what failed and on which process; the checkpoints before are as they were.
        ConfigurationError: the same for a state that cannot be saved.
    """
    path = Path(path).absolute()
    is_main = process_index == 0
    staging: Path | None = None

    def run_on_all(action: Callable[[], Any], takes_part: bool = True) -> list[Any]:
        try:
            return _run_on_all(action, gather, f"The training state was not saved to '{path}'.", takes_part)
        except AccelError:
            if is_main and staging is not None:
                remove_checkpoint(staging)
            raise

    def write_own_files(staging: Path) -> None:
        if not staging.is_dir():
            raise CheckpointError(
                f"'{staging}' is not there. On several machines it has to be on a disk that they share."
            )
        for name, content in (create_main_files() if is_main else {}).items():
            write = files.write_tensors if name.endswith(".safetensors") else files.write_object
            write(staging / name, content)
        files.write_object(staging / process_file(process_index), create_process_state())

    name = run_on_all(partial(_prepare, path, state, is_known), is_main)[0]
    if name is None:
        return False
    staging = folder = path.with_name(name)
    num_processes = len(run_on_all(partial(write_own_files, folder)))
    if write_engine is not None:
        run_on_all(partial(write_engine, folder / "engine"))
    run_on_all(partial(_publish, folder, path, state, num_processes), is_main)
    return True


def _run_on_all(
    action: Callable[[], Any], gather: Callable[[Any], Sequence[Any]], failure: str, takes_part: bool
) -> list[Any]:
    """Act on this process if it takes part, and return what all have returned. A failure is raised on all."""
    outcome = None
    cause = None
    try:
        outcome = action() if takes_part else None
    except Exception as error:
        cause = error
    message = cause and (str(cause) if isinstance(cause, AccelError) else f"{type(cause).__name__}: {cause}")
    gathered = gather((outcome, message, isinstance(cause, ConfigurationError)))
    failed = {
        f"Process {index}: {text}": is_users
        for index, (_, text, is_users) in enumerate(gathered)
        if text is not None
    }
    if not failed:
        return [outcome for outcome, _, _ in gathered]
    kind = ConfigurationError if all(failed.values()) else CheckpointError
    raise kind(f"{failure} {' '.join(failed)}") from cause


def _prepare(path: Path, state: RunState, is_known: bool) -> str | None:
    """Make a folder to write to and return its name; None if `state` stands at `path` already.

    The name is new with each save: of two jobs that save to one path at the same time, neither writes into
    the other's.
    """
    if path.name.endswith((".incomplete", ".replaced")):
        raise ConfigurationError(
            f"'{path.name}' is a name for what a crash leaves behind. Choose another one."
        )
    if is_known and is_same_state(path, state["run_id"], state["run_progress"]):
        return None
    if path.exists() and not (path / STATE_FILE).exists() and (path.is_file() or any(path.iterdir())):
        raise CheckpointError(f"'{path}' is no folder of a training state. Choose an empty or a new folder.")
    refuse_other_run(path, state["run_id"])
    files.make_folder(path.parent)
    remove_leftovers(path.parent)
    staging = sibling(path, f".{secrets.token_hex(4)}.incomplete")
    files.make_folder(staging)
    return staging.name


def _publish(staging: Path, path: Path, state: RunState, num_processes: int) -> None:
    replaced = sibling(path, ".replaced")
    if missing := [name for name in map(process_file, range(num_processes)) if not (staging / name).exists()]:
        raise CheckpointError(
            f"'{staging}' has no {missing}. On several machines it has to be on a disk that they share."
        )
    entries = sorted(staging.rglob("*"))
    for entry in entries:
        if entry.relative_to(staging).parts[0] == "engine":
            files.sync(entry)
    sizes = {
        entry.relative_to(staging).as_posix(): entry.stat().st_size for entry in entries if entry.is_file()
    }
    files.write_json(staging / STATE_FILE, {"format_version": FORMAT_VERSION, **state, "files": sizes})
    files.sync(staging)
    try:
        if isinstance(examine(path), dict):
            files.rename(path, replaced)
        elif path.exists():
            files.remove_folder(path)
        files.rename(staging, path)
    except OSError:
        if replaced.exists() and not path.exists():
            files.rename(replaced, path)
        raise
    remove_leftovers(path.parent)
