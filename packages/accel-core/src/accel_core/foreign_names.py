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


FOREIGN_STEPS = {
    "training_step": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "predict_step": "calculate_predictions",
    "compute_loss": "calculate_train_batch_loss",
    "one_batch": "run_train_step",
    "train_step": "calculate_train_batch_loss",
    "test_step": "calculate_eval_batch_loss",
}
"""Methods of Lightning, transformers, fastai and Keras. They may also be helpers of accel's method."""


FOREIGN_HOOKS = {
    "setup": "on_training_run_start",
    "teardown": "on_training_run_end",
    "before_fit": "on_training_run_start",
    "after_fit": "on_training_run_end",
    "before_epoch": "on_train_epoch_start",
    "after_epoch": "on_training_run_epoch_end",
    "before_batch": "on_train_step_start",
    "after_batch": "on_train_step_end",
    "after_loss": "on_train_step_end",
    "before_step": "on_optimizer_step_start",
    "after_step": "on_optimizer_step_end",
    "before_validate": "on_eval_epoch_start",
    "after_validate": "on_eval_epoch_end",
}
"""Methods of callbacks of fastai and Lightning. They may also be helpers of an event of accel."""


def check_callback_class(callback_class: type, base: type) -> None:
    """Raise if a callback has a hook of another library and no event of accel, so nothing is called."""
    own = {name for parent in callback_class.__mro__ if not issubclass(base, parent) for name in vars(parent)}
    if any(name.startswith("on_") for name in own):
        return
    for name, here in FOREIGN_HOOKS.items():
        if name in own:
            raise ConfigurationError(
                f"{callback_class.__name__}.{name} is a hook of another library, which accel never calls. "
                f"Override {here} instead; docs/coming_from_other_libraries.md has more names."
            )


def check_trainer_class(trainer_class: type) -> None:
    """Raise if a subclass of `Trainer` has a method that another library calls and this one does not."""
    for name, here in FOREIGN_METHODS.items():
        # Not only in the class itself: a mixin may bring the method.
        if hasattr(trainer_class, name):
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is a method that pytorch-accelerated calls, but accel "
                f"never does. Override {here} instead; docs/migration.md has all names."
            )
    for name, here in FOREIGN_STEPS.items():
        # If the user overrides accel's method too, the other may be a helper that it calls.
        users = [cls for cls in trainer_class.__mro__ if not cls.__module__.startswith("accel_")]
        is_overridden = any(here in vars(cls) for cls in users)
        if hasattr(trainer_class, name) and not is_overridden:
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is a method that another library calls, but accel never "
                f"does. Override {here} instead; docs/coming_from_other_libraries.md has more names."
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
