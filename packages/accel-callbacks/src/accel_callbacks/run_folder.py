"""The folder of one run: whose states stand in it, which of them stay, and the run card beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_core.extending import (
    CARD_FILE,
    KnownStates,
    remove_checkpoint,
    set_other_runs_aside,
    write_card,
)

if TYPE_CHECKING:
    from accel_core import Trainer


class RunFolder:
    """A folder in which one run saves its states. The main process calls its methods."""

    def __init__(
        self, path: Path, states_to_remove: Callable[[Mapping[Path, Any]], Iterable[Path]] | None = None
    ) -> None:
        """Hold the folder.

        Args:
            states_to_remove: given the states of the run, the newest last, returns those that need not be
                kept; None keeps all.
        """
        self.path = path
        self.states_to_remove = states_to_remove
        self._known = KnownStates(path)
        self.has_card = False
        """The run card was written by this call of `train`."""
        self.is_card_old = False
        """States were saved since the run card was written."""

    def open(self, run_id: str, sets_aside: bool) -> Path | None:
        """Make sure that the folder is this run's, and return where the states of others were moved to."""
        aside = set_other_runs_aside(self.path, run_id) if sets_aside else None
        self._known.refresh()
        self._known.check(run_id)
        return aside

    def set_damaged_aside(self, updates: int) -> None:
        """Move away the damaged states of more than `updates` updates, of a run that resumes there."""
        self._known.set_damaged_aside(updates)

    def check(self, run_id: str, updates: int) -> None:
        """Raise for states of another run, or of more updates. Only what is new is read."""
        self._known.refresh()
        self._known.check(run_id, updates)

    def tidy(self, run_id: str) -> None:
        """Remove what need not be kept, now that a newer state stands."""
        if self.states_to_remove is not None:
            self._known.refresh()
            for path in self.states_to_remove(self._known.of_run(run_id)):
                remove_checkpoint(path)

    def write_card(self, trainer: Trainer) -> Path:
        """Write what is needed to repeat the run beside its states, and return where."""
        write_card(trainer, self._known)
        self.has_card = True
        return self.path / CARD_FILE
