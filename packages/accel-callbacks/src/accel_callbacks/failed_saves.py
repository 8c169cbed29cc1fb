"""Saves that fail: how many in a row, and when the next one is tried."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from accel_core import AccelWarning, CheckpointError

if TYPE_CHECKING:
    from accel_core import Trainer

MOST_FAILURES = 5
"""Saves that fail in a row, after which also on_error="retry" ends the run."""


class FailedSaves:
    """Counts the saves that have failed since the last one that has not."""

    def __init__(self) -> None:
        self.number = 0
        self.retry_at = 0
        """The update after which a failed save is tried again."""

    def add(self, trainer: Trainer, error: CheckpointError, is_tried_again: bool) -> None:
        """Raise, or let the save be tried again. The error is the same on every process."""
        self.number += 1
        if not is_tried_again:
            raise error
        if self.number >= MOST_FAILURES:
            error.add_note(f"{self.number} saves in a row have failed, so on_error='retry' ends the run.")
            raise error
        # 1, 2, 4 and 8 updates.
        self.retry_at = trainer.run_progress.updates_completed + 2 ** (self.number - 1)
        if self.number == 1 and trainer.is_main_process:
            warnings.warn(
                f"{error} Training continues, and the save is tried again (on_error='retry').", AccelWarning
            )
