"""The thread of a mirror, and what it knows of the store.

It communicates with nobody and touches no object of the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from ..checks.address import Address
from ..errors import OtherRunError
from ..notices import logger_of
from .cards import CARD_FILE
from .checkpoint import STATE_FILE, TrainerState, metrics_of
from .housekeeping import Facts
from .mirrored import (
    age,
    check_writable,
    list_mirrored,
    mark_damaged,
    name_on_disk,
    point_to,
    refuse_later_states,
    refuse_other_runs,
    remove_leftovers,
    remove_state,
    set_aside,
    upload,
)
from .store import Store
from .transfer import find_flaw_in_store

SNAPSHOTS = ".accel_mirror"
"""Folder beside the states, with second names of the files that are still to be copied."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries. Each pause is twice the one before."""

StatesToRemove = Callable[[Mapping[str, Facts]], Iterable[str]]


@dataclasses.dataclass(eq=False)
class Upload:
    """A state that is to be copied."""

    name: str
    folder: Path
    state: TrainerState
    sent: set[str] = dataclasses.field(default_factory=set)


class Copying:
    """The thread of a mirror during one call of `train`, and what it knows."""

    def __init__(
        self, address: Address, run_id: str, sets_aside: bool, states_to_remove: StatesToRemove
    ) -> None:
        self.store = Store(address)
        self.newest: Address | None = None
        """The newest state of the run that stands in the store."""
        self.states_to_remove = states_to_remove
        self.run_id = run_id
        self.sets_aside = sets_aside
        self.known: dict[str, TrainerState] | None = None
        """The states of this run in the store; None until it has answered."""
        self.leftovers: list[str] = []
        self.pending: list[Upload] = []
        """Oldest first. The thread takes what is last."""
        self.card: bytes | None = None
        """The newest run card, which is to be copied once no state is."""
        self.refusal: OtherRunError | None = None
        self.current: Upload | bytes | None = None
        """What is on its way. It need not be pending any more, if newer states have come."""
        self.is_closing = self.has_given_up = self.has_told = False
        self.changed = threading.Condition()
        # A daemon: Python may end even if a store never answers. What it leaves there is no state.
        self.thread = threading.Thread(target=self._run, name="accel-mirror", daemon=True)

    def look(self) -> None:
        """Find out what stands in the store, and whether this run may write there."""
        check_writable(self.store)
        contents = list_mirrored(self.store)
        own = {name: state for name, state in contents.states.items() if state["run_id"] == self.run_id}
        if self.sets_aside:
            set_aside(self.store, {name: state for name, state in contents.states.items() if name not in own})
        else:
            refuse_other_runs(self.store, contents.states, self.run_id)
        self.known, self.leftovers = own, contents.leftovers
        if own:
            self.newest = self.store.address / next(reversed(own))

    def check(self, updates: int) -> None:
        """Raise what the thread has found, or for later states of this run."""
        if self.refusal is not None:
            raise self.refusal
        with self.changed:
            refuse_later_states(self.store, dict(self.known or {}), updates)

    def mark_damaged_after(self, updates: int) -> None:
        """Let later states be none that are damaged, since the run went on from before them."""
        for name, state in list((self.known or {}).items()):
            is_later = state["run_progress"]["updates_completed"] > updates
            if is_later and (flaw := find_flaw_in_store(self.store, name, state)) is not None:
                mark_damaged(self.store, name, flaw)
                with self.changed:
                    (self.known or {}).pop(name, None)

    def add(self, path: Path, name: str, state: TrainerState) -> None:
        """Let a state be copied, under `name`."""
        with self.changed:
            if name in (self.known or {}) or any(item.name == name for item in self.pending):
                return
        folder = path.absolute().parent / SNAPSHOTS / name
        _link(path, folder, [*state["files"], STATE_FILE])
        with self.changed:
            self.pending.append(Upload(name, folder, state))
            every = {**(self.known or {}), **{item.name: item.state for item in self.pending}}
            not_wanted = set(self._superseded(every))
            for item in [item for item in self.pending[:-1] if item.name in not_wanted]:
                self.pending.remove(item)
                if item is not self.current:
                    _remove(item.folder)
                logger_of("saves").info(
                    "'%s' is not copied to the mirror, since newer states were saved.", item.name
                )
            self.changed.notify_all()

    def add_card(self, card: bytes) -> None:
        """Let a run card be copied after the states that it names."""
        with self.changed:
            if self.refusal is None:
                self.card = card
                self.changed.notify_all()

    def finish(self, seconds: float) -> list[str]:
        """Wait for what is still to be copied, end, and return the names of what was not."""
        try:
            with self.changed:
                self.is_closing = True
                self.changed.notify_all()
                if not self._is_through() and seconds > 0:
                    logger_of("saves").info(
                        "Waiting for the mirror '%s', at most %g seconds.", self.store.address, seconds
                    )
                    self.changed.wait_for(self._is_through, seconds)
        finally:
            # Also after Ctrl-C: whoever does not want to wait goes on without.
            with self.changed:
                self.has_given_up = True
                lacking, self.pending = self.pending, []
                lacks_card, self.card = self.card is not None, None
                hangs = self.current is not None
                self.changed.notify_all()
            for item in lacking:
                _remove(item.folder)
        if not hangs:
            self.thread.join()
        return [item.name for item in lacking] or [CARD_FILE] * lacks_card

    def _is_through(self) -> bool:
        return self._wanted() is None and self.current is None

    def _wanted(self) -> Upload | bytes | None:
        """Return what is to be copied next."""
        return self.pending[-1] if self.pending else self.card

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while (item := self._next()) is not None:
            try:
                if isinstance(item, Upload):
                    self._copy(item)
                else:
                    self._copy_card(item)
                pause = FIRST_PAUSE
            except OtherRunError as error:
                self._refuse(error)
            except Exception as error:
                if not self.has_given_up:
                    self.tell(error)
                with self.changed:
                    # A newer state is tried at once, since the older one may be gone.
                    self.changed.wait_for(partial(self._has_changed, item), pause)
                    is_given_up = item not in self.pending
                if isinstance(item, Upload) and is_given_up:
                    _remove(item.folder)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _has_changed(self, item: Upload | bytes) -> bool:
        return self.has_given_up or self._wanted() is not item

    def _next(self) -> Upload | bytes | None:
        with self.changed:
            self.current = None
            self.changed.notify_all()
            self.changed.wait_for(lambda: self._wanted() or self.is_closing or self.has_given_up)
            if not self.has_given_up:
                self.current = self._wanted()
            return self.current

    def _copy(self, item: Upload) -> None:
        """Copy a state, and remove what need not be kept once it stands."""
        if self.known is None:
            self.look()
            refuse_later_states(self.store, self.known or {}, item.state["run_progress"]["updates_completed"])
        known = self.known if self.known is not None else {}
        if not upload(
            self.store, item.folder, item.name, item.state, item.sent, lambda: not self.has_given_up
        ):
            return
        with self.changed:
            known[item.name] = item.state
            newest = max(known, key=lambda name: age(known[name]))
        self.newest = self.store.address / newest
        logger_of("saves").info("'%s' was copied to the mirror '%s'.", item.name, self.store.address)
        point_to(self.store, newest)
        with self.changed:
            if item in self.pending:
                self.pending.remove(item)
            unwanted = self._superseded(known)
        _remove(item.folder)
        for name in unwanted:
            remove_state(self.store, name)
            with self.changed:
                known.pop(name)
        # A run that is repeated to the bit gives a state the name of what it had left half written.
        with self.changed:
            waiting = {item.name for item in self.pending}
            leftovers = set(self.leftovers) - waiting - set(known)
            # Of those that wait, some may be superseded before they are copied.
            self.leftovers = [name for name in self.leftovers if name in waiting]
        remove_leftovers(self.store, leftovers)

    def _copy_card(self, card: bytes) -> None:
        self.store.write(CARD_FILE, card)
        with self.changed:
            # A newer one may have come.
            if self.card is card:
                self.card = None

    def _superseded(self, states: Mapping[str, TrainerState]) -> list[str]:
        """Return the names of the states that need not be kept."""
        newest: dict[str, str] = {}
        unwanted = []
        for name in sorted(states, key=lambda name: age(states[name])):
            on_disk = name_on_disk(name)
            # It was saved again, at a later moment of the same update.
            if on_disk in newest:
                unwanted.append(newest.pop(on_disk))
            newest[on_disk] = name
        facts = {
            on_disk: Facts(self.run_id, dict(states[name]["run_progress"]), metrics_of(states[name]), None)
            for on_disk, name in newest.items()
        }
        return [*unwanted, *(newest[on_disk] for on_disk in self.states_to_remove(facts))]

    def _refuse(self, error: OtherRunError) -> None:
        with self.changed:
            self.refusal = error
            for item in self.pending:
                _remove(item.folder)
            self.pending, self.card = [], None
            self.changed.notify_all()

    def tell(self, error: BaseException) -> None:
        """Log once that the store fails, and that training goes on."""
        if not self.has_told:
            self.has_told = True
            logger_of("saves").warning(
                "The mirror '%s' could not be written (%s: %s). Training continues, and accel tries again.",
                self.store.address,
                type(error).__name__,
                str(error).rstrip(". "),
            )


def _link(path: Path, folder: Path, names: Iterable[str]) -> None:
    """Give the files of a state second names in `folder`, so that they outlive what is done to the state."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path / name, target)
        # Some disks have no second names.
        except OSError:
            shutil.copyfile(path / name, target)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
