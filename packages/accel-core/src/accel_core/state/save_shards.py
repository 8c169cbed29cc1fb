"""Writes the state of an engine that spreads the model: each process writes its own part.

They write to a disk that all of them share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import files
from .background import BackgroundWriter
from .checkpoint import ATTRIBUTES_FILE, process_file
from .digests import Written
from .housekeeping import being_written, remove_checkpoint
from .one_save import OneSave
from .publishing import as_copyable, origin_of, publish, write_contents
from .shards import APART, SHARDS_FILE, SHARDS_FOLDER, Shards, read_back
from .written_notes import note_written, written_by_all

CreateContents = Callable[[], Mapping[str, Any]]


def write_shards(
    save: OneSave,
    create_main_files: CreateContents,
    create_process_state: CreateContents,
    create_shards: Callable[[], Shards | None] | None,
    write_engine: Callable[[Path], None],
    writer: BackgroundWriter | None,
) -> bool:
    """Let each process write its own files and its shards, or the engine write them together.

    Returns:
        Whether writers have begun to write them, one on each process.
    """
    shards = None if create_shards is None else _agree_on_shards(save, create_shards)
    if shards is not None and writer is not None:
        _begin(
            save, lambda: _own_contents(save, create_main_files, create_process_state, shards), shards, writer
        )
        return True

    def write_own_files() -> dict[str, Written]:
        contents = _own_contents(save, create_main_files, create_process_state, shards)
        written = write_contents(save.staging, contents, origin_of(save.state))
        return written if shards is None else {**written, **shards.write(save.staging)}

    written = save.on_all(write_own_files)
    num_processes = len(written)
    if shards is None:
        save.on_all(partial(write_engine, save.staging / SHARDS_FOLDER))
        # What an engine has written is read back, by each process a part. They may see it late on a
        # network disk.
        names = save.on_all(partial(_files_of_engine, save.staging), save.is_main)[0]
        written += save.on_all(partial(read_back, save.staging, names[save.process_index :: num_processes]))
    joined = _join(written)
    save.on_all(partial(publish, save.staging, save.path, save.state, joined, num_processes), save.is_main)
    return False


def _begin(
    save: OneSave,
    create_contents: Callable[[], dict[str, Any]],
    shards: Shards,
    writer: BackgroundWriter,
) -> None:
    """Copy what this process writes, and let `writer` write the copies."""
    copies: dict[str, Any] = {}

    def copy_all() -> None:
        contents = as_copyable(create_contents())
        copies.update(writer.snapshots.take({"contents": contents, "parts": shards.parts}))

    num_processes = len(save.on_all(copy_all))
    shards.parts, save.state = copies["parts"], copy.deepcopy(save.state)
    index = save.process_index

    def write() -> None:
        written = write_contents(save.staging, copies["contents"], origin_of(save.state))
        note_written(save.staging, index, {**written, **shards.write(save.staging)})

    def complete(are_written: bool) -> None:
        try:
            if are_written:
                joined = _join(written_by_all(save.staging, num_processes))
                publish(save.staging, save.path, save.state, joined, num_processes)
        finally:
            being_written.discard(save.staging)
            # Nothing is there any more once it is published.
            remove_checkpoint(save.staging)

    if save.is_main:
        being_written.add(save.staging)
    writer.start(write, complete)


def _agree_on_shards(save: OneSave, create_shards: Callable[[], Shards | None]) -> Shards | None:
    """Return what this process writes, once all have exchanged their plans; None if one cannot."""
    own: list[Shards | None] = []

    def propose() -> Any:
        own.append(create_shards())
        return None if own[0] is None else own[0].propose()

    proposals = save.on_all(propose)
    shards = own[0]
    if shards is None or any(proposal is None for proposal in proposals):
        return None
    save.on_all(partial(shards.settle, proposals, save.process_index, save.staging))
    return shards


def _own_contents(
    save: OneSave,
    create_main_files: CreateContents,
    create_process_state: CreateContents,
    shards: Shards | None,
) -> dict[str, Any]:
    """Return the contents of the files of this process, by name."""
    if not save.staging.is_dir():
        raise CheckpointError(
            f"'{save.staging}' is not there. On several machines it has to be on a disk that they share."
        )
    contents = dict(create_main_files()) if save.is_main else {}
    if save.is_main and shards is not None:
        contents[SHARDS_FILE] = shards.rest
        if ATTRIBUTES_FILE in contents:
            contents[ATTRIBUTES_FILE] = without_apart(contents[ATTRIBUTES_FILE])
    contents[process_file(save.process_index)] = create_process_state()
    return contents


def without_apart(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the shards hold with the rest of the optimizer. States of older versions have both."""
    return {kind: content for kind, content in attributes.items() if kind != APART}


def _files_of_engine(folder: Path) -> list[str]:
    entries = sorted((folder / "engine").rglob("*"))
    for entry in entries:
        if entry.is_dir():
            files.sync(entry)
    return [entry.relative_to(folder).as_posix() for entry in entries if entry.is_file()]


def _join(written: Sequence[Mapping[str, Written]]) -> dict[str, Written]:
    return {name: each[name] for each in written for name in each}
