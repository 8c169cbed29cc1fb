"""Copies a trainer to try something: the trainer, its data and all random numbers stay as they are.

Functions such as `find_learning_rate` and `find_batch_size` train it.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..callbacks.callback import TrainerCallback
from ..callbacks.callback_list import CallbackList
from ..checks.arguments import check_can_run, check_trainable
from ..errors import ConfigurationError
from ..state.random import preserving_random_state
from .run_history import InMemoryRunHistory
from .run_progress import RunProgress
from .train_arguments import TrainArguments

_ARGUMENTS_OF_TRIAL = (
    "collate_fn",
    "gradient_accumulation_steps",
    "gradient_clip_norm",
    "gradient_clip_value",
    "seed_each_sample",
    "train_dataloader_kwargs",
)
"""Names the arguments of `Trainer.train` that a trial takes."""


def check_trial(
    function: str, trainer: Any, dataset: Any, batch_size: Any, arguments: Mapping[str, Any]
) -> None:
    """Raise unless `function` can train a copy of `trainer` on `dataset`.

    Args:
        function: the name of the caller, for errors.
        batch_size: samples in a step of one process.
        arguments: further arguments of `Trainer.train` about data, accumulation and clipping.
    """
    check_can_run(function, trainer._run is not None, None)
    unknown = [name for name in arguments if name not in _ARGUMENTS_OF_TRIAL]
    if unknown:
        raise ConfigurationError(
            f"{function} got {unknown}, but takes only {list(_ARGUMENTS_OF_TRIAL)} of the arguments of "
            "train. Leave out the rest: a trial has neither evaluation nor scheduler, and ends by itself."
        )
    # Made for its checks alone, so that a mistake is reported before anything is copied.
    TrainArguments(
        train_dataset=dataset, per_device_batch_size=batch_size, max_num_train_steps=1, **arguments
    )
    check_trainable(trainer.model, trainer.optimizer, vars(trainer))
    if trainer.engine.shards_parameters:
        raise ConfigurationError(
            f"{function} trains a copy of the model, but {trainer.engine.name} spreads the model over the "
            "processes, where it cannot be copied. Call it in a script that runs without that engine."
        )


@contextlib.contextmanager
def trial_of(
    trainer: Any,
    dataset: Any,
    callback: TrainerCallback,
    mixin: type[Any] | None = None,
    memo: dict[int, Any] | None = None,
) -> Iterator[Any]:
    """Give a copy of `trainer` that has copies of all its modules and optimizers, and `callback` alone.

    Afterwards, also after an exception, the random state of this process, a scaler, what the accelerator
    knows, and the position of data that has a `state_dict` are as before. Every process takes part in what
    the copy does.

    Args:
        dataset: what the copy will be trained on.
        mixin: a class derived from `Trainer`, whose methods come before those of the trainer's own class.
        memo: takes what was copied, as `copy.deepcopy` knows it.
    """
    accelerator = trainer.accelerator
    # Preparing the copy adds to these lists, which would keep it alive.
    known = (accelerator._models, accelerator._optimizers)
    before = [list(objects) for objects in known]
    # The loss scale of float16 adapts to every update, those of the copy too.
    scale = None if accelerator.scaler is None else copy.deepcopy(accelerator.scaler.state_dict())
    with preserving_random_state(trainer.device), _keep_position(dataset):
        trial = _copy_trainer(trainer, {} if memo is None else memo)
        if mixin is not None:
            own_class = type(trial)
            # The mixin comes first, and its `super()` finds the methods of the trainer's own class.
            trial.__class__ = types.new_class(own_class.__name__, (mixin, own_class))
        # The trainer's own callbacks would save, log and stop for the trial.
        trial.callbacks = CallbackList([callback], trial)
        try:
            yield trial
        finally:
            # Lets go of the copies at once, though trainer and callbacks know each other.
            vars(trial).clear()
            for objects, others in zip(known, before, strict=True):
                objects[:] = others
            if scale is not None:
                accelerator.scaler.load_state_dict(scale)


def _copy_trainer(trainer: Any, memo: dict[int, Any]) -> Any:
    """Copy the trainer, its modules and optimizers, those of a subclass too, and share the rest.

    Args:
        memo: one for all, so that the copied optimizers hold the parameters of the copied modules.
    """
    trial = copy.copy(trainer)
    memo[id(trainer)] = trial
    try:
        for name, value in vars(trainer).items():
            if isinstance(value, torch.nn.Module):
                setattr(trial, name, _copy_module(value, memo))
            elif isinstance(value, torch.optim.Optimizer):
                setattr(trial, name, _copy_optimizer(value, memo))
    # Raised for tensors with a graph, and for attributes such as open files.
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"trainer.{name}, a {type(value).__name__}, cannot be copied, but a trial needs a copy: {error} "
            "Make copy.deepcopy of it work: use parametrizations, for example, in place of an attribute that "
            "is computed from parameters."
        ) from error
    trial.scheduler = None
    trial.create_scheduler_fn = None
    trial.run_history = InMemoryRunHistory()
    trial.run_progress = RunProgress()
    reset_for_trial(trial)
    return trial


def reset_for_trial(trial: Any) -> None:
    """Forget the runs of the copied trainer, so that the copy prepares its own model and optimizer."""
    trial._run = None
    trial._training_run = None
    trial._engine = None


def _copy_module(module: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    twin = copy.deepcopy(module, memo)
    # With this mark Accelerate would not prepare it.
    vars(twin).pop("_is_accelerate_prepared", None)
    return twin


def _copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Copy all attributes, as subclasses have some that `Optimizer.__getstate__` leaves out.

    Hooks are left behind, and so is a `step` that a scheduler has wrapped: they act on the original.
    """
    left = [name for name in vars(optimizer) if name == "step" or name.endswith("_hooks")]
    # The constructor would want arguments that nobody knows here.
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    twin.__setstate__(
        {name: copy.deepcopy(value, memo) for name, value in vars(optimizer).items() if name not in left}
    )
    return twin


@contextlib.contextmanager
def _keep_position(dataset: Any) -> Iterator[None]:
    """Put data that has a state back to its position, and restore the generators of a ready loader."""
    sources = [dataset, *(getattr(dataset, name, None) for name in ("dataset", "sampler", "batch_sampler"))]
    # Some data goes on where it stopped, so the trial would take samples from the next run.
    stateful = [
        source for source in sources if hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
    ]
    states = [copy.deepcopy(source.state_dict()) for source in stateful]
    # Iterating a loader draws from its generator, which decides the next order.
    generators = [
        source.generator
        for source in sources
        if isinstance(getattr(source, "generator", None), torch.Generator)
    ]
    seeds = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for source, state in zip(stateful, states, strict=True):
            source.load_state_dict(state)
        for generator, seed in zip(generators, seeds, strict=True):
            generator.set_state(seed)
