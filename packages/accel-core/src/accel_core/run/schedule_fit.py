"""Whether a schedule fits the run, before the first update: the steps to come are tried on a copy.

The copy holds the settings of the optimizer without its parameters, so that nothing of the run is changed.
Units: a *step* is one call of the scheduler's `step`, after an update or after an epoch.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, NamedTuple

from torch.optim import lr_scheduler

from ..errors import AccelWarning, ConfigurationError
from ..state.checkpoint import TrainerState
from .run import Run
from .run_config import TrainerRunConfig
from .run_progress import RunProgress
from .scheduling import Schedule
from .trainer_parts import TrainerParts

MOST_STEPS_TRIED = 100_000
"""A second or less; of a longer run only the first steps are tried."""

_CLIMBS_BY_INTENTION = (lr_scheduler.CyclicLR, lr_scheduler.CosineAnnealingWarmRestarts)

_logger = logging.getLogger("accel_core")


class _Trial(NamedTuple):
    """What the steps of a copy gave."""

    rates: list[float]
    """The highest learning rate of all groups before the first step, and after each."""
    error: Exception | None
    """What the step behind the last rate raised."""


class _Settings:
    """Stands for the optimizer of a schedule that is tried: the groups without their parameters."""

    _opt_called = True  # PyTorch's schedulers warn if they step before the optimizer has.

    def __init__(self, optimizer: Any) -> None:
        self.param_groups = [
            {
                key: copy.deepcopy(value)
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            for group in optimizer.param_groups
        ]
        self.defaults = dict(getattr(optimizer, "defaults", {}))
        self.state: dict[Any, Any] = {}
        self.step = _step

    @property
    def highest_rate(self) -> float:
        """The highest learning rate of all groups."""
        return max(float(group["lr"]) for group in self.param_groups)


def _step() -> None:
    pass


_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def check_fit(trainer: TrainerParts, run: Run, state: TrainerState | None = None) -> None:
    """Raise or warn, before the first update, if the schedule does not fit what is left of the run."""
    saved = None if state is None else state["launched"]["num_update_steps"]
    if trainer.scheduler is not None and run.prepared.user_optimizer is not None:
        optimizer, progress = run.prepared.user_optimizer, trainer.run_progress
        check_schedule(trainer.scheduler, run.schedule, optimizer, trainer.run_config, progress, saved)


def check_schedule(
    scheduler: Any,
    schedule: Schedule,
    optimizer: Any,
    config: TrainerRunConfig,
    progress: RunProgress,
    saved_num_updates: int | None = None,
) -> None:
    """Raise, warn or log if `scheduler` does not fit the steps that are left of this call of `train`.

    Only schedules of PyTorch's kind are tried, whose `step` is PyTorch's own: another one may do anything.

    Args:
        optimizer: that of the scheduler.
        saved_num_updates: the updates that the call which is resumed was planned for, or None.

    Raises:
        ConfigurationError: a step would raise within the run.
    """
    steps_left = _count_steps_left(schedule, config, progress)
    if steps_left is None or steps_left <= 0 or not _can_be_tried(scheduler, optimizer):
        return
    unit = "updates" if schedule.after_update else "epochs"
    # A chain has no count of its own.
    steps_made = getattr(scheduler, "last_epoch", None)
    if steps_made is None:
        steps_made = scheduler._schedulers[0].last_epoch
    is_resumed = saved_num_updates is not None
    fit = _Fit(type(scheduler).__name__, unit, steps_made, steps_made + steps_left, is_resumed)
    trial = _try_steps(scheduler, optimizer, min(steps_left, MOST_STEPS_TRIED))
    if trial is None:
        return
    if trial.error is not None:
        raise fit.create_error(trial) from trial.error
    plan = planned_steps(scheduler)
    if plan is not None and plan > fit.steps_of_run:
        _logger.warning(
            "%s is planned for %d %s, but the run ends after %d.", fit.name, plan, unit, fit.steps_of_run
        )
    if plan is None and schedule.after_update:
        plan = saved_num_updates
    if plan is not None:
        base_rate = max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        if not _climbs_by_intention(scheduler):
            fit.warn_if_it_climbs(trial.rates, plan, base_rate)


class _Fit(NamedTuple):
    """The numbers of a schedule and of the run, and the sentences about them."""

    name: str
    unit: str
    steps_made: int
    steps_of_run: int

    is_resumed: bool

    def create_error(self, trial: _Trial) -> ConfigurationError:
        """Return the error for a schedule that is shorter than the run."""
        steps = self.steps_made + len(trial.rates) - 1
        return ConfigurationError(
            f"The schedule of {self.name} has {steps} {self.unit}, but this run has {self.steps_of_run}: the "
            f"step after them would raise {type(trial.error).__name__} ({trial.error}). "
            f"{self._way_out(steps)}"
        )

    def _way_out(self, steps: int) -> str:
        if self.is_resumed:
            return (
                f"A resumed schedule keeps its plan. Train for {steps} {self.unit} in all, and go on in a "
                "second call of train with reset_run_history=False, which has a schedule of its own."
            )
        placeholder = "NUM_UPDATE_STEPS" if self.unit == "updates" else "NUM_EPOCHS"
        return f"Give it the length of the run: TrainerPlaceholderValues.{placeholder}."

    def warn_if_it_climbs(self, rates: list[float], plan: int, base_rate: float) -> None:
        """Warn if the rate rises again after the `plan` is through, which has lowered it."""
        first = max(plan - self.steps_made, 0)
        if first >= len(rates) - 1:
            return
        at_end = rates[first]
        highest = max(rates[first:])
        # A hundredth is left to rounding.
        if at_end >= base_rate or highest <= at_end * 1.01 + 1e-12:
            return
        by_epoch = (
            " If it counts epochs, pass scheduler_step_every='epoch'." if self.unit == "updates" else ""
        )
        warnings.warn(
            f"The schedule of {self.name} ends after {plan} {self.unit}, but this run has "
            f"{self.steps_of_run}: the learning rate will climb again from {at_end:.3g} to {highest:.3g}. "
            f"{self._way_out(plan)}{'' if self.is_resumed else by_epoch}",
            AccelWarning,
        )


def planned_steps(scheduler: Any) -> int | None:
    """Return the steps in which a schedule comes to its end; None if it has none, or it is not known."""
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        return int(scheduler.total_steps)
    if isinstance(scheduler, lr_scheduler.CosineAnnealingLR):
        return int(scheduler.T_max)
    if isinstance(scheduler, lr_scheduler.PolynomialLR):
        return int(scheduler.total_iters)
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        last = planned_steps(scheduler._schedulers[-1])
        return None if last is None else int(scheduler._milestones[-1]) + last
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        plans = [plan for part in scheduler._schedulers if (plan := planned_steps(part)) is not None]
        return max(plans, default=None)
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        # transformers builds its schedules as partials of a function with this argument.
        keywords = [getattr(function, "keywords", {}) for function in scheduler.lr_lambdas]
        return next((each["num_training_steps"] for each in keywords if "num_training_steps" in each), None)
    return None


def _count_steps_left(schedule: Schedule, config: TrainerRunConfig, progress: RunProgress) -> int | None:
    """Return how often the scheduler will step yet; None if that is not certain."""
    if schedule.metric is not None or schedule.has_step_epoch:
        return None
    epochs = progress.epochs_completed - progress.epochs_before_stage
    if schedule.after_update:
        # Without a certain length the limit in epochs may end the run before that in updates.
        if config.num_update_steps is None or (
            config.num_update_steps_per_epoch is None and config.num_epochs is not None
        ):
            return None
        return config.num_update_steps - (progress.updates_completed - progress.updates_before_stage)
    if not schedule.after_epoch:
        return None
    if config.num_update_steps is not None and config.num_update_steps_per_epoch is not None:
        # An epoch that a limit cuts short steps no scheduler.
        return config.num_update_steps // config.num_update_steps_per_epoch - epochs
    return (
        None
        if config.max_num_train_steps is not None or config.num_epochs is None
        else config.num_epochs - epochs
    )


def _can_be_tried(scheduler: Any, optimizer: Any) -> bool:
    """Whether stepping a copy tells what the scheduler will do, and does nothing else."""
    if not isinstance(scheduler, lr_scheduler.LRScheduler):
        return False
    is_torchs = getattr(type(scheduler).step, "__module__", "").startswith("torch.")
    return is_torchs and all(group.get("lr") is not None for group in optimizer.param_groups)


def _try_steps(scheduler: Any, optimizer: Any, num_steps: int) -> _Trial | None:
    """Step a copy; None if it cannot be copied, or needs more of its optimizer than the settings."""
    settings = _Settings(optimizer)
    try:
        twin = copy.deepcopy(scheduler, {id(optimizer): settings})
    except Exception as error:
        _logger.debug("%s cannot be copied and tried: %r", type(scheduler).__name__, error)
        return None
    rates = [settings.highest_rate]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(num_steps):
            try:
                twin.step()
            except (AttributeError, TypeError, NotImplementedError) as error:
                _logger.debug("%s cannot be tried: %r", type(scheduler).__name__, error)
                return None
            except Exception as error:
                return _Trial(rates, error)
            rates.append(settings.highest_rate)
    return _Trial(rates, None)


def _climbs_by_intention(scheduler: Any) -> bool:
    parts: list[Any] = getattr(scheduler, "_schedulers", [])
    return isinstance(scheduler, _CLIMBS_BY_INTENTION) or any(map(_climbs_by_intention, parts))
