"""A folder in which a run saves: whose states stand there, and what is set aside or removed."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import OtherRunError
from ..text import counted
from . import files
from .checkpoint import (
    ORDER,
    STATE_FILE,
    Kind,
    NoState,
    examine,
    find_mismatch,
    metrics_of,
    process_file,
)
from .folder import DAMAGED, complete_checkpoints, entries_of, examine_entries

_OWN_NAMES = re.compile(
    r"trainer_state\.json|history\.jsonl|model\.safetensors|engine"
    r"|(model_extra|optimizer|scheduler|scaler|attributes|extra|sharded|process_\d{5,})\.pt"
    r"|written_\d{5,}\.json(\..+)?"  # what a process says of its part while others still write
    r"|\.(tmp|nfs)\w+"  # what safetensors leaves when it is killed, and a network disk for an open file
)
_STAGING = re.compile(r".+\.[0-9a-f]{8}\.incomplete")

being_written: set[Path] = set()
"""What threads of this process write at this moment, beside its final place: no leftover of a crash."""

_refused_in: set[Path] = set()
"""Folders in which the disk has refused to remove something that need not be kept."""

_logger = logging.getLogger("accel_core")


class KnownStates:
    """The states of a folder in which a run saves.

    Each is read once, when it is new: a folder may hold thousands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: dict[Path, Facts] = {}
        self._entries: set[tuple[str, int]] = set()
        self._unchecked: list[Path] = []
        self._passed_for: tuple[str, float] = ("", math.inf)
        """The run and the number of updates for which all others have passed `check`."""

    def refresh(self) -> None:
        """Read what is new and forget what is gone. One process calls it."""
        entries = entries_of(self.folder)
        # Sets are compared by the interpreter: a save among thousands of states costs what the second did.
        changed = self._entries ^ entries
        for name, _ in changed - entries:
            self.states.pop(self.folder / name, None)
        listing = examine_entries(self.folder, changed & entries)
        for path in being_written & listing.unfinished.keys():
            del listing.unfinished[path]
        # A run that is resumed has asked for the newest state of this folder, and was told there.
        listing.report(again=False)
        for path, state in listing.complete.items():
            progress, digest = dict(state["run_progress"]), dict(state).get("sha256")
            self.states[path] = Facts(state["run_id"], progress, metrics_of(state), digest)
        self._unchecked.extend(listing.complete)
        self._entries = entries

    def check(self, run_id: str, updates_completed: int | None = None) -> None:
        """Raise `CheckpointError` for states of another run, or later ones of this run."""
        most = math.inf if updates_completed is None else updates_completed
        run_before, most_before = self._passed_for
        # What has passed passes again for the same run when that has gone on.
        is_known = run_before == run_id and most_before <= most
        for path in self._unchecked if is_known else self.states:
            if path in self.states:
                refuse_other_run(path, run_id, self.states[path].run_id)
                refuse_later(path, self.states[path].progress["updates_completed"], updates_completed)
        self._unchecked, self._passed_for = [], (run_id, most)

    def of_run(self, run_id: str) -> dict[Path, Facts]:
        """Return the states of a run, the newest last."""
        own = [path for path, facts in self.states.items() if facts.run_id == run_id]
        age = functools.partial(_age, self.states)
        return {path: self.states[path] for path in sorted(own, key=age)}

    def set_damaged_aside(self, updates_completed: int) -> None:
        """Rename what has more updates than the run and is damaged: the run went on from before it."""
        later = [
            path
            for path, facts in self.states.items()
            if facts.progress["updates_completed"] > updates_completed
        ]
        for path in later:
            state = examine(path)
            is_damaged = isinstance(state, NoState) or find_mismatch(path, state) is not None
            if is_damaged:
                set_damaged_aside(path)
                del self.states[path]


def _age(states: dict[Path, Facts], path: Path) -> tuple[object, ...]:
    return *(states[path].progress[key] for key in ORDER), not path.name.endswith(".replaced"), path.name


class Facts(NamedTuple):
    """What a folder is kept or removed by, and what tells it from others."""

    run_id: str
    progress: dict[str, Any]
    metrics: dict[str, float]
    digest: Any
    """Of trainer_state.json, which has those of all other files; None in states of older versions."""


def check_folder_of_run(save_dir: str | Path, run_id: str, updates_completed: int | None = None) -> None:
    """Raise `CheckpointError` if `save_dir` holds states of another run, or later ones of this run."""
    for path, state in complete_checkpoints(save_dir).items():
        refuse_other_run(path, run_id, state["run_id"])
        refuse_later(path, state["run_progress"]["updates_completed"], updates_completed)


