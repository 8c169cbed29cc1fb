"""Begins an epoch of training, from its first sample or from where it goes on, and completes it."""

from __future__ import annotations

from ..data.loader import ShardedDataLoader
from .evaluation_kind import EvaluationKind
from .evaluations import end_evaluation
from .loss_tracker import MeanTrackers
from .run import Run
from .trainer_parts import TrainerParts


def start_train_epoch(trainer: TrainerParts, run: Run, loader: ShardedDataLoader) -> None:
    """Go to the position in the data where the epoch begins, or goes on."""
    progress = trainer.run_progress
    # An epoch that is resumed continues with its sums.
    if progress.updates_completed_in_epoch == 0:
        trainer.train_loss.reset()
        run.train_logs = MeanTrackers(trainer.device)
    trainer.run_history.current_epoch = progress.current_epoch
    loader.begin_epoch(progress.order_epoch, progress.samples_completed_in_epoch, loader.max_steps)


def complete_epoch(trainer: TrainerParts, run: Run) -> None:
    """Count the epoch if the data is through; a run may have reached its limit before."""
    trainer.run_progress.run_completed = trainer.run_progress.epoch_cut_by_limit
    progress = trainer.run_progress
    if progress.eval_epoch_completed and not progress.evaluation_told:
        # A run that goes on from a state of that moment does not repeat what callbacks have recorded.
        progress.evaluation_told = True
        end_evaluation(trainer, run, EvaluationKind("eval"))
    if not trainer.run_progress.epoch_cut_by_limit:  # A higher limit lets a resumed run go on in it.
        if trainer.scheduler is not None and run.schedule.after_epoch:
            trainer.scheduler_step()
        trainer.run_progress.complete_epoch()
    trainer.training_run_epoch_end()
    trainer.callbacks.on_training_run_epoch_end(trainer)  # type: ignore[arg-type]
    trainer.agreement.collect(blocking=True)  # A stop asked for in the event holds before the next epoch.
