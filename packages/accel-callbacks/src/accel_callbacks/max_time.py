"""MaxTimeCallback: an agreed stop when a run has taken long enough."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from accel_core import TrainerCallback
from accel_core.extending import check_positive, counted

if TYPE_CHECKING:
    from accel_core import Trainer


class MaxTimeCallback(TrainerCallback):
    """Ask all processes to stop once a number of minutes has passed since the run started on any of them.

    The clock starts again with each call of `train`, since the limit is that of a job: a resumed run has all
    the time again. The clock is read after updates and epochs, so leave enough time for one update, one
    evaluation and saving.
    """

    runs_in_replay = False

    def __init__(self, minutes: float) -> None:
        """Hold the limit.

        Raises:
            ConfigurationError: `minutes` is no number above 0.
        """
        self.minutes = check_positive("minutes", minutes, "Leave the callback out to set no limit.")

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        # Monotonic, since the time of day may be set while a job runs.
        self.ends_at = time.monotonic() + 60 * self.minutes

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Stop if the time is over."""
        self._stop_if_over(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Stop if the evaluation has taken the rest of the time, so that no further epoch begins."""
        self._stop_if_over(trainer)

    def _stop_if_over(self, trainer: Trainer) -> None:
        # The processes' clocks differ a little: the first one over asks, and all stop after the same update.
        if time.monotonic() >= self.ends_at:
            trainer.request_stop(f"the time limit of {counted(self.minutes, 'minutes')} is reached")
