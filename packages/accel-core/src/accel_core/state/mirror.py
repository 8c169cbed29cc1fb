"""Training states that a thread copies to a store, after they stand on this machine.

The folder of this machine is the truth. Whatever the store does, training goes on.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ..checks.address import Address
from ..errors import ConfigurationError, StoreError
from .checkpoint import examine
from .copying import SNAPSHOTS, Copying, StatesToRemove
from .mirrored import name_in_mirror
from .store import is_permanent, retried


class Mirror:
    """The copies of one run's states in a store.

    One process uses it. Its thread communicates with nobody and touches no object of the training. The newest
    state goes first. A state that the rule of keeping would remove by then is never copied.

    Between `start` and `finish` it holds a thread; else it can be copied and pickled.
    """

    def __init__(self, address: Address, states_to_remove: StatesToRemove) -> None:
        """Hold what is needed.

        Args:
            states_to_remove: is given the states of the run by the names that they had on the disk, the
                newest last, and returns which of them need not be kept.
        """
        self.address = address
        self._states_to_remove = states_to_remove
        self._copying: Copying | None = None
        self._newest: Address | None = None

    @property
    def newest(self) -> Address | None:
        """The newest state of the run that stands in the store, as far as this process knows."""
        return self._newest if self._copying is None else self._copying.newest

    def start(self, folder: Path, run_id: str, sets_aside: bool = False) -> None:
        """Look into the store, and start the thread that copies the states in `folder`.

        Raises:
            OtherRunError: it has states of another run, and `sets_aside` is false.
            ConfigurationError: nothing can be written there, and waiting does not mend it.
        """
        self.finish(0.0)
        self._newest = None
        # What a killed run had still to copy.
        shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)
        copying = self._open(run_id, sets_aside)
        try:
            retried(copying.look, f"The mirror '{self.address}' could not be reached")
        except StoreError as error:
            if error.__cause__ is not None and is_permanent(error.__cause__):
                raise ConfigurationError(
                    f"mirror is '{self.address}', where nothing can be written. {error} Correct the address, "
                    "or let this machine write there."
                ) from error
            copying.tell(error.__cause__ or error)
        self._copying = copying
        copying.thread.start()

    def _open(self, run_id: str, sets_aside: bool) -> Copying:
        """Raise `ConfigurationError` if fsspec cannot make anything of the address."""
        try:
            return retried(
                lambda: Copying(self.address, run_id, sets_aside, self._states_to_remove),
                f"mirror is '{self.address}', which could not be opened",
            )
        except StoreError as error:
            raise ConfigurationError(f"{error} Correct the address, or pass another one.") from error

    def resume(self, path: Path, updates: int) -> None:
        """Set aside what is damaged and later than the state at `path`, with which the run goes on.

        Raises:
            OtherRunError: there is a later state that is intact.
        """
        copying = self._copying
        if copying is None:
            return
        try:
            copying.mark_damaged_after(updates)
        except Exception as error:
            copying.tell(error)
        self.check(updates)
        # The machine may have gone down before it was copied.
        self.add(path)

    def check(self, updates: int) -> None:
        """Raise `OtherRunError` if the store has states of another run, or later ones of this run."""
        if self._copying is not None:
            self._copying.check(updates)

    def add(self, path: Path) -> None:
        """Let the complete state at `path` be copied. It may be removed as soon as this returns."""
        copying, state = self._copying, examine(path)
        if copying is None or not isinstance(state, dict):
            return
        try:
            copying.add(path, name_in_mirror(path), state)
        except OSError as error:
            # A full disk, for example. The next state may do better.
            copying.tell(error)

    def add_card(self, path: Path) -> None:
        """Let the run card at `path` be copied, if there is one."""
        if self._copying is not None:
            with contextlib.suppress(OSError):
                self._copying.add_card(path.read_bytes())

    def finish(self, seconds: float) -> list[str]:
        """Wait until everything is copied, at most so long, and end. Return what does not stand there."""
        copying, self._copying = self._copying, None
        if copying is None:
            return []
        try:
            return copying.finish(seconds)
        finally:
            self._newest = copying.newest
