"""What is looked at once a run: which steps there are, and the first output of each."""

from __future__ import annotations

from typing import Any

from .batch_output import check_batch_output
from .run import Run
from .trainer_parts import TrainerParts


def report_evaluation_step(trainer: TrainerParts) -> None:
    """Print a sentence if the step of training is the user's own, and evaluations use one that knows nothing of it.

    That may be right: what regularises training, such as mixing images, must not leak into an evaluation.
    """
    kinds = type(trainer).__mro__
    train, evaluation = (
        next(index for index, kind in enumerate(kinds) if name in vars(kind))
        for name in ("calculate_train_batch_loss", "calculate_eval_batch_loss")
    )
    if train < evaluation:
        trainer.print(
            f"{kinds[train].__name__} overrides calculate_train_batch_loss, but evaluations use the plain "
            f"calculate_eval_batch_loss of {kinds[evaluation].__name__}. Override that one too if they should differ: "
            "return self.calculate_train_batch_loss(batch) evaluates as you train."
        )


def check_first_output(trainer: TrainerParts, run: Run, output: Any, method: str, batch: Any) -> None:
    """Raise unless the `output` of `method` for `batch` has all that is needed. It waits for the device.

    Raises:
        ConfigurationError: something is missing or of the wrong kind.
    """
    is_training = method == "calculate_train_batch_loss"
    is_fresh = is_training and trainer.run_progress.updates_completed == 0
    check_batch_output(output, method, needs_gradient=is_training, is_first=is_fresh)
    run.unchecked_steps.discard(method)
