"""Create schedules of transformers that the trainer plans."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from accel_core import ConfigurationError, TrainerPlaceholderValues
from accel_core.extending import Placeholder, check_whole_number, did_you_mean, plain

from ..schedulers.scheduler_base import check_argument
from .import_transformers import import_transformers

_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
"""Schedules that do not depend on the length of the run."""


def transformers_scheduler_fn(
    name: str = "linear", num_warmup_steps: float = 0, num_training_steps: int | None = None, **kwargs: Any
) -> Callable[[Optimizer], Any]:
    """Return a `create_scheduler_fn` for `Trainer.train` that creates a schedule of transformers.

    ```python
    create_scheduler_fn = transformers_scheduler_fn("cosine", num_warmup_steps=0.1)
    trainer.train(dataset, num_epochs=3, create_scheduler_fn=create_scheduler_fn)
    ```

    Args:
        name: name such as `"linear"`, `"cosine"`, `"constant_with_warmup"`, `"warmup_stable_decay"`, as
            transformers' `get_scheduler` knows them. `"reduce_lr_on_plateau"` and `"greedy"` step once per
            epoch, with the `scheduler_metric` of `train`.
        num_warmup_steps: updates of warm-up; a number below 1 is a fraction of the run, rounded up.
        num_training_steps: updates after which the schedule is at its end; None takes all updates of the run.
        kwargs: arguments of that schedule, such as `num_cycles` or `num_decay_steps`, which may be
            placeholders.

    Raises:
        ConfigurationError: transformers is missing, has no such schedule, or a number of updates cannot be
            used.
    """
    known = [str(kind.value) for kind in import_transformers().SchedulerType]
    if name not in known:
        hint = did_you_mean(str(name), known) or f" It has {known}."
        raise ConfigurationError(f"name is {name!r}, which is no schedule of transformers.{hint}")
    num_warmup_steps = plain(num_warmup_steps)
    if not isinstance(num_warmup_steps, Placeholder):
        is_right = isinstance(num_warmup_steps, numbers.Real) and num_warmup_steps >= 0
        check_argument(
            "num_warmup_steps",
            num_warmup_steps,
            is_right,
            "a number of at least 0",
            "Use 0.1 for a tenth of the run.",
        )
    if not isinstance(num_training_steps, Placeholder):
        way_out = "Leave it out to take all updates of the run."
        num_training_steps = check_whole_number(
            "num_training_steps", num_training_steps, way_out, optional=True
        )
    is_share = isinstance(num_warmup_steps, float) and num_warmup_steps < 1
    # A schedule without an end does not need the length of the run, which is not known for all data.
    if num_training_steps is None and (name not in _ENDLESS or (is_share and num_warmup_steps)):
        num_training_steps = TrainerPlaceholderValues.NUM_UPDATE_STEPS
    if is_share and num_training_steps is not None:
        num_warmup_steps = num_warmup_steps * num_training_steps
    plan: dict[str, Any] = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_training_steps}
    return functools.partial(_create_scheduler, name=name, **plan, kwargs=kwargs)


def _create_scheduler(
    optimizer: Optimizer,
    name: str,
    num_warmup_steps: float,
    num_training_steps: int | None,
    kwargs: dict[str, Any],
) -> Any:
    # Rounded first, since a tenth of 70 updates is 7.000000000000001.
    whole_steps = math.ceil(round(num_warmup_steps, 6))
    get_scheduler = import_transformers().get_scheduler
    return get_scheduler(name, optimizer, whole_steps, num_training_steps, scheduler_specific_kwargs=kwargs)