def refuse_later(path: Path, updates: int, updates_completed: int | None) -> None:
    """Raise `CheckpointError` if a state of this run has more updates than the run has made."""
    if updates_completed is not None and updates > updates_completed:
        raise OtherRunError(
            f"'{path}' holds {counted(updates, 'updates')} of this run, which has gone on from "
            f"{updates_completed}: latest_checkpoint would choose what was given up. Remove it, or save to "
            "another folder."
        )


def refuse_other_run(path: Path, run_id: str, found: str | None = None) -> None:
    """Raise `CheckpointError` if `path` holds a state of another run, complete or not.

    Args:
        found: the run of the state, if it is known already.
    """
    found = found or run_id_in(path) or run_id
    if found != run_id:
        raise OtherRunError(
            f"'{path}' is a state of the run {found!r}, but this is the run {run_id!r}. Choose another "
            f"folder, delete '{path.parent}' to start again, or let SaveTrainingStateCallback("
            "if_other_run='set_aside') move those states out of the way. To continue that run, pass "
            f"resume_from='{path}', or reset_run_history=False to a second call of train."
        )


def run_id_in(path: Path) -> str | None:
    """Return the run of a state, complete or not; None if nothing there says it."""
    try:
        content = json.loads((path / STATE_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    found = content.get("run_id") if isinstance(content, dict) else None
    return found if isinstance(found, str) else None


def set_damaged_aside(path: Path) -> Path:
    """Give a damaged state a name under which nothing resumes from it, and return that. Raises `OSError`."""
    target = free_name(path.with_name(f"{DAMAGED}{path.name}"))
    files.rename(path, target)
    _logger.warning("'%s' is damaged, and was renamed to '%s'.", path, target)
    return target


def free_name(path: Path) -> Path:
    """Return `path`, or that with a number behind it if something stands there."""
    number = 1
    target = path
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}_{number}")
    return target


def set_other_runs_aside(folder: Path, run_id: str) -> Path | None:
    """Move the states of other runs into a folder of their own inside `folder`, and return that.

    Called by one process. Whatever is not a state of accel stays.
    """
    target = None
    for name, _ in sorted(entries_of(folder)):
        path = folder / name
        found = run_id_in(path)
        is_state = isinstance(state := examine(path), dict) or state.kind in (
            Kind.DAMAGED,
            Kind.UNKNOWN_FORMAT,
        )
        if is_state and found is not None and found != run_id:
            target = folder / f"other_run_{re.sub(r'[^0-9A-Za-z]', '_', found)[:40]}"
            files.make_folder(target)
            files.rename(path, free_name(target / name))
    return target


def remove_checkpoint(path: Path) -> None:
    """Remove a folder so that no half of it ever looks complete.

    What the disk refuses is left to the next save.
    """
    staging = path
    try:
        if not path.name.endswith(".incomplete") and path.exists():
            staging = staging_of(path)
            files.rename(path, staging)
        if staging.exists():
            files.remove_folder(staging)
    except OSError as error:
        _refused_in.add(path.parent)
        _report_once(path, str(error))


@functools.lru_cache(maxsize=1000)
def _report_once(path: Path, reason: str) -> None:
    _logger.warning("'%s' could not be removed: %s", path, reason)


def staging_of(path: Path) -> Path:
    """Return a new name beside `path` for what is being written or removed."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.incomplete")


def has_only_own_files(path: Path) -> bool:
    """Whether `path` is a folder without anything that a checkpoint does not have."""
    return path.is_dir() and all(_OWN_NAMES.fullmatch(entry.name) for entry in path.glob("*"))


def remove_leftovers(folder: Path, is_first: bool = True) -> None:
    """Remove what crashes left in `folder`: incomplete states, and replaced ones whose successor stands.

    Args:
        is_first: False if a save of this run has done it, so that only what the disk refused may be left.
    """
    if not is_first and folder not in _refused_in:
        return
    _refused_in.discard(folder)
    # Paths are made of what may be a leftover alone: a folder may hold thousands of states.
    names = [name for name, _ in entries_of(folder) if name.endswith((".incomplete", ".replaced"))]
    for name in names:
        path = folder / name
        if path in being_written:
            continue
        if name.endswith(".incomplete"):
            # Names without letters are those of earlier versions, and of others: only a state
            # is taken for one.
            was_state = any((path / own).is_file() for own in (STATE_FILE, process_file(0)))
            if has_only_own_files(path) and (was_state or _STAGING.fullmatch(name)):
                remove_checkpoint(path)
        else:
            is_own = has_only_own_files(path) or isinstance(examine(path), dict)
            if is_own and isinstance(examine(path.with_name(name.removesuffix(".replaced"))), dict):
                remove_checkpoint(path)
