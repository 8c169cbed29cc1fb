"""What each process says of the part of a state that it has written, in a file beside it.

So the main process makes a state of the parts without messages of the others, also while an error ends it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from . import files
from .digests import Written

SECONDS_UNTIL_WRITTEN = 20.0
"""After an error the others may still be writing, and network disks show a new file late."""


def note_written(folder: Path, process_index: int, written: Mapping[str, Written]) -> None:
    """Say that one process is through, with the size and the digest of each of its files."""
    content = {name: [each.size, each.sha256] for name, each in written.items()}
    files.replace_file(_note_of(folder, process_index), lambda path: files.write_json(path, content))


def written_by_all(folder: Path, num_processes: int) -> list[dict[str, Written]]:
    """Return what all processes have said, and remove it. One process calls it.

    Raises:
        CheckpointError: some have said nothing for `SECONDS_UNTIL_WRITTEN`.
    """
    notes = [_note_of(folder, index) for index in range(num_processes)]
    give_up = time.monotonic() + SECONDS_UNTIL_WRITTEN
    while missing := [index for index, note in enumerate(notes) if not note.exists()]:
        if time.monotonic() > give_up:
            raise CheckpointError(f"The processes {missing} have not written their parts to '{folder}'.")
        time.sleep(0.05)
    found = [
        {name: Written(size, sha256) for name, (size, sha256) in files.read_json(note).items()}
        for note in notes
    ]
    for note in notes:
        note.unlink()
    return found


def _note_of(folder: Path, process_index: int) -> Path:
    return folder / f"written_{process_index:05d}.json"
