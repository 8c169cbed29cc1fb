"""Step timm's schedulers in the plain `Trainer` as timm's own training loop does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from accel_core import ConfigurationError, TrainerPlaceholderValues
from accel_core.extending import did_you_mean

from .import_timm import import_timm
from .optimizers import with_unscaled_base


def timm_scheduler_fn(scheduler_class: type | str, **kwargs: Any) -> Callable[[Optimizer], Any]:
    """Return a `create_scheduler_fn` for `Trainer.train` that creates a scheduler of timm.

    The rates are those of timm's own loop, update by update. The trainer calls `step_update` after every
    update with the updates completed, and `step` at the end of every epoch, after the evaluation, with the
    epochs completed. The schedule's `t_in_epochs` decides whether it counts epochs or updates, as in timm;
    `scheduler_step_every` of `train` has no effect. Updates that a gradient scaler skipped are not counted.

        values = TrainerPlaceholderValues
        timm_scheduler_fn(CosineLRScheduler, t_initial=values.NUM_EPOCHS, warmup_t=5)
        timm_scheduler_fn(CosineLRScheduler, t_initial=values.NUM_UPDATE_STEPS, t_in_epochs=False)

    A name stands for what timm's factory makes of it, with the factory's arguments, which count epochs:

        timm_scheduler_fn("cosine", num_epochs=TrainerPlaceholderValues.NUM_EPOCHS, warmup_epochs=5)

    `num_epochs` defaults to that of the run, and so does `updates_per_epoch`, which the factory needs with
    `step_on_epochs=False`.

    `PlateauLRScheduler` gets the metric that is passed to `train` as `scheduler_metric`.

    Args:
        scheduler_class: a class of `timm.scheduler`, or one derived from
            `timm.scheduler.scheduler.Scheduler`, or a name that `timm.scheduler.create_scheduler_v2` knows.
        kwargs: arguments of the class without the optimizer; they may hold `TrainerPlaceholderValues`.

    Raises:
        ConfigurationError: timm is missing, the class is none of its schedulers, or does not take these
            arguments.
    """
    if isinstance(scheduler_class, str):
        return _factory_scheduler_fn(scheduler_class, kwargs)
    base = import_timm("timm.scheduler.scheduler").Scheduler
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, base)):
        raise ConfigurationError(
            f"scheduler_class is {scheduler_class!r}, but must be a scheduler of timm. Pass a class such as "
            f"timm.scheduler.CosineLRScheduler; those of PyTorch go to create_scheduler_fn as they are."
        )
    name = scheduler_class.__name__
    try:
        # A wrong argument is an error here, at the user's own line, not when the run is prepared.
        inspect.signature(scheduler_class).bind(None, **kwargs)
    except TypeError as error:
        known = list(inspect.signature(scheduler_class).parameters)[1:]
        raise ConfigurationError(
            f"{name} cannot be built from {kwargs}: {error}. It takes {known}."
        ) from None
    if issubclass(scheduler_class, import_timm("timm.scheduler").PlateauLRScheduler) and "mode" not in kwargs:
        raise ConfigurationError(
            f"mode is not given, so {name} would wait for the metric to rise, but the metric of train is a "
            "loss unless scheduler_metric names another. Pass mode='min' for a loss, mode='max' for an "
            "accuracy."
        )
    return functools.partial(_create_scheduler, scheduler_class, **kwargs)


def _factory_scheduler_fn(name: str, kwargs: dict[str, Any]) -> Callable[[Optimizer], Any]:
    """Return the function for a name of timm's factory.

    Raises:
        ConfigurationError: the factory has no such name or argument, or the direction of a metric is not
            given.
    """
    factory = import_timm("timm.scheduler").create_scheduler_v2
    known = [*inspect.signature(factory).parameters][2:]
    if unknown := sorted(kwargs.keys() - set(known)):
        hint = did_you_mean(unknown[0], known) or f" It takes {known}."
        raise ConfigurationError(
            f"timm_scheduler_fn({name!r}, ...) got {unknown}, which timm's factory does not take.{hint}"
        )
    try:
        # The factory does not list its names; with an optimizer of no use it is known before training.
        scheduler, _ = factory(SGD([torch.zeros(1)], lr=1.0), name, updates_per_epoch=1)
    except ValueError:
        scheduler = None
    if scheduler is None:
        raise ConfigurationError(
            f"scheduler_class is {name!r}, for which timm's factory has no scheduler. Pass a name such as "
            "'cosine', 'step' or 'poly', or a class of timm.scheduler; for no scheduler leave "
            "create_scheduler_fn out."
        )
    if (
        isinstance(scheduler, import_timm("timm.scheduler").PlateauLRScheduler)
        and "plateau_mode" not in kwargs
    ):
        raise ConfigurationError(
            f"plateau_mode is not given, so {name!r} would wait for the metric to rise, but the metric of "
            "train is a loss unless scheduler_metric says otherwise. Pass plateau_mode='min' for a loss, "
            "'max' for an accuracy."
        )
    defaults: dict[str, Any] = {}
    if "num_epochs" not in kwargs:
        defaults["num_epochs"] = TrainerPlaceholderValues.NUM_EPOCHS
    if kwargs.get("step_on_epochs", True) is False and "updates_per_epoch" not in kwargs:
        defaults["updates_per_epoch"] = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH
    return functools.partial(_create_scheduler, _FromFactory(name), **defaults, **kwargs)


class _FromFactory:
    """Makes the scheduler of a name, as a class would."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        """Return timm's scheduler, without the number of epochs that the factory returns too."""
        return import_timm("timm.scheduler").create_scheduler_v2(optimizer, self.__name__, **kwargs)[0]


