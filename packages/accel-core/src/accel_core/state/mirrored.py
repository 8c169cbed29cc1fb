"""What stands in a mirror: training states in a store, each in a folder that is written once.

update_00001200-1f3a9c2e/   a state; `trainer_state.json` is written last and removed first, so that a folder
                            without it is none. The digits are the beginning of that file's digest: a name is
                            never used for another content, whatever a store still lists or has kept.
newest.json                 names the newest state, since some stores list a new file late
run_card.json               of the run, written after the states that it names
other_run_.../              states of other runs that were set aside
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import OtherRunError
from ..text import counted
from .checkpoint import ORDER, STATE_FILE, Kind, NoState, TrainerState, parse_state_file
from .store import Store

POINTER = "newest.json"
DAMAGED_STATE_FILE = f"damaged_{STATE_FILE}"

_PROBE = ".accel_probe"
_NAME = re.compile(r"(.+)-[0-9a-f]{8}")
_READERS = 8

_logger = logging.getLogger("accel_core.saves")


@dataclasses.dataclass
class Contents:
    """What was found in a store."""

    states: dict[str, TrainerState]
    """By the name of their folder, the oldest first."""
    unusable: dict[str, NoState]
    leftovers: list[str]
    """Names of folders that somebody has begun to write or to remove."""


def name_in_mirror(path: Path) -> str:
    """Return the name in a mirror for the complete state at `path`."""
    digest = hashlib.sha256((path / STATE_FILE).read_bytes()).hexdigest()
    # A crash between two renames leaves a state under this name on the disk.
    return f"{path.name.removesuffix('.replaced')}-{digest[:8]}"


def name_on_disk(name: str) -> str:
    """Return the name that a state had before it was mirrored."""
    found = _NAME.fullmatch(name)
    return found[1] if found is not None else name


def age(state: TrainerState) -> tuple[object, ...]:
    """Return what sorts the states of a run, the newest last."""
    progress = dict(state["run_progress"])
    return tuple(progress[key] for key in ORDER)


def list_mirrored(store: Store) -> Contents:
    """Read the `trainer_state.json` of each state. Raises what the store does."""
    names = store.folders()
    if (newest := _read_pointer(store)) is not None:
        names.add(newest)
    with ThreadPoolExecutor(_READERS, "accel-mirror") as readers:
        texts = dict(
            zip(names, readers.map(lambda name: store.read(f"{name}/{STATE_FILE}"), names), strict=True)
        )
    contents = Contents({}, {}, [])
    found: dict[str, TrainerState] = {}
    for name, text in texts.items():
        state = None if text is None else parse_state_file(text, was_state=False)
        if isinstance(state, dict):
            found[name] = state
        elif state is not None and state.kind is not Kind.FOREIGN:
            contents.unusable[name] = state
        # What this run did not write is only taken for a leftover by the form of its name.
        elif state is None and _NAME.fullmatch(name):
            contents.leftovers.append(name)
    contents.states = {name: found[name] for name in sorted(found, key=lambda name: (age(found[name]), name))}
    return contents


def _read_pointer(store: Store) -> str | None:
    try:
        content = json.loads(store.read(POINTER) or b"null")
    except ValueError:
        return None
    name = content.get("name") if isinstance(content, dict) else None
    return name if isinstance(name, str) and _NAME.fullmatch(name) and "/" not in name else None


def check_writable(store: Store) -> None:
    """Write a file and remove it, so that a wrong address is found before hours of training."""
    store.write(_PROBE, b"")
    try:
        store.remove(_PROBE)
    except PermissionError:
        _logger.info("'%s' does not allow removing files, so old states stay there.", store.address)


def upload(
    store: Store, folder: Path, name: str, state: TrainerState, sent: set[str], goes_on: Callable[[], bool]
) -> bool:
    """Copy the files of a state, and `trainer_state.json` last. Return whether it stands.

    Args:
        sent: the files that are there already; what is copied is added to it.
        goes_on: asked before each file.
    """
    for relative in [*sorted(set(state["files"]) - sent), STATE_FILE]:
        if not goes_on():
            return False
        if relative == STATE_FILE:
            store.put_whole(folder / relative, f"{name}/{relative}")
        else:
            store.put(folder / relative, f"{name}/{relative}")
            sent.add(relative)
    return True


def point_to(store: Store, name: str) -> None:
    """Note in the store which state is the newest."""
    store.write(POINTER, json.dumps({"name": name}).encode())


def remove_state(store: Store, name: str) -> None:
    """Remove a state so that no half of it ever looks complete."""
    store.remove(f"{name}/{STATE_FILE}")
    store.remove_folder(name)


def remove_leftovers(store: Store, names: Iterable[str]) -> None:
    """Remove what crashes have left. What was found to be damaged stays."""
    for name in names:
        if not is_marked(store, name):
            store.remove_folder(name)


def set_aside(store: Store, states: Mapping[str, TrainerState]) -> None:
    """Move states of other runs into folders of their own, where nothing finds them."""
    for name, state in states.items():
        target = f"other_run_{re.sub(r'[^0-9A-Za-z]', '_', state['run_id'])[:40]}/{name}"
        for relative in [*sorted(state["files"]), STATE_FILE]:
            store.copy(f"{name}/{relative}", f"{target}/{relative}")
        remove_state(store, name)


def refuse_other_runs(store: Store, states: Mapping[str, TrainerState], run_id: str) -> None:
    """Raise `OtherRunError` if a state is of another run."""
    for name, state in states.items():
        if state["run_id"] != run_id:
            raise OtherRunError(
                f"The mirror '{store.address}' has '{name}', a state of the run {state['run_id']!r}, "
                f"but this is the run {run_id!r}. Pass another mirror, remove those states, let "
                "if_other_run='set_aside' move them out of the way, or continue with that run by "
                f"resume_from=latest_checkpoint('{store.address}', cache=...)."
            )


def refuse_later_states(store: Store, states: Mapping[str, TrainerState], updates: int) -> None:
    """Raise `OtherRunError` if a state of this run has more updates than the run has made."""
    for name, state in states.items():
        found = state["run_progress"]["updates_completed"]
        if found > updates:
            raise OtherRunError(
                f"The mirror '{store.address}' has '{name}' with {counted(found, 'updates')} of this run, "
                f"which has gone on from {updates}: latest_checkpoint would choose what was given up. Remove "
                "it there, pass another mirror, or continue from it by "
                f"resume_from=latest_checkpoint('{store.address}', cache=...)."
            )


def is_marked(store: Store, name: str) -> bool:
    """Whether `mark_damaged` has let this state be none. Without a name the store is the state itself."""
    return store.read(f"{name}/{DAMAGED_STATE_FILE}".lstrip("/")) is not None


def mark_damaged(store: Store, name: str, flaw: str) -> None:
    """Let a state in the store be none any more. Its files stay."""
    store.copy(f"{name}/{STATE_FILE}", f"{name}/{DAMAGED_STATE_FILE}")
    store.remove(f"{name}/{STATE_FILE}")
    _logger.warning("'%s/%s' %s. No run will resume from it.", store.address, name, flaw)
