"""Writes the contents of a checkpoint folder, and gives it its name.

Nothing here communicates or touches an object of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import files
from .checkpoint import FORMAT_VERSION, STATE_FILE, WHOLE_FORMAT_VERSION, RunState, examine, process_file
from .digests import HashedBytes, HashingFile, Written
from .housekeeping import has_only_own_files, remove_checkpoint, set_damaged_aside
from .shards import SHARDS_FILE


def origin_of(state: RunState) -> dict[str, Any]:
    """Return what each file says of where it comes from, so that a stray one is known."""
    return {"run_id": state["run_id"], "update": state["run_progress"]["updates_completed"]}


def write_contents(
    folder: Path, contents: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Written]:
    """Write files into a folder, by the endings of their names, and return sizes and digests.

    Nothing may change `contents` meanwhile. All files are on the disk when this returns.
    """
    begun: dict[str, HashingFile | HashedBytes] = {}
    for name, content in contents.items():
        if name.endswith(".jsonl"):
            files.write_pieces(folder / name, content.pieces)
            begun[name] = content
        elif name.endswith(".safetensors"):
            begun[name] = files.write_tensors(folder / name, content, origin, stays=True)
        else:
            begun[name] = files.write_object(folder / name, content, origin, stays=True)
    # Last, so that the disk writes a file while the one before is hashed.
    return {name: file.written for name, file in begun.items()}


def as_copyable(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return contents as they can be copied in memory.

    What cannot be saved raises an error here, where training can still say what it was.
    """
    return {
        name: content
        if name.endswith((".jsonl", ".safetensors"))
        else files.as_plain(content, f"The content of '{name}'")
        for name, content in contents.items()
    }


def publish(
    staging: Path, path: Path, state: RunState, written: Mapping[str, Written], num_processes: int
) -> None:
    """Write what the folder holds, and give it its name. What stood there gives way.

    What is damaged is kept aside.

    Args:
        written: the files of all processes.
        num_processes: that have written, each a file of its own.
    """
    if missing := [name for name in map(process_file, range(num_processes)) if not (staging / name).exists()]:
        raise CheckpointError(
            f"'{staging}' has no {missing}. On several machines it has to be on a disk that they share."
        )
    content = {
        "format_version": FORMAT_VERSION if SHARDS_FILE in written else WHOLE_FORMAT_VERSION,
        **state,
        "files": {name: written[name].size for name in sorted(written)},
        "digests": {name: written[name].sha256 for name in sorted(written)},
    }
    files.write_json(staging / STATE_FILE, content, True)
    files.sync(staging)
    give_name(staging, path)


def give_name(staging: Path, path: Path) -> None:
    """Give a complete state that stands at `staging` its name. What stood there gives way."""
    replaced = path.with_name(f"{path.name}.replaced")
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
