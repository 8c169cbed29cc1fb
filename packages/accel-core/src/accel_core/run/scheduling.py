"""The scheduler of a run: how it is built, and when it steps."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection
from typing import Any

from ..errors import AccelError, ConfigurationError
from ..text import preview
from .run_history import RunHistory
from .run_progress import RunProgress


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a scheduler steps, and what its step at the end of an epoch needs."""

    after_update: bool = True
    after_epoch: bool = False
    has_step_epoch: bool = False
    """It has a method `step_epoch` for the end of an epoch, besides its `step`."""
    after_evaluation: bool = False
    """It steps at the end of evaluations of the run, in mid-epoch too."""
    metric: str | None = None
    """Name of the metric that the step at the end of an epoch, or of an evaluation, needs."""

    def step_after_epoch(self, scheduler: Any, run_history: RunHistory, progress: RunProgress) -> None:
        """Step at the end of an epoch or an evaluation, by the newest value of the metric if one is needed.

        Nothing happens if the epoch, or this very evaluation, has not recorded it.
        """
        step = scheduler.step_epoch if self.has_step_epoch else scheduler.step
        if self.metric is None:
            step()
            return
        value = self._new_value(run_history, progress)
        if value is not None:
            step(value)

    def _new_value(self, run_history: RunHistory, progress: RunProgress) -> float | None:
        name = str(self.metric)
        if name not in run_history.get_metric_names():
            # Some metrics are not there before the first evaluation of their kind.
            if self.after_evaluation or not progress.eval_epoch_completed:
                return None
            # This raises, and names the metrics that there are.
            return run_history.get_latest_metric(name)
        newest = next(record for record in reversed(run_history.get_records()) if record["name"] == name)
        if newest["epoch"] != run_history.current_epoch:
            return None
        if self.after_evaluation:
            number = len(run_history.get_metric_values(name))
            is_new = (
                number > progress.scheduler_values_used and newest["update"] == run_history.current_update
            )
            progress.scheduler_values_used = number
            return newest["value"] if is_new else None
        return newest["value"]


def build_scheduler(create_scheduler_fn: Any, optimizer: Any) -> Any:
    """Return `create_scheduler_fn(optimizer)`.

    Raises:
        ConfigurationError: it is no scheduler of `optimizer`.
    """
    name = getattr(getattr(create_scheduler_fn, "func", create_scheduler_fn), "__name__", "the scheduler")
    try:
        scheduler = create_scheduler_fn(optimizer)
    except (TypeError, ValueError) as error:
        if not isinstance(error, AccelError):
            error.add_note(
                f"create_scheduler_fn could not build {name} from the optimizer alone. Pass "
                f"functools.partial({name}, ...) with all other arguments."
            )
        raise
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(
            f"create_scheduler_fn returned {preview(scheduler)}, which has no step(). Return a scheduler "
            "over the optimizer that the function is given."
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigurationError(
            f"create_scheduler_fn returned a {type(scheduler).__name__} over another optimizer than the "
            "trainer's, so it would change nothing. Build it over the optimizer that the function is given."
        )
    return scheduler


def plan_schedule(scheduler: Any, step_every: str, metric: str, eval_sets: Collection[str]) -> Schedule:
    """Return when `scheduler` steps.

    Args:
        step_every: `"update"`, `"epoch"` or `"evaluation"`, as `train` was told.
        metric: the metric of the run history for a scheduler that needs one.
        eval_sets: names of the evaluation sets of the run.

    Raises:
        ConfigurationError: its step needs what there will not be.
    """
    if scheduler is None:
        return Schedule()
    if step_every == "evaluation" and not eval_sets:
        raise ConfigurationError(
            "scheduler_step_every is 'evaluation', but eval_dataset is None, so the scheduler would never "
            "step. Pass eval_dataset, or scheduler_step_every='epoch'."
        )
    step_epoch = getattr(scheduler, "step_epoch", None)
    needed = _first_needed_argument(step_epoch or scheduler.step)
    if needed == "epoch":
        raise ConfigurationError(
            f"create_scheduler_fn returned a {type(scheduler).__name__}, whose step needs the epoch, as "
            "those of timm do. Pass create_scheduler_fn=accel_integrations.timm_adapter.timm_scheduler_fn("
            f"{type(scheduler).__name__}, ...)."
        )
    if needed and metric == "eval_loss_epoch" and eval_sets and "" not in eval_sets:
        raise ConfigurationError(
            f"scheduler_metric is 'eval_loss_epoch', but the evaluation sets are called {list(eval_sets)}, "
            f"so it would never be recorded. Pass scheduler_metric='{next(iter(eval_sets))}_eval_loss_epoch'."
        )
    if needed and metric == "eval_loss_epoch" and not eval_sets:
        raise ConfigurationError(
            f"scheduler_metric is 'eval_loss_epoch', which {type(scheduler).__name__} needs in every epoch, "
            "but eval_dataset is None. Pass eval_dataset, or scheduler_metric='train_loss_epoch'."
        )
    has_both = step_epoch is not None
    by_evaluation = step_every == "evaluation"
    is_by_epoch = bool(needed) or step_every == "epoch"
    return Schedule(
        after_update=has_both or not (is_by_epoch or by_evaluation),
        after_epoch=(has_both or is_by_epoch) and not by_evaluation,
        after_evaluation=by_evaluation,
        has_step_epoch=has_both,
        metric=metric if needed else None,
    )


def _first_needed_argument(step: Any) -> str | None:
    """Return the name of the first positional argument if it has no default."""
    parameters = list(inspect.signature(step).parameters.values())
    if not parameters or parameters[0].default is not parameters[0].empty:
        return None
    is_positional = parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD)
    return parameters[0].name if is_positional else None
