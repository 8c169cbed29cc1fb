"""How a checkpoint folder is written by several processes, so that it is complete or absent.

The contents of the files are in memory, `publishing` writes them and gives the folder its name. It takes part
in no communication and touches no object of the training, so that a thread may do it.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigurationError
from . import files
from .background import BackgroundWriter
from .checkpoint import Kind, NoState, RunState, examine, is_same_state, process_file
from .housekeeping import being_written, refuse_other_run, remove_leftovers, staging_of
from .one_save import OneSave
from .publishing import as_copyable, origin_of, publish, write_contents
from .save_shards import write_shards
from .shards import Shards
from .snapshot import Snapshots


class Saved(enum.IntEnum):
    """What a call has done; true if that is anything."""

    NOTHING = 0
    """The state is known to stand there already."""
    WRITTEN = 1
    BEGUN = 2
    """A writer is writing it."""


def save_folder(
    path: str | Path,
    state: RunState,
    create_main_files: Callable[[], Mapping[str, Any]],
    create_process_state: Callable[[], Mapping[str, Any]],
    *,
    process_index: int,
    gather: Callable[[Any], Sequence[Any]],
    gather_on_main: Callable[[Any], Sequence[Any]] | None = None,
    create_shards: Callable[[], Shards | None] | None = None,
    write_engine: Callable[[Path], None] | None = None,
    is_known: bool = True,
    is_first: bool = True,
    gathers_files: bool = False,
    writer: BackgroundWriter | None = None,
) -> Saved:
    """Write a checkpoint folder. Every process takes part, and either all of them return or all raise.

    The main process writes what all of them have to save. If an engine writes files of its own, each process
    writes its part, to a disk that all of them share.

    Args:
        path: of the folder. A state of the same run that is there gives way once the new one is complete.
        state: for trainer_state.json; that of the main process counts.
        create_main_files: called on the main process; contents by file name: tensors for `.safetensors`,
            `HashedBytes` for `.jsonl`, else plain.
        create_process_state: returns what this process keeps in a file of its own.
        process_index: 0 is the main process.
        gather: returns the values of all processes in their order, once all have called it.
        gather_on_main: the same for the main process alone; the others may get anything. None is `gather`.
        create_shards: called on every process if there is `write_engine`; returns what each writes alone, or
            None.
        write_engine: called on every process with the folder in which an engine writes its own files, unless
            there are shards.
        is_known: what stands at `path` is of this very run, and not of one that had gone on from an earlier
            state.
        is_first: the run has saved nothing beside `path`, so leftovers of crashes are still to be removed.
        gathers_files: every process takes part in `create_main_files`.
        writer: writes copies of everything while training goes on, so that this returns before the folder
            stands. Of several processes that write each has one. Tensors that cannot be written as shards are
            written before this returns.

    Raises:
        CheckpointError: what failed and on which process; the checkpoints before are as they were.
        ConfigurationError: the same for a state that cannot be saved.
    """
    save = OneSave(Path(path).absolute(), state, process_index, gather)
    names = save.on_all(partial(_prepare, save.path, state, is_known, is_first), save.is_main)
    if names[0] is None:
        return Saved.NOTHING
    save.staging = save.path.with_name(names[0])
    if write_engine is not None:
        is_begun = write_shards(
            save, create_main_files, create_process_state, create_shards, write_engine, writer
        )
        return Saved.BEGUN if is_begun else Saved.WRITTEN
    own: list[Any] = []
    save.on_all(lambda: own.append(_own_state(process_index, create_process_state, len(names))))
    states = (gather_on_main or gather)(own[0]) if len(names) > 1 else own
    takes_part = save.is_main or gathers_files
    save.on_all(partial(_write_all, save, create_main_files, states, writer), takes_part)
    return Saved.WRITTEN if writer is None else Saved.BEGUN


def _own_state(
    process_index: int, create_process_state: Callable[[], Mapping[str, Any]], num_processes: int
) -> Any:
    """Return what one process keeps, as it is written; without tensors on a GPU if another one writes it."""
    name = process_file(process_index)
    plain = files.as_plain(create_process_state(), f"The content of '{name}'")
    return Snapshots().take(plain) if num_processes > 1 else plain


def _write_all(
    save: OneSave,
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
    contents, save.state = writer.snapshots.take(as_copyable(contents)), copy.deepcopy(save.state)
    being_written.add(save.staging)
    writer.start(write)


def _prepare(path: Path, state: RunState, is_known: bool, is_first: bool) -> str | None:
    """Make a folder to write to and return its name; None if `state` stands at `path` already.

    The name is new with each save: of two jobs that save to one path at the same time, neither writes into
    the other's.
    """
    if path.name.endswith((".incomplete", ".replaced")):
        raise ConfigurationError(
            f"'{path.name}' is a name for what a crash leaves behind. Choose another one."
        )
    if is_known and is_same_state(path, state["run_id"], state["run_progress"]):
        remove_leftovers(path.parent, is_first)
        return None
    found = examine(path)
    is_foreign = isinstance(found, NoState) and found.kind is Kind.FOREIGN and path.exists()
    if is_foreign and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"'{path}' is no folder of a training state. Choose an empty or a new folder.")
    refuse_other_run(path, state["run_id"])
    # Last, so that a save that is refused changes nothing: another job may be writing there.
    remove_leftovers(path.parent, is_first)
    files.make_folder(path.parent)
    staging = staging_of(path)
    files.make_staging(staging)
    return staging.name
