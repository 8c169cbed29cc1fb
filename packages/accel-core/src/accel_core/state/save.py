"""How a checkpoint folder is written by several processes, so that it is complete or absent.

The contents of the files are in memory, `write_contents` writes them, and `publish` gives the folder its
name. The last two take part in no communication and touch no object of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import AccelError, CheckpointError, ConfigurationError
from . import files
from .checkpoint import (
    FORMAT_VERSION,
    STATE_FILE,
    Kind,
    NoState,
    RunState,
    examine,
    is_same_state,
    process_file,
)
from .digests import Written, digest_of_file
from .housekeeping import (
    has_only_own_files,
    refuse_other_run,
    remove_checkpoint,
    remove_leftovers,
    set_damaged_aside,
    staging_of,
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
    gathers_files: bool = False,
) -> bool:
    """Write a checkpoint folder. Every process takes part, and either all of them return or all raise.

    Args:
        path: of the folder. A state of the same run that is there gives way once the new one is complete.
        state: for trainer_state.json; that of the main process counts.
        create_main_files: called on the main process; contents by file name: tensors for `.safetensors`,
            bytes for `.jsonl`, else plain.
        create_process_state: returns what this process keeps in its own file.
        process_index: 0 is the main process.
        gather: returns the values of all processes in their order, once all have called it.
        write_engine: called on every process with the folder in which an engine writes its own files.
        is_known: what stands at `path` is of this very run, and not of one that had gone on from an earlier
            state.
        gathers_files: every process takes part in `create_main_files`.

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

    def write_own_files(staging: Path) -> dict[str, Written]:
        # First what communicates: a process that fails below must not leave others waiting for it.
        contents = dict(create_main_files()) if is_main or gathers_files else {}
        process_state = create_process_state()
        if not staging.is_dir():
            raise CheckpointError(
                f"'{staging}' is not there. On several machines it has to be on a disk that they share."
            )
        contents = contents if is_main else {}
        contents[process_file(process_index)] = process_state
        return write_contents(staging, contents, origin_of(state))

    name = run_on_all(partial(_prepare, path, state, is_known), is_main)[0]
    if name is None:
        return False
    staging = folder = path.with_name(name)
    written = run_on_all(partial(write_own_files, folder))
    num_processes = len(written)
    if write_engine is not None:
        run_on_all(partial(write_engine, folder / "engine"))
        # What an engine has written is read back, by each process a part. They may see it late on a
        # network disk.
        names = run_on_all(partial(_files_of_engine, folder), is_main)[0]
        own = names[process_index::num_processes]
        written += run_on_all(partial(_read_back, folder, own))
    run_on_all(partial(publish, folder, path, state, _join(written), num_processes), is_main)
    return True


def origin_of(state: RunState) -> dict[str, Any]:
    """Return what each file says of where it comes from, so that a stray one is known."""
    return {"run_id": state["run_id"], "update": state["run_progress"]["updates_completed"]}


def write_contents(
    folder: Path, contents: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Written]:
    """Write files into a folder, by the endings of their names, and return sizes and digests."""
    written = {}
    for name, content in contents.items():
        if name.endswith(".jsonl"):
            written[name] = files.write_bytes(folder / name, content)
        elif name.endswith(".safetensors"):
            written[name] = files.write_tensors(folder / name, content, origin)
        else:
            written[name] = files.write_object(folder / name, content, origin)
    return written


def _files_of_engine(folder: Path) -> list[str]:
    entries = sorted((folder / "engine").rglob("*"))
    for entry in entries:
        if entry.is_dir():
            files.sync(entry)
    return [entry.relative_to(folder).as_posix() for entry in entries if entry.is_file()]


def _read_back(folder: Path, names: Sequence[str]) -> dict[str, Written]:
    written = {}
    for name in names:
        files.sync(folder / name)
        written[name] = Written((folder / name).stat().st_size, digest_of_file(folder / name))
    return written


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
    found = examine(path)
    is_foreign = isinstance(found, NoState) and found.kind is Kind.FOREIGN and path.exists()
    if is_foreign and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"'{path}' is no folder of a training state. Choose an empty or a new folder.")
    refuse_other_run(path, state["run_id"])
    files.make_folder(path.parent)
    remove_leftovers(path.parent)
    staging = staging_of(path)
    files.make_folder(staging)
    return staging.name


def _join(written: Sequence[Mapping[str, Written]]) -> dict[str, Written]:
    return {name: each[name] for each in written for name in each}


def publish(
    staging: Path, path: Path, state: RunState, written: Mapping[str, Written], num_processes: int
) -> None:
    """Write what the folder holds, and give it its name. What stood there gives way.

    What is damaged is kept aside.

    Args:
        written: the files of all processes.
        num_processes: that have written, each a file of its own.
    """
    replaced = path.with_name(f"{path.name}.replaced")
    if missing := [name for name in map(process_file, range(num_processes)) if not (staging / name).exists()]:
        raise CheckpointError(
            f"'{staging}' has no {missing}. On several machines it has to be on a disk that they share."
        )
    content = {
        "format_version": FORMAT_VERSION,
        **state,
        "files": {name: written[name].size for name in sorted(written)},
        "digests": {name: written[name].sha256 for name in sorted(written)},
    }
    files.write_json(staging / STATE_FILE, content, True)
    files.sync(staging)
    try:
        if isinstance(examine(path), dict):
            files.rename(path, replaced)
        elif path.exists():
            _make_way(path)
        files.rename(staging, path)
    except OSError:
        if replaced.exists() and not path.exists():
            files.rename(replaced, path)
        raise
    if has_only_own_files(replaced) or isinstance(examine(replaced), dict):
        remove_checkpoint(replaced)


def _make_way(path: Path) -> None:
    if any(path.iterdir()):
        set_damaged_aside(path)
    else:
        files.remove_folder(path)
