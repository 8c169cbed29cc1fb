"""Find values that no saved state has: in edited files, and in damaged ones without digests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

_PROCESS_FILE = re.compile(r"process_\d{5,}\.pt")
_LARGEST = 2**64
"""No counter and no seed of a run comes to this."""


def find_wrong_value(state: Mapping[str, Any]) -> str | None:
    """What no state has that was saved; edited files of version 1 can have it."""
    for name, value in state["run_progress"].items():
        if not isinstance(value, int) or not 0 <= value < _LARGEST:
            return f"{name!r} is {value!r:.60}, but must be a count"
    launched = state["launched"]
    num_files = sum(1 for name in state["files"] if _PROCESS_FILE.fullmatch(name))
    if not 1 <= launched["num_processes"] <= max(num_files, 1):
        return f"'num_processes' is {launched['num_processes']!r:.60}, but {num_files} processes have files"
    if not -_LARGEST < state["seed"] < _LARGEST:
        return f"'seed' is {state['seed']!r:.60}, which no seed is"
    if state["num_samples"] is not None and not 0 <= state["num_samples"] < _LARGEST:
        return f"'num_samples' is {state['num_samples']!r:.60}, but must be a count"
    for name, size in state["files"].items():
        if not _is_inside(name):
            return f"'files' names {name!r:.80}, which is not inside of the folder"
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            return f"the size of {name!r:.80} is {size!r:.60}, but must be a number of bytes"
    if not all(isinstance(name, str) for name in state["callbacks"]):
        return "'callbacks' holds something else than names"
    return None


def _is_inside(name: str) -> bool:
    """Whether a path that a file names leads to nothing outside of its folder, on any platform."""
    parts = PurePosixPath(name).parts
    is_plain = name.isprintable() and not set(name) & set('\\:*?"<>|') and name == "/".join(parts)
    return bool(parts) and is_plain and ".." not in parts and all(len(part.encode()) < 256 for part in parts)
