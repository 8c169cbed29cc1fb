"""What is looked at once a run: which steps there are, and the first output of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..data.content import digest_of
from ..data.devices import move_to_device
from ..errors import ConfigurationError
from ..notices import notify
from ..processes.collectives import all_gather_object
from ..processes.group import DataGroup
from .batch_output import check_batch_output
from .run import Run
from .silent_mistakes import warn_of_batch, warn_of_unreached
from .trainer_parts import TrainerParts


def report_evaluation_step(trainer: TrainerParts) -> None:
    """Print a sentence if only the training step is the user's own, not that of evaluations.

    That may be right: what regularises training, such as mixing images, must not leak into an evaluation.
    """
    kinds = type(trainer).__mro__
    train, evaluation = (
        next(index for index, kind in enumerate(kinds) if name in vars(kind))
        for name in ("calculate_train_batch_loss", "calculate_eval_batch_loss")
    )
    if train < evaluation:
        notify(
            trainer,
            f"{kinds[train].__name__} overrides calculate_train_batch_loss, but evaluations use the plain "
            f"calculate_eval_batch_loss of {kinds[evaluation].__name__}. If evaluations should use your "
            "step, override that method too: return self.calculate_train_batch_loss(batch).",
        )


def check_first_output(trainer: TrainerParts, run: Run, output: Any, method: str, batch: Any) -> None:
    """Raise unless the `output` of `method` for `batch` has all that is needed. It waits for the device.

    Raises:
        ConfigurationError: something is missing or of the wrong kind.
    """
    is_training = method == "calculate_train_batch_loss"
    is_fresh = is_training and trainer.run_progress.updates_completed == 0
    check_same_batch(run.engine.group, batch)
    check_batch_output(output, method, needs_gradient=is_training, is_first=is_fresh)
    run.unchecked_steps.discard(method)
    if len(run.unchecked_steps) == 1:
        # The first of the two steps that a run may make.
        definer = next(kind for kind in type(trainer).__mro__ if method in vars(kind))
        warn_of_batch(batch, definer, trainer.callbacks)


def check_same_batch(group: DataGroup, batch: Any) -> None:
    """Raise unless the processes of one copy of the model have read the same batch. They all take part."""
    if group.processes_per_copy == 1:
        return
    digests = all_gather_object(digest_of(move_to_device(batch, torch.device("cpu"))))
    first = group.index * group.processes_per_copy
    of_copy = digests[first : first + group.processes_per_copy]
    if len(set(of_copy)) > 1:
        raise ConfigurationError(
            f"The first batch differs between the {len(of_copy)} processes that hold one copy of the model, "
            "which must read the same one. Pass the same data on all of them. Draw no random numbers that "
            "depend on the process. If you shard data yourself, do it by trainer.data_group.index, not by "
            "the rank."
        )


def check_first_update(trainer: TrainerParts, run: Run, base: type) -> None:
    """Warn of parameters that the first update does not reach.

    Args:
        base: `Trainer`, by which is known what the trainer's class overrides.
    """
    held = [parameter for group in run.prepared.optimizer.param_groups for parameter in group["params"]]
    run.lacks_gradients = any(parameter.requires_grad and parameter.grad is None for parameter in held)
    attributes = vars(trainer)
    modules = {
        f"trainer.{name}.": module for name, module in attributes.items() if isinstance(module, nn.Module)
    }
    modules.pop("trainer.model.", None)
    overrides_backward = getattr(type(trainer), "backward_step") is not getattr(base, "backward_step")  # noqa: B009
    model = trainer.get_model(keep_torch_compile=False)
    warn_of_unreached(run.engine, run.prepared.user_optimizer, {"": model, **modules}, overrides_backward)
