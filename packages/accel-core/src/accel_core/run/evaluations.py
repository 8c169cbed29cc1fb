"""What comes around an evaluation of a training run: before its first update, and after each of them."""

from __future__ import annotations

from typing import Any

from . import preparing
from .evaluation_kind import EvaluationKind
from .run import Run
from .train_arguments import named_evaluations
from .trainer_parts import TrainerParts


def own_sets(trainer: TrainerParts) -> Any:
    """Return what `run_eval_epoch` is given for the evaluation sets of the run.

    A single loader is passed itself, as overrides of the method expect it; None stands for all sets.
    """
    return trainer.eval_dataloader if list(trainer.eval_dataloaders) == [""] else None


def evaluate_start(trainer: TrainerParts, run: Run) -> None:
    """Evaluate before the first update of the run, or of its later stage. Every process takes part."""
    progress = trainer.run_progress
    trainer.run_history.current_epoch = progress.epochs_completed
    run.is_evaluating_start = True
    trainer.run_eval_epoch(own_sets(trainer))
    run.is_evaluating_start = False
    progress.start_evaluated, progress.eval_sets_completed = True, 0
    end_evaluation(trainer, run, EvaluationKind("eval"))
    # A callback may have asked to stop.
    trainer.agreement.collect(blocking=True)


def end_evaluation(
    trainer: TrainerParts, run: Run, kind: EvaluationKind, sets: dict[str, Any] | None = None
) -> None:
    """Let callbacks act on an evaluation of the run, then step a scheduler that follows evaluations.

    Args:
        sets: on which it was; None for those of the run.
    """
    run.evaluation_ended_on = sets
    # An epoch that a limit has cut is evaluated again by a run that goes on in it.
    is_stepped = run.schedule.after_evaluation and not trainer.run_progress.epoch_cut_by_limit
    # A state that a callback saves now is from before the step.
    trainer.run_progress.evaluation_step_due = trainer.scheduler is not None and is_stepped
    try:
        trainer.callbacks.on_evaluation_end(
            trainer,  # type: ignore[arg-type]
            is_intermediate=kind.is_intermediate,
            metric_prefix=kind.prefix,
        )
    finally:
        run.evaluation_ended_on = None
    step_if_due(trainer)


def step_if_due(trainer: TrainerParts) -> None:
    """Step a scheduler that follows evaluations by the one that has ended."""
    if trainer.run_progress.evaluation_step_due:
        trainer.run_progress.evaluation_step_due = False
        trainer.scheduler_step()


def evaluate(
    trainer: TrainerParts,
    dataset: Any,
    batch_size: Any,
    dataloader_kwargs: Any,
    collate_fn: Any,
    data_is_sharded: bool,
) -> dict[str, float]:
    """Return what `Trainer.evaluate` promises. Every process takes part."""
    own_collate_fn = trainer.collate_fn if dataset is None and collate_fn is None else collate_fn
    data_is_sharded |= dataset is None and getattr(trainer.eval_dataloader, "data_is_sharded", False)
    dataset = trainer.eval_dataset if dataset is None else dataset
    arguments = named_evaluations(dataset, batch_size, dataloader_kwargs, collate_fn, data_is_sharded)
    with preparing.running(trainer, Run(trainer.engine)) as run:
        sets = preparing.begin_evaluation(trainer, run, trainer._training_run, arguments, own_collate_fn)
        num_records = len(trainer.run_history.get_records())
        trainer.evaluation_run_start()
        trainer.callbacks.on_evaluation_run_start(trainer)  # type: ignore[arg-type]
        trainer.run_eval_epoch(sets[""] if list(sets) == [""] else sets, metric_prefix="evaluation")
        trainer.evaluation_run_end()
        trainer.callbacks.on_evaluation_run_end(trainer)  # type: ignore[arg-type]
        records = trainer.run_history.get_records()[num_records:]
    return {record["name"]: record["value"] for record in records}
