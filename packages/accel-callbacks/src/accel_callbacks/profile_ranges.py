"""Names the parts of a step for a profiler, for as long as a profile is taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from accel_core import TrainerCallback

if TYPE_CHECKING:
    from accel_core import Trainer

RANGES = ("data", "forward", "backward", "optimizer", "callbacks", "evaluation", "saving")

_METHODS = {
    "calculate_train_batch_loss": "forward",
    "backward_step": "backward",
    "clip_gradients": "optimizer",
    "optimizer_step": "optimizer",
    "scheduler_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "run_eval_epoch": "evaluation",
    "save_training_state": "saving",
    "save_checkpoint": "saving",
}
"""Methods of the trainer, and the range that each is."""


class Ranges:
    """Sets ranges around the methods of a trainer, by attributes of the object, until they are taken off."""

    def __init__(self, trainer: Trainer) -> None:
        self._set: list[tuple[Any, str, Any]] = []
        """Objects and names of attributes, with what stood there before, if anything."""
        self._data: Any = None
        for name, label in _METHODS.items():
            self._replace(trainer, name, _in_range(getattr(trainer, name), label))
        for name in vars(TrainerCallback):
            # One that nobody hears would only fill the trace.
            if name.startswith("on_") and trainer.callbacks.listeners(name):
                method = getattr(trainer.callbacks, name)
                self._replace(trainer.callbacks, name, _in_range(method, "callbacks"))
        self._replace(trainer, "run_train_step", self._step(trainer.run_train_step))
        self._replace(trainer, "run_update", self._update(trainer.run_update))

    def open_data(self) -> None:
        """Begin the range in which the loop waits for data."""
        if self._data is None:
            self._data = torch.profiler.record_function("data")
            self._data.__enter__()

    def close_data(self) -> None:
        """End it."""
        if self._data is not None:
            self._data.__exit__(None, None, None)
            self._data = None

    def take_off(self) -> None:
        """Leave the trainer as it was."""
        self.close_data()
        for holder, name, before in reversed(self._set):
            if before is None:
                vars(holder).pop(name, None)
            else:
                setattr(holder, name, before)
        self._set = []

    def _replace(self, holder: Any, name: str, value: Any) -> None:
        self._set.append((holder, name, vars(holder).get(name)))
        setattr(holder, name, value)

    def _step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run_train_step(step: Any, group: Any) -> None:
            self.close_data()
            method(step, group)
            if not step.is_last and self._set:
                self.open_data()

        return run_train_step

    def _update(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run_update(group: Any) -> None:
            self.close_data()
            method(group)
            # The profile may have ended in the update.
            if self._set:
                self.open_data()

        return run_update


def _in_range(method: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(label):
            return method(*args, **kwargs)

    return in_range
