"""Stands for values that are known only once training starts."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..checks.values import plain
from ..errors import ConfigurationError

_WAYS_OUT = {
    "NUM_EPOCHS": "num_epochs to train",
    "NUM_UPDATE_STEPS": "max_num_train_steps to train",
}
"""Names the argument that makes a placeholder known."""

_PER_EPOCH = "num_update_steps_per_epoch"


class UnknownNumberError(ConfigurationError):
    """Reports placeholders of numbers that are not certain in this run."""

    def __init__(self, names: Iterable[str], function: Any = None, arguments: Iterable[str] = ()) -> None:
        """Write the message, which names the call that needs the numbers.

        Args:
            names: of the placeholders.
            function: what is called with them, if that is known.
            arguments: of that call, for which they stand.
        """
        self.names = list(dict.fromkeys(names))
        ways_out = [_WAYS_OUT[name] for name in self.names if name in _WAYS_OUT]
        if "NUM_UPDATE_STEPS_PER_EPOCH" in self.names:
            is_argument = _takes(function, _PER_EPOCH)
            instead = "max_num_train_steps to train, with NUM_UPDATE_STEPS in place of it"
            ways_out.insert(0, f"{_PER_EPOCH} to create_scheduler_fn" if is_argument else instead)
        give = f", or give {' and '.join(ways_out)}" if ways_out else ""
        name = getattr(function, "__name__", "_")
        where = "" if function is None else f" for {', '.join(arguments)} of "
        # Functions that a library uses inside are no name that the user has written.
        where += "" if function is None else "create_scheduler_fn" if name.startswith("_") else name
        is_one = len(self.names) == 1
        write = "Write the number in its place" if is_one else "Write the numbers in their place"
        super().__init__(
            f"{' and '.join(self.names)} {'is' if is_one else 'are'} needed{where}, but not known in this "
            "run, because the data set has no length, or none that is certain (iterable data with several "
            f"workers), or the argument that decides it was not given. {write}{give}."
        )


def _takes(function: Any, argument: str) -> bool:
    try:
        # Some functions that are written in C have no signature.
        return function is not None and argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class Placeholder:
    """Stands for a number of the run config, or arithmetic on such numbers (`+ - * / //`, on either side)."""

    __array_ufunc__ = None
    """Lets numbers of numpy on the left leave the arithmetic to this class."""

    def __init__(self, description: str, calculate: Callable[[Any], Any]) -> None:
        self.description = description
        self.calculate = calculate
        """Returns the number for a run config."""

    def __repr__(self) -> str:
        return self.description


def _combine(
    symbol: str, operation: Callable[[Any, Any], Any], swapped: bool
) -> Callable[[Placeholder, Any], Any]:
    def combined(placeholder: Placeholder, other: Any) -> Any:
        other = plain(other)
        if not isinstance(other, (int, float, Placeholder)) or isinstance(other, bool):
            # Python then asks the other operand, and raises a TypeError that names both types.
            return NotImplemented
        left, right = (other, placeholder) if swapped else (placeholder, other)
        return Placeholder(
            f"({left} {symbol} {right})",
            lambda config: operation(*_resolve_each((left, right), config)),
        )

    return combined


# `P - 2` calls `__sub__`, and `2 - P` calls `__rsub__` with the operands swapped.
for _symbol, _name in {"+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv"}.items():
    setattr(Placeholder, f"__{_name}__", _combine(_symbol, getattr(operator, _name), swapped=False))
    setattr(Placeholder, f"__r{_name}__", _combine(_symbol, getattr(operator, _name), swapped=True))


def _field(placeholder_name: str, field: str) -> Any:
    def calculate(run_config: Any) -> Any:
        value = getattr(run_config, field)
        if value is None:
            raise UnknownNumberError([placeholder_name])
        return value

    return Placeholder(placeholder_name, calculate)


class TrainerPlaceholderValues:
    """Holds placeholders for the arguments of a `functools.partial` that is passed as `create_scheduler_fn`.

    `partial(OneCycleLR, max_lr=0.1, total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS)`; they are typed
    `Any`, since they stand where numbers are expected.
    """

    NUM_EPOCHS: Any = _field("NUM_EPOCHS", "num_epochs")
    """Epochs of the whole run."""
    NUM_UPDATE_STEPS_PER_EPOCH: Any = _field("NUM_UPDATE_STEPS_PER_EPOCH", "num_update_steps_per_epoch")
    """Updates of a whole epoch."""
    NUM_UPDATE_STEPS: Any = _field("NUM_UPDATE_STEPS", "num_update_steps")
    """Updates of the whole run."""
    TRAIN_DATALOADER_LEN: Any = _field("TRAIN_DATALOADER_LEN", "train_dataloader_len")
    """Batches of one process in an epoch of training."""
    EVAL_DATALOADER_LEN: Any = _field("EVAL_DATALOADER_LEN", "eval_dataloader_len")
    """Batches of one process in an evaluation."""


def resolve_placeholders(value: Any, run_config: Any) -> Any:
    """Return `value` with each placeholder in it replaced, also inside partials, lists, tuples and dicts.

    Numbers of numpy become Python's, which schedulers ask for.
    """
    if isinstance(value, Placeholder):
        return value.calculate(run_config)
    if isinstance(value, functools.partial):
        return _resolve_partial(value, run_config)
    # A subclass, such as a named tuple, may be built from other arguments than its items.
    if type(value) in (list, tuple):
        return type(value)(_resolve_each(value, run_config))
    if type(value) is dict:
        return dict(zip(value, _resolve_each(value.values(), run_config), strict=True))
    return value if isinstance(value, torch.Tensor) else plain(value)


def _resolve_partial(value: functools.partial[Any], run_config: Any) -> functools.partial[Any]:
    """Resolve the arguments of a partial; the error names all that are not known."""
    # Positional arguments by their number from 0, and the others by name.
    given: dict[int | str, Any] = dict(enumerate(value.args))
    given.update(value.keywords)
    missing: dict[str, list[str]] = {}
    for name, part in given.items():
        try:
            given[name] = resolve_placeholders(part, run_config)
        except UnknownNumberError as error:
            missing[f"argument {name + 1}" if isinstance(name, int) else name] = error.names
    if missing:
        names = [name for names in missing.values() for name in names]
        raise UnknownNumberError(names, value.func, missing) from None
    args = [given[number] for number in range(len(value.args))]
    keywords = {name: part for name, part in given.items() if isinstance(name, str)}
    # A new partial: the user's own serves the next run, which has other numbers.
    return functools.partial(value.func, *args, **keywords)


def _resolve_each(values: Iterable[Any], run_config: Any) -> list[Any]:
    """Resolve several values; the error names the placeholders of all."""
    resolved = []
    missing: list[str] = []
    for value in values:
        try:
            resolved.append(resolve_placeholders(value, run_config))
        except UnknownNumberError as error:
            missing += error.names
    if missing:
        raise UnknownNumberError(missing)
    return resolved
