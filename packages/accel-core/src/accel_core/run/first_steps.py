"""What is looked at once a run: the first output of each step."""

from __future__ import annotations

from typing import Any

from .batch_output import check_batch_output
from .run import Run
from .trainer_parts import TrainerParts


def check_first_output(trainer: TrainerParts, run: Run, output: Any, method: str, batch: Any) -> None:
    """Raise unless the `output` of `method` for `batch` has all that is needed. It waits for the device.

    Raises:
        ConfigurationError: something is missing or of the wrong kind.
    """
    is_training = method == "calculate_train_batch_loss"
    is_fresh = is_training and trainer.run_progress.updates_completed == 0
    check_batch_output(output, method, needs_gradient=is_training, is_first=is_fresh)
    run.unchecked_steps.discard(method)
