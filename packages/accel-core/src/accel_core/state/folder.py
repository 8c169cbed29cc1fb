"""The training states inside a folder: which are complete, which is the newest or the best.

`<name>.<eight letters>.incomplete` is being written or removed; it is never read.
`<name>.replaced` was complete when a newer state took its name, and goes once that one stands.
`damaged_<name>` was found to be damaged and set aside. It is never deleted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from ..checks.address import Address
from ..errors import CheckpointError
from ..text import counted
from .checkpoint import (
    ORDER,
    Kind,
    NoState,
    TrainerState,
    examine,
    find_mismatch,
    is_sharded,
    metrics_of,
)

DAMAGED = "damaged_"

WAY_OUT = "Pass the folder in which SaveTrainingStateCallback saves, such as 'checkpoints'."
_SECONDS_UNTIL_LISTED_AGAIN = 0.02
_MOST_LISTINGS = 100

_reported: set[tuple[Path, str]] = set()
"""What this process has logged as passed over, and why."""

_logger = logging.getLogger("accel_core")

Place = TypeVar("Place")


@dataclasses.dataclass
class Listing:
    """What stands directly inside a folder."""

    complete: dict[Path, TrainerState]
    """Oldest first."""
    unusable: dict[Path, NoState]
    """What is damaged, or of another version."""
    unfinished: dict[Path, NoState]
    has_vanished: bool = False
    """Something was renamed or removed while it was looked at."""

    def report(self, again: bool = True) -> None:
        """Log what is passed over. What was set aside is known to be so by its name.

        Args:
            again: also what this process has logged before.
        """
        for path, state in {**self.unusable, **self.unfinished}.items():
            told = (path.absolute(), state.reason)
            if not path.name.startswith(DAMAGED) and (again or told not in _reported):
                _logger.warning("'%s' is skipped: it %s.", path, state.reason)
                _reported.add(told)


def list_states(folder: Path) -> Listing:
    """Examine what stands directly inside `folder`, without its files' digests.

    Another process may save and remove there meanwhile: what vanishes while it is looked at is left out,
    and if nothing complete is found the folder is listed again until it stays the same.
    """
    before = None
    for _ in range(_MOST_LISTINGS):
        names = entries_of(folder)
        listing = examine_entries(folder, names)
        if listing.complete or not names or (names == before and not listing.has_vanished):
            break
        before = names
        time.sleep(_SECONDS_UNTIL_LISTED_AGAIN)
    return listing


def examine_entries(folder: Path, entries: Iterable[tuple[str, int]]) -> Listing:
    """Examine each entry of `folder`."""
    listing = Listing({}, {}, {})
    found: dict[Path, TrainerState] = {}
    for name, _ in entries:
        path = folder / name
        inode = inode_of(path)
        state = examine(path)
        if inode is None or inode_of(path) != inode:
            # What was read may be of two states that had the same name.
            listing.has_vanished = True
        elif not isinstance(state, NoState):
            if name.startswith(DAMAGED):
                listing.unusable[path] = NoState(Kind.DAMAGED, "was set aside, since it is damaged")
            else:
                found[path] = state
        elif state.kind is Kind.UNFINISHED:
            listing.unfinished[path] = state
        elif state.kind is not Kind.FOREIGN:
            listing.unusable[path] = state

    def age(path: Path) -> tuple[object, ...]:
        progress = dict(found[path]["run_progress"])
        return *(progress[key] for key in ORDER), not path.name.endswith(".replaced"), path.name

    listing.complete = {path: found[path] for path in sorted(found, key=age)}
    return listing


def entries_of(folder: Path) -> set[tuple[str, int]]:
    """Return names and inodes of what stands inside `folder` and is no file; nothing if it is not there.

    Raises:
        CheckpointError: it is there, and cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return {(entry.name, entry.inode()) for entry in entries if not entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' could not be listed: {type(error).__name__}: {error}. "
            "Make it readable, or use another folder."
        ) from error


def inode_of(path: Path) -> int | None:
    """Return what tells a folder from another that gets its name later; None if nothing is there."""
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def complete_checkpoints(folder: str | Path) -> dict[Path, TrainerState]:
    """Return the complete states directly inside `folder`, oldest first; logs what it passes over."""
    listing = list_states(Path(folder))
    listing.report()
    return listing.complete


def newest_state(folder: Path, verify: bool) -> Path | None:
    """Return what `latest_checkpoint` does for a folder of this machine."""
    if isinstance(examine(folder), dict):
        _logger.warning(
            "'%s' is itself a training state. Pass it to resume_from without latest_checkpoint.", folder
        )
    for _ in range(_MOST_LISTINGS):
        listing = list_states(folder)
        listing.report()
        damaged, has_vanished = dict(listing.unusable), False
        for path, state in reversed(listing.complete.items()):
            reason = find_flaw_of(path, state) if verify and not is_sharded(state) else None
            if inode_of(path) is None:
                has_vanished = True
            elif reason is None:
                return path
            else:
                _logger.warning("'%s' is skipped: it %s.", path, reason)
                damaged[path] = NoState(Kind.DAMAGED, reason)
        # Else all that was complete a moment ago is gone, so that something newer stands there.
        if not has_vanished:
            break
    if damaged:
        raise_nothing_usable(folder, damaged)
    return None


def raise_nothing_usable(folder: Path | Address, damaged: Mapping[Path, NoState]) -> NoReturn:
    """Raise `CheckpointError` with what is wrong with the states of a folder or a store."""
    found = " ".join(f"'{path.name}' {state.reason}." for path, state in sorted(damaged.items())[:5])
    raise CheckpointError(
        f"'{folder}' has {counted(len(damaged), 'training states')}, and none of them can be used: {found} "
        "To start afresh, move them away or delete them, or save to another folder."
    )


def find_flaw_of(path: Path, state: TrainerState) -> str | None:
    """Return what is wrong with the files of a complete state, or why they cannot be read.

    None if nothing is.
    """
    try:
        return find_mismatch(path, state)
    except OSError as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def best_state(folder: Path, metric: str, greater_is_better: bool) -> Path | None:
    """Return what `best_checkpoint` does for a folder of this machine."""
    states = complete_checkpoints(folder)
    for path in best_first(states, metric, greater_is_better):
        reason = find_flaw_of(path, states[path])
        if reason is None:
            return path
        _logger.warning("'%s' is skipped: it %s.", path, reason)
    return None


def best_first(states: Mapping[Place, TrainerState], metric: str, greater_is_better: bool) -> list[Place]:
    """Return those of the states that have a value of `metric`, the best first and of equal ones the older.

    Args:
        states: the oldest first.
    """
    values = {place: metrics_of(state).get(metric) for place, state in states.items()}
    found = {place: value for place, value in values.items() if value is not None and value == value}
    # No nan is left, which is no best value.
    return sorted(found, key=found.__getitem__, reverse=greater_is_better)


def open_training_state(path: str | Path) -> TrainerState:
    """Return what trainer_state.json says.

    Raises `CheckpointError` if `path` is no complete state: what it is instead.
    """
    path = Path(path)
    state = examine(path)
    if not isinstance(state, NoState):
        return state
    newest = _newest(path) or _newest(path.parent)
    way_out = (
        f"Did you mean '{newest}'?"
        if newest
        else "Pass the folder of a complete training state, or None to start afresh."
    )
    raise CheckpointError(f"'{path}' {state.reason}. {way_out}")


def _newest(folder: Path) -> Path | None:
    return next(reversed(list_states(folder).complete), None)
