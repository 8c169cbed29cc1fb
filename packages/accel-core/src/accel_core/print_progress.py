"""PrintProgressCallback: a line where an epoch begins and where the run ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .callback import TrainerCallback

if TYPE_CHECKING:
    from .callback import Trainer


class PrintProgressCallback(TrainerCallback):
    """Print on the main process which epoch begins and how the run ended."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Say which epoch begins."""
        num_epochs = trainer.run_config.num_epochs
        of = f" of {num_epochs}" if num_epochs is not None else ""
        trainer.print(f"Epoch {trainer.run_progress.current_epoch}{of}")

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Say how the run ended."""
        progress = trainer.run_progress
        reason = f": {trainer.stop_reason}" if trainer.stop_reason else ""
        trainer.print(
            f"Training ended after {progress.updates_completed} updates and {progress.epochs_completed} complete epochs{reason}"
        )
