"""Checks of what users pass, made before anything is changed.

Each error has the value, what was expected, the way out.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import ConfigurationError
from ..text import did_you_mean, preview


# ------------------------------------------------------------------ single values
def check_whole_number(name: str, value: Any, way_out: str, optional: bool = False) -> None:
    """Raise unless `value` is a whole number of at least 1, or None where that is allowed."""
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigurationError(
            f"{name} is {preview(value)}, but must be a whole number of at least 1. {way_out}"
        )
    if int(value) < 1:
        raise ConfigurationError(f"{name} is {value}, but must be at least 1. {way_out}")


def check_positive(name: str, value: Any, way_out: str, optional: bool = False) -> None:
    """Raise unless `value` is a finite number above 0, or None where that is allowed."""
    if optional and value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 < float(value) < math.inf):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a number above 0. {way_out}")


def check_not_negative(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 <= float(value) < math.inf):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a number of at least 0. {way_out}")


def check_callable(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a function. {way_out}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `choices`, and of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        hint = did_you_mean(str(value), map(str, choices))
        raise ConfigurationError(f"{name} is {preview(value)}, but must be one of {list(choices)}.{hint}")
