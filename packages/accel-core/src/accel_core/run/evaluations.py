"""What comes around an evaluation of a training run: before its first update, and after each of them."""

from __future__ import annotations

from typing import Any

from .evaluation_kind import EvaluationKind
from .run import Run
from .trainer_parts import TrainerParts


def own_sets(trainer: TrainerParts) -> Any:
    """Return what `run_eval_epoch` is given for the evaluation sets of the run.

    A single loader is passed itself, as overrides of the method expect it; None stands for all sets.
    """
    return trainer.eval_dataloader if list(trainer.eval_dataloaders) == [""] else None


def evaluate_start(trainer: TrainerParts, run: Run) -> None:
    """Evaluate before the first update of the run, or of its later stage. Every process takes part."""
    trainer.run_history.current_epoch = trainer.run_progress.epochs_completed
    trainer.run_eval_epoch(own_sets(trainer))
    trainer.run_progress.start_evaluated = True
    end_evaluation(trainer, run, EvaluationKind("eval"))
    # A callback may have asked to stop.
    trainer.agreement.collect(blocking=True)


def end_evaluation(trainer: TrainerParts, run: Run, kind: EvaluationKind) -> None:
    """Let callbacks act on an evaluation of the run, then step a scheduler that follows evaluations."""
    trainer.callbacks.on_evaluation_end(
        trainer,  # type: ignore[arg-type]
        is_intermediate=kind.is_intermediate,
        metric_prefix=kind.prefix,
    )
    # An epoch that a limit has cut is evaluated again by a run that goes on in it.
    is_stepped = run.schedule.after_evaluation and not trainer.run_progress.epoch_cut_by_limit
    if trainer.scheduler is not None and is_stepped:
        trainer.scheduler_step()