def _create_scheduler(scheduler_class: Any, optimizer: Optimizer, **kwargs: Any) -> TimmScheduler:
    try:
        with with_unscaled_base(optimizer):
            return TimmScheduler(scheduler_class(optimizer, **kwargs))
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        # Many checks of timm are assertions without a message.
        reason = f": {error}" if str(error) else ", which it refuses by an assertion"
        raise ConfigurationError(
            f"{scheduler_class.__name__} could not be built from {kwargs}{reason}. Give timm_scheduler_fn "
            "other arguments."
        ) from error


class TimmScheduler:
    """Steps `timm_scheduler`, a scheduler of timm, with the counts that timm leaves to its caller.

    The trainer calls `step` after every update, and `step_epoch` at the end of every epoch. Of a scheduler
    that needs a metric, such as `PlateauLRScheduler`, this is a `TimmMetricScheduler`.
    """

    def __new__(cls, timm_scheduler: Any) -> TimmScheduler:
        """Return an object of the class that passes a metric on, if the scheduler looks at one."""
        # timm's own base passes the metric by; a class that does not has a step of its own.
        looks_at_metric = (
            type(timm_scheduler).step is not import_timm("timm.scheduler.scheduler").Scheduler.step
        )
        kind: Any = TimmMetricScheduler if looks_at_metric and cls is TimmScheduler else cls
        return object.__new__(kind)  # type: ignore[no-any-return]

    def __init__(self, timm_scheduler: Any) -> None:
        self.timm_scheduler = timm_scheduler
        """The scheduler of timm itself."""
        self.optimizer: Optimizer = timm_scheduler.optimizer
        self.updates_completed = 0
        self.epochs_completed = 0

    def step(self) -> None:
        """Give the groups their values for the next update."""
        self.updates_completed += 1
        self.timm_scheduler.step_update(self.updates_completed)

    def step_epoch(self) -> None:
        """Give the groups their values for the next epoch."""
        self.epochs_completed += 1
        self.timm_scheduler.step(self.epochs_completed)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and all that determines the values."""
        # Not by timm's own `state_dict`: that of PlateauLRScheduler leaves out how many bad epochs there
        # were.
        # Callables are made by the constructor, and the optimizer saves itself.
        fields = {
            name: value
            for name, value in vars(self.timm_scheduler).items()
            if name != "optimizer" and not callable(value)
        }
        return {
            "scheduler_class": type(self.timm_scheduler).__name__,
            "updates_completed": self.updates_completed,
            "epochs_completed": self.epochs_completed,
            "fields": {
                name: value.state_dict() if hasattr(value, "state_dict") else value
                for name, value in fields.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, whose plan replaces that of this object.

        Raises:
            ValueError: it is the state of another class of schedulers.
        """
        own_class = type(self.timm_scheduler).__name__
        if state["scheduler_class"] != own_class:
            raise ValueError(f"it is the state of a {state['scheduler_class']}, not of a {own_class}.")
        self.updates_completed = state["updates_completed"]
        self.epochs_completed = state["epochs_completed"]
        for name, value in state["fields"].items():
            # PlateauLRScheduler keeps a scheduler of PyTorch inside.
            inner: Any = getattr(self.timm_scheduler, name, None)
            if hasattr(inner, "load_state_dict"):
                inner.load_state_dict(value)
            else:
                setattr(self.timm_scheduler, name, value)


class TimmMetricScheduler(TimmScheduler):
    """Steps a scheduler of timm that needs a metric at the end of each epoch."""

    # The trainer reads the signature, and passes a metric if there is an argument without a default.
    def step_epoch(self, metric: float) -> None:  # type: ignore[override]
        """Give the groups their values for the next epoch, by the `metric` of the one that ends."""
        self.epochs_completed += 1
        self.timm_scheduler.step(self.epochs_completed, metric)
