"""Steps of further optimizers: what `Trainer.step_optimizer` does, and what goes before a bare `step()`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..errors import ConfigurationError
from .averaging import average_gradients
from .trained import Trained, parameters_of


class FurtherOptimizers:
    """Steps the further optimizers of a run. What it does itself is averaging; the objects stay the user's.

    Args:
        trained: knows the optimizers, and which of their parameters nothing else averages.
        scaler: that of float16, or None.
        is_single_process: nothing is averaged.
        step_weight: returns what this process weighs in the current step, which is its number of
            samples, or None outside of steps.
        stepped: takes those that step inside the current step.
    """

    def __init__(
        self,
        trained: Trained,
        scaler: Any,
        is_single_process: bool,
        step_weight: Callable[[], float | None],
        stepped: list[Optimizer],
    ) -> None:
        self.trained = trained
        self.scaler = scaler
        self.is_single_process = is_single_process
        self.step_weight = step_weight
        self.stepped = stepped
        self.backs_off = False
        """Scaled gradients of a further optimizer were not finite since the last update."""
        self._averaged: Optimizer | None = None
        """The one whose gradients are averaged already."""
        self._hooks: dict[int, Any] = {}

    def listen(self) -> None:
        """Average before each bare `step()` from now on."""
        if self.is_single_process:
            return
        for optimizer in self.trained.optimizers.values():
            if id(optimizer) not in self._hooks:
                self._hooks[id(optimizer)] = optimizer.register_step_pre_hook(self._before_step)

    def release(self) -> None:
        """Leave the optimizers as they were."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def _before_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        if optimizer is self._averaged:
            return
        if self.scaler is not None:
            name = self.trained.name_of(optimizer)
            raise ConfigurationError(
                f"trainer.{name}.step() was called with a float16 scaler on several processes, of which each "
                f"would step or skip by itself. Call trainer.step_optimizer(trainer.{name}) instead."
            )
        self._average(optimizer)

    def _average(self, optimizer: Optimizer) -> None:
        weight = self.step_weight()
        if weight is None:
            # The trainer has weighted the loss, and the model's wrapper has averaged in backward.
            average_gradients(self.trained.beside(optimizer))
        else:
            # Inside a step the wrapper may not have averaged yet; what it has averaged stays as it is.
            average_gradients(list(parameters_of(optimizer)), weight)

    def step(self, optimizer: Any, clip_norm: float | None, clip_value: float | None) -> None:
        """Average, unscale, clip, step, step the schedulers, and clear. Every process takes part."""
        self._check(optimizer)
        if not self.is_single_process:
            self._average(optimizer)
        parameters = [held for held in parameters_of(optimizer) if held.grad is not None]
        if self._unscale(parameters):
            if clip_value is not None:
                torch.nn.utils.clip_grad_value_(parameters, clip_value)
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            self._averaged = optimizer
            try:
                optimizer.step()
            finally:
                self._averaged = None
            for scheduler in self.trained.schedulers.values():
                if scheduler.optimizer is optimizer and not needs_metric(scheduler):
                    scheduler.step()
        else:
            self.backs_off = True
        optimizer.zero_grad()
        if self.step_weight() is not None:
            self.stepped.append(optimizer)

    def _check(self, optimizer: Any) -> None:
        if self.trained.name_of(optimizer) is not None:
            return
        if (
            optimizer is self.trained.optimizer
            or getattr(optimizer, "optimizer", None) is self.trained.optimizer
        ):
            raise ConfigurationError(
                "step_optimizer was called with trainer.optimizer, which each update steps itself. Pass a "
                "further one."
            )
        # It may have been made since the run has begun.
        self.trained.refresh()
        self.listen()
        if self.trained.name_of(optimizer) is None:
            raise ConfigurationError(
                f"step_optimizer was called with a {type(optimizer).__name__} that is no attribute of the "
                f"trainer, which has {sorted(self.trained.optimizers)}. Make it one, so that it is saved and "
                "restored; one that accelerator.prepare has wrapped is stepped by its own step()."
            )

    def _unscale(self, parameters: list[torch.Tensor]) -> bool:
        """Divide by the scale of float16, and return whether all gradients are finite.

        Equal on all processes.

        The scaler itself unscales and steps an optimizer once between two of its updates, and some step more
        often.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is None or not gradients:
            return True
        torch._foreach_mul_(gradients, 1.0 / self.scaler.get_scale())
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)])
        return bool(torch.isfinite(norms).all())

    def back_off(self) -> None:
        """Lower the scale of float16 after an update, if a further optimizer had to skip a step."""
        if self.backs_off:
            self.backs_off = False
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())


def needs_metric(scheduler: Any) -> bool:
    """Whether `step` of a scheduler has an argument without a default, as that of `ReduceLROnPlateau` has."""
    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(
        parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_POSITIONAL
        and parameter.kind is not parameter.VAR_KEYWORD
        for parameter in parameters
    )
