"""PrintProgressCallback prints a line when an epoch begins and when the run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..screen import columns_of, wrap
from .callback import TrainerCallback

if TYPE_CHECKING:
    from ..trainer import Trainer


class PrintProgressCallback(TrainerCallback):
    """Print on the main process which epoch begins and how the run ended."""

    runs_in_replay = False

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Print which epoch begins."""
        num_epochs, progress = trainer.run_config.num_epochs, trainer.run_progress
        # Epochs are counted through all stages of a run, and its limit is that of the call.
        of = "" if num_epochs is None else f"/{progress.epochs_before_stage + num_epochs}"
        trainer.print(f"Epoch {progress.current_epoch}{of}")

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Print how the run ended."""
        trainer.print(wrap(how_it_ended(trainer), columns_of()))


def how_it_ended(trainer: Trainer) -> str:
    """Return after how many updates and epochs training ended, and why if it was stopped."""
    updates = _counted(trainer.run_progress.updates_completed, "update")
    epochs = _counted(trainer.run_progress.epochs_completed, "complete epoch")
    reason = f": {trainer.stop_reason}" if trainer.stop_reason else ""
    return f"Training ended after {updates} and {epochs}{reason}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
