"""Values that are known only once training starts, to be written down before it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch

from ..checks.values import plain
from ..errors import ConfigurationError


class Placeholder:
    """A number of the run config, or arithmetic on such numbers (`+ - * / //`, on either side)."""

    __array_ufunc__ = None
    """Lets numbers of numpy on the left leave the arithmetic to this class."""

    def __init__(self, description: str, calculate: Callable[[Any], Any]) -> None:
        self.description = description
        self.calculate = calculate
        """From the run config to the number."""

    def __repr__(self) -> str:
        return self.description


def _combine(
    symbol: str, operation: Callable[[Any, Any], Any], swapped: bool
) -> Callable[[Placeholder, Any], Any]:
    def combined(placeholder: Placeholder, other: Any) -> Any:
        other = plain(other)
        if not isinstance(other, (int, float, Placeholder)) or isinstance(other, bool):
            return NotImplemented
        left, right = (other, placeholder) if swapped else (placeholder, other)
        return Placeholder(
            f"({left} {symbol} {right})",
            lambda config: operation(resolve_placeholders(left, config), resolve_placeholders(right, config)),
        )

    return combined


for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv"}.items():
    setattr(Placeholder, f"__{_name}__", _combine(_symbol, getattr(operator, _name), swapped=False))
    setattr(Placeholder, f"__r{_name}__", _combine(_symbol, getattr(operator, _name), swapped=True))


def _field(placeholder_name: str, field: str) -> Any:
    def calculate(run_config: Any) -> Any:
        value = getattr(run_config, field)
        if value is None:
            raise ConfigurationError(
                f"{placeholder_name} is not known in this run, because the data set has no length, or the "
                "argument that decides it was not given. Write the number in its place."
            )
        return value

    return Placeholder(placeholder_name, calculate)


class TrainerPlaceholderValues:
    """Placeholders for the arguments of a `functools.partial` that is passed as `create_scheduler_fn`.

    `partial(OneCycleLR, max_lr=0.1, total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS)`; they are typed
    `Any`, since they stand where numbers are expected.
    """

    NUM_EPOCHS: Any = _field("NUM_EPOCHS", "num_epochs")
    NUM_UPDATE_STEPS_PER_EPOCH: Any = _field("NUM_UPDATE_STEPS_PER_EPOCH", "num_update_steps_per_epoch")
    NUM_UPDATE_STEPS: Any = _field("NUM_UPDATE_STEPS", "num_update_steps")
    """Updates of the whole run."""
    TRAIN_DATALOADER_LEN: Any = _field("TRAIN_DATALOADER_LEN", "train_dataloader_len")
    """Batches of one process in an epoch of training."""
    EVAL_DATALOADER_LEN: Any = _field("EVAL_DATALOADER_LEN", "eval_dataloader_len")


def resolve_placeholders(value: Any, run_config: Any) -> Any:
    """Return `value` with each placeholder in it replaced, also inside partials, lists, tuples and dicts.

    Numbers of numpy become Python's, which schedulers ask for.
    """
    if isinstance(value, Placeholder):
        return value.calculate(run_config)
    if isinstance(value, functools.partial):
        args, keywords = (resolve_placeholders(part, run_config) for part in (value.args, value.keywords))
        return functools.partial(value.func, *args, **keywords)
    if type(value) in (list, tuple):
        return type(value)(resolve_placeholders(item, run_config) for item in value)
    if type(value) is dict:
        return {key: resolve_placeholders(item, run_config) for key, item in value.items()}
    return value if isinstance(value, torch.Tensor) else plain(value)
