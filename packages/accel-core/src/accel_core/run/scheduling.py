"""The scheduler of a run: how it is built, and when it steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError
from ..text import preview, with_full_stop


def build_scheduler(create_scheduler_fn: Any, optimizer: Any) -> Any:
    """Return `create_scheduler_fn(optimizer)`.

    Raises `ConfigurationError` if that fails or gives no scheduler of it.
    """
    name = getattr(getattr(create_scheduler_fn, "func", create_scheduler_fn), "__name__", "the scheduler")
    try:
        scheduler = create_scheduler_fn(optimizer)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"create_scheduler_fn could not build {name} from the optimizer alone: {with_full_stop(error)} "
            f"Pass functools.partial({name}, ...) with all other arguments."
        ) from error
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(
            f"create_scheduler_fn returned {preview(scheduler)}, which has no step(). Return a scheduler "
            "over the given optimizer."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigurationError(
            f"create_scheduler_fn returned a {type(scheduler).__name__} over another optimizer than the "
            "trainer's, so it would change nothing. Build it over the optimizer that the function is given."
        )
    return scheduler


def scheduler_interval(scheduler: Any, arguments: Mapping[str, Any], eval_dataset: Any) -> tuple[str, bool]:
    """When a scheduler steps, and whether it needs a metric at the end of an epoch.

    Raises if it needs what there will not be.

    `"update"`, `"epoch"`, or `"both"` where it has a `step_epoch` besides its `step`.
    """
    wanted: str = arguments["scheduler_step_every"]
    if scheduler is None:
        return wanted, False
    step_epoch = getattr(scheduler, "step_epoch", None)
    parameters = list(inspect.signature(step_epoch or scheduler.step).parameters.values())
    needs_metric = (
        bool(parameters) and parameters[0].default is parameters[0].empty and parameters[0].kind < 2
    )
    if needs_metric and parameters[0].name == "epoch":
        raise ConfigurationError(
            f"create_scheduler_fn returned a {type(scheduler).__name__}, whose step needs the epoch, as "
            "those of timm do. Pass "
            f"create_scheduler_fn=accel_integrations.timm_adapter.timm_scheduler_fn({type(scheduler).__name__}, "
            "...)."
        )
    if needs_metric and arguments["scheduler_metric"] == "eval_loss_epoch" and eval_dataset is None:
        raise ConfigurationError(
            f"scheduler_metric is 'eval_loss_epoch', which {type(scheduler).__name__} needs in every epoch, "
            "but eval_dataset is None. Pass eval_dataset, or scheduler_metric='train_loss_epoch'."
        )
    return "both" if step_epoch else "epoch" if needs_metric else wanted, needs_metric
