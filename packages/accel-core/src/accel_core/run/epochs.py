"""Begins an epoch of training, from its first sample or from where it goes on."""

from __future__ import annotations

from ..data.loader import ShardedDataLoader
from .loss_tracker import MeanTrackers
from .run import Run
from .trainer_parts import TrainerParts


def start_train_epoch(trainer: TrainerParts, run: Run, loader: ShardedDataLoader) -> None:
    """Go to the position in the data where the epoch begins, or goes on."""
    progress = trainer.run_progress
    # An epoch that is resumed goes on with its sums.
    if progress.updates_completed_in_epoch == 0:
        trainer.train_loss.reset()
        run.train_logs = MeanTrackers(trainer.device)
    trainer.run_history.current_epoch = progress.current_epoch
    loader.begin_epoch(progress.order_epoch, progress.samples_completed_in_epoch, loader.max_steps)
