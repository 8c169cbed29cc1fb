"""Lists names of other libraries and of earlier versions, and what to use here.

Without this list a class that was written for another library would be ignored silently.
"""

from __future__ import annotations

import warnings
from typing import Any

from .errors import AccelWarning, ConfigurationError

FOREIGN_EVENTS = {
    "on_stop_training_error": "on_training_run_end, and read trainer.stop_reason",
    "on_fit_start": "on_training_run_start",
    "on_train_start": "on_training_run_start",
    "on_fit_end": "on_training_run_end",
    "on_train_end": "on_training_run_end",
    "on_train_begin": "on_training_run_start",
    "on_epoch_begin": "on_train_epoch_start",
    "on_epoch_end": "on_training_run_epoch_end",
    "on_train_batch_start": "on_train_step_start",
    "on_train_batch_end": "on_train_step_end",
    "on_validation_start": "on_eval_epoch_start",
    "on_validation_epoch_start": "on_eval_epoch_start",
    "on_validation_batch_start": "on_eval_step_start",
    "on_validation_batch_end": "on_eval_step_end",
    "on_validation_epoch_end": "on_eval_epoch_end",
    "on_validation_end": "on_eval_epoch_end",
    "on_before_optimizer_step": "on_optimizer_step_start",
    "on_step_end": "on_optimizer_step_end",
    "on_save_checkpoint": "state_dict",
    "on_load_checkpoint": "load_state_dict",
    "on_evaluate": "on_eval_epoch_end",
}
"""Names of pytorch-accelerated, Lightning and transformers, and what to use here."""


FOREIGN_METHODS = {
    "_create_accelerator": "create_accelerator",
    "_create_callback_handler": "the argument callbacks, and trainer.callbacks",
    "_prepare_model_optimizer_and_dataloaders": "prepare",
    "_create_run_config": "create_run_config",
    "_run_training": "run_training",
    "_run_evaluation": "evaluate",
    "_run_train_epoch": "run_train_epoch",
    "_run_eval_epoch": "run_eval_epoch",
    "_perform_forward_and_backward_passes": "run_train_step",
    "_clip_gradients": "clip_gradients",
    "_update_loss_tracker": "calculate_train_batch_loss, and return the loss to track",
    "_add_epoch_loss_to_run_history": "train_epoch_end or eval_epoch_end",
}
"""Methods of pytorch-accelerated's `Trainer` that its users override."""


def check_trainer_class(trainer_class: type) -> None:
    """Raise if a subclass of `Trainer` has a method that another library calls and this one does not."""
    for name, here in FOREIGN_METHODS.items():
        # Not only in the class itself: a mixin may bring the method.
        if hasattr(trainer_class, name):
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is a method that pytorch-accelerated calls, but accel "
                f"never does. Override {here} instead; docs/migration.md has all names."
            )


def take_old_name(method: str, name: str, value: Any, old_name: str, old_value: Any) -> Any:
    """Return `value`, or `old_value` with a warning if the argument was given by its name of before."""
    if old_value is None:
        return value
    warnings.warn(
        f"{method} was called with {old_name}, which is called {name} now. Pass {name}=... instead.",
        AccelWarning,
        stacklevel=3,
    )
    return old_value
