"""What is checked before `train`, `evaluate` and `predict` change anything."""

from __future__ import annotations

import warnings
from typing import Any

from ..checks import arguments as checks
from ..errors import AccelWarning
from .train_arguments import TrainArguments
from .trainer_parts import TrainerParts


def check_can_run(
    trainer: TrainerParts, method: str, calculation: str | None = None, base: type | None = None
) -> None:
    """Raise inside another run, or if the loss function is missing that `calculation` needs.

    Args:
        method: what was called.
        calculation: the step that `method` makes, or None if it computes no loss.
        base: `Trainer`, by which is known whether the step is the user's own.
    """
    is_own = calculation is None or getattr(type(trainer), calculation) is not getattr(base, calculation)
    is_missing = trainer.loss_func is None and not is_own
    checks.check_can_run(method, trainer._run is not None, calculation if is_missing else None)
    checks.check_attributes(vars(trainer), trainer.model)


def check_training(trainer: TrainerParts, given: dict[str, Any], base: type) -> TrainArguments:
    """Return the arguments of `train` that were `given`, checked.

    Raises:
        ConfigurationError: one of them, or a part of the trainer, cannot be used.
    """
    check_can_run(trainer, "train", "calculate_train_batch_loss", base)
    if given["eval_dataset"] is not None:
        check_can_run(trainer, "train", "calculate_eval_batch_loss", base)
    step = "calculate_train_batch_loss"
    if hasattr(trainer.model, "training_step") and getattr(type(trainer), step) is getattr(base, step):
        warnings.warn(
            f"model is a {type(trainer.model).__name__} with a training_step, which accel never calls: the "
            "loss is loss_func(model(inputs), targets). To use training_step, override "
            "calculate_train_batch_loss and call it there.",
            AccelWarning,
            stacklevel=4,  # The line that calls `train`.
        )
    arguments = TrainArguments(**given)
    # An engine that steps in backward has exchanged what the optimizer holds when it was prepared.
    if trainer.engine.prepared is None or not trainer.engine.steps_in_backward:
        checks.check_trainable(trainer.model, trainer.optimizer, vars(trainer))
    return arguments
