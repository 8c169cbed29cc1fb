"""How a checkpoint folder is written by several processes, so that it is complete or absent.

The contents of the files are in memory, `publishing` writes them and gives the folder its name. It takes part
in no communication and touches no object of the training, so that a thread may do it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import AccelError, CheckpointError, ConfigurationError
from . import files
from .background import BackgroundWriter
from .checkpoint import Kind, NoState, RunState, examine, is_same_state, process_file
from .digests import Written, digest_of_file
from .housekeeping import being_written, refuse_other_run, remove_checkpoint, remove_leftovers, staging_of
from .publishing import origin_of, publish, write_contents
from .snapshot import Snapshots


def save_folder(
    path: str | Path,
    state: RunState,
    create_main_files: Callable[[], Mapping[str, Any]],
    create_process_state: Callable[[], Mapping[str, Any]],
    *,
    process_index: int,
    gather: Callable[[Any], Sequence[Any]],
    gather_on_main: Callable[[Any], Sequence[Any]] | None = None,
    write_engine: Callable[[Path], None] | None = None,
    is_known: bool = True,
    gathers_files: bool = False,
    writer: BackgroundWriter | None = None,
) -> bool:
    """Write a checkpoint folder. Every process takes part, and either all of them return or all raise.

    The main process writes what all of them have to save. If an engine writes files of its own, each process
    writes its part, to a disk that all of them share.

    Args:
        path: of the folder. A state of the same run that is there gives way once the new one is complete.
        state: for trainer_state.json; that of the main process counts.
        create_main_files: called on the main process; contents by file name: tensors for `.safetensors`,
            bytes for `.jsonl`, else plain.
        create_process_state: returns what this process keeps in a file of its own.
        process_index: 0 is the main process.
        gather: returns the values of all processes in their order, once all have called it.
        gather_on_main: the same for the main process alone; the others may get anything. None is `gather`.
        write_engine: called on every process with the folder in which an engine writes its own files.
        is_known: what stands at `path` is of this very run, and not of one that had gone on from an earlier
            state.
        gathers_files: every process takes part in `create_main_files`.
        writer: writes copies of everything while training goes on, so that this returns before the folder
            stands. Not together with `write_engine`.

    Returns:
        Whether something was written, or begun to be: not if this state is known to stand there already.

    Raises:
        CheckpointError: what failed and on which process; the checkpoints before are as they were.
        ConfigurationError: the same for a state that cannot be saved.
    """
    save = _Save(Path(path).absolute(), state, process_index, gather)
    names = save.on_all(partial(_prepare, save.path, state, is_known), save.is_main)
    if names[0] is None:
        return False
    save.staging = save.path.with_name(names[0])
    if write_engine is not None:
        _write_shards(save, create_main_files, create_process_state, write_engine)
        return True
    own: list[Any] = []
    save.on_all(lambda: own.append(_own_state(process_index, create_process_state, len(names))))
    states = (gather_on_main or gather)(own[0]) if len(names) > 1 else own
    takes_part = save.is_main or gathers_files
    save.on_all(partial(_write_all, save, create_main_files, states, writer), takes_part)
    return True


@dataclasses.dataclass
class _Save:
    """One call of `save_folder`."""

    path: Path
    state: RunState
    process_index: int
    gather: Callable[[Any], Sequence[Any]]
    staging: Path = Path()
    """The folder that is being filled, once it is there."""

    @property
    def is_main(self) -> bool:
        return self.process_index == 0

    def on_all(self, action: Callable[[], Any], takes_part: bool = True) -> list[Any]:
        """Act on this process if it takes part. What fails is raised on all, after the folder is removed."""
        try:
            failure = f"The training state was not saved to '{self.path}'."
            return _run_on_all(action, self.gather, failure, takes_part)
        except AccelError:
            if self.is_main and self.staging != Path():
                self.give_up()
            raise

    def give_up(self) -> None:
        being_written.discard(self.staging)
        remove_checkpoint(self.staging)


def _own_state(
    process_index: int, create_process_state: Callable[[], Mapping[str, Any]], num_processes: int
) -> Any:
    """Return what one process keeps, as it is written; without tensors on a GPU if another one writes it."""
    name = process_file(process_index)
    plain = files.as_plain(create_process_state(), f"The content of '{name}'")
    return Snapshots().take(plain) if num_processes > 1 else plain


def _write_all(
    save: _Save,
    create_main_files: Callable[[], Mapping[str, Any]],
    states: Sequence[Any],
    writer: BackgroundWriter | None,
) -> None:
    """Write and publish all files of a state on the main process, or let `writer` do so."""
    contents = dict(create_main_files())
    if not save.is_main:
        # It has helped to gather them.
        return
    contents.update({process_file(index): state for index, state in enumerate(states)})

    def write() -> None:
        try:
            written = write_contents(save.staging, contents, origin_of(save.state))
            publish(save.staging, save.path, save.state, written, len(states))
        except Exception:
            save.give_up()
            raise
        being_written.discard(save.staging)

    if writer is None:
        write()
        return
    # What cannot be saved is refused here, where training can still say what it was.
    contents = {
        name: content
        if name.endswith((".jsonl", ".safetensors"))
        else files.as_plain(content, f"The content of '{name}'")
        for name, content in contents.items()
    }
    contents, save.state = writer.snapshots.take(contents), copy.deepcopy(save.state)
    being_written.add(save.staging)
    writer.start(write)


def _write_shards(
    save: _Save,
    create_main_files: Callable[[], Mapping[str, Any]],
    create_process_state: Callable[[], Mapping[str, Any]],
    write_engine: Callable[[Path], None],
) -> None:
    """Let each process write its own files, and the engine its shards."""
    folder, index = save.staging, save.process_index

    def write_own_files() -> dict[str, Written]:
        if not folder.is_dir():
            raise CheckpointError(
                f"'{folder}' is not there. On several machines it has to be on a disk that they share."
            )
        contents = dict(create_main_files()) if save.is_main else {}
        contents[process_file(index)] = create_process_state()
        return write_contents(folder, contents, origin_of(save.state))

    written = save.on_all(write_own_files)
    num_processes = len(written)
    save.on_all(partial(write_engine, folder / "engine"))
    # What an engine has written is read back, by each process a part. They may see it late on a
    # network disk.
    names = save.on_all(partial(_files_of_engine, folder), save.is_main)[0]
    written += save.on_all(partial(_read_back, folder, names[index::num_processes]))
    save.on_all(partial(publish, folder, save.path, save.state, _join(written), num_processes), save.is_main)


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
