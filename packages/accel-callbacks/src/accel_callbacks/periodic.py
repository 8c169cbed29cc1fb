"""Every n epochs, updates or minutes: the one notion of it that all periodic callbacks share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from accel_core.extending import check_positive, check_whole_number

if TYPE_CHECKING:
    from accel_core import Trainer, TrainerCallback


class Periodic:
    """Tells when something is due that happens every n epochs, updates or minutes.

    Several of them may be given.

    Epochs and updates are counted from the beginning of the run, so a resumed run keeps the rhythm.
    Minutes are counted by each process from the start, or from the last time that anything was due; as soon
    as they have passed on one process, it is due on all of them after the same update.
    """

    def __init__(
        self,
        name: str,
        epochs: int | None = None,
        updates: int | None = None,
        minutes: float | None = None,
    ) -> None:
        """Hold the periods.

        Args:
            name: how the arguments of the callback begin, for errors: `"save"` for `save_every_n_epochs`.

        Raises:
            ConfigurationError: a period is not above 0.
        """
        way_out = "Use None where this is not wanted."
        self.epochs = check_whole_number(f"{name}_every_n_epochs", epochs, way_out, optional=True)
        self.updates = check_whole_number(f"{name}_every_n_updates", updates, way_out, optional=True)
        self.minutes = check_positive(f"{name}_every_n_minutes", minutes, way_out, optional=True)
        self._topic = ""
        self._last_time = 0.0

    def start(self, trainer: Trainer, callback: TrainerCallback) -> None:
        """Begin to count minutes. Call it in `on_training_run_start` of `callback`, on every process."""
        self._topic = next(
            f"minutes of {name}" for name, listed in trainer.callbacks.named() if listed is callback
        )
        self._last_time = time.monotonic()
        if self.minutes is not None:
            trainer.agreement.register(self._topic)

    def is_due_after_update(self, trainer: Trainer) -> bool:
        """Whether it is due now, by updates or minutes.

        Call it in every `on_optimizer_step_end`, on every process.
        """
        is_due = self.updates is not None and trainer.run_progress.updates_completed % self.updates == 0
        if self.minutes is not None:
            is_due = is_due or self._topic in trainer.agreement.agreed
            if is_due:
                self._last_time = time.monotonic()
            elif time.monotonic() - self._last_time >= 60 * self.minutes:
                # The others read it with the word on the next update.
                trainer.agreement.flag(self._topic)
        return is_due

    def is_due_after_epoch(self, trainer: Trainer) -> bool:
        """Whether it is due now, by epochs.

        Call it in `on_training_run_epoch_end`; an epoch that a limit cut short is none.
        """
        progress = trainer.run_progress
        is_whole = progress.updates_completed_in_epoch == 0
        return self.epochs is not None and is_whole and progress.epochs_completed % self.epochs == 0
