"""Checks single values that users pass, for accel's own classes and for those of extensions.

Each check returns the value, as a plain number of Python if it is one, and raises before anything has
changed. Each error names the value, what was expected, and the way out.
"""

from __future__ import annotations

import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigurationError
from ..text import did_you_mean, preview
from .address import Address, flaw_of_address, is_address

LONGEST_NAME = 255
"""Most bytes in one part of a path, on the file systems in use."""


def check_flag(name: str, value: Any) -> bool:
    """Return `value`. Raises unless it is True or False: a text such as "no" counts as true."""
    return bool(check_choice(name, value, (False, True)))


def check_whole_number(name: str, value: Any, way_out: str, optional: bool = False, at_least: int = 1) -> Any:
    """Return `value` as an `int`. Raises unless it is whole and large enough, or None if that is allowed."""
    if optional and value is None:
        return None
    number = plain(value)
    if not isinstance(number, numbers.Integral) or isinstance(number, bool):
        raise ConfigurationError(
            f"{name} is {preview(value)}, but must be a whole number of at least {at_least}. {way_out}"
        )
    number = int(number)
    if number < at_least:
        raise ConfigurationError(f"{name} is {number}, but must be at least {at_least}. {way_out}")
    return number


def check_positive(name: str, value: Any, way_out: str, optional: bool = False) -> Any:
    """Return `value` as a number. Raises unless it is finite and above 0, or None if that is allowed."""
    if optional and value is None:
        return None
    number = plain(value)
    if not (_is_finite(number) and number > 0):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a number above 0. {way_out}")
    return number


def check_not_negative(name: str, value: Any, way_out: str) -> Any:
    """Return `value` as a plain number. Raises unless it is finite and at least 0."""
    number = plain(value)
    if not (_is_finite(number) and number >= 0):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a number of at least 0. {way_out}")
    return number


def check_callable(name: str, value: Any, way_out: str) -> Any:
    """Return `value`. Raises unless it is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a function. {way_out}")
    return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return `value`, as one of Python. Raises unless it is one of `choices`, and of the same type."""
    value = plain(value)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        hint = did_you_mean(str(value), map(str, choices))
        raise ConfigurationError(f"{name} is {preview(value)}, but must be one of {list(choices)}.{hint}")
    return value


def check_path(name: str, value: Any, way_out: str) -> Path:
    """Return `value` as a `Path`. Every path of the user's is checked here.

    Raises unless it is text or a path that a disk of this machine could have: an address such as `s3://…`
    would become a folder named `s3:`.
    """
    if not isinstance(value, (str, Path)):
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a path. {way_out}")
    if is_address(value):
        raise ConfigurationError(
            f"{name} is '{value}', an address of a store, but must be a path of this machine. {way_out} "
            "To keep training states in a store, pass SaveTrainingStateCallback(..., mirror='s3://…'), and "
            "get them back by latest_checkpoint('s3://…', cache='checkpoints'). save_checkpoint writes to a "
            "store directly."
        )
    if str(value) in ("", ".") and not isinstance(value, Path):
        raise ConfigurationError(f"{name} is {value!r}, but must name something. {way_out}")
    # Checked now, since the first save may come hours after the mistake.
    longest = max(Path(value).parts, key=len, default="")
    if len(longest.encode("utf-8", "surrogatepass")) > LONGEST_NAME or "\0" in str(value):
        raise ConfigurationError(
            f"{name} has a part of {len(longest)} characters ({longest[:20]!r}…), but names on a disk have "
            f"at most {LONGEST_NAME} bytes, none of which is zero. Use a shorter name without '\\0'. "
            f"{way_out}"
        )
    return Path(value)


def check_place(name: str, value: Any, way_out: str) -> Path | Address:
    """Return `value` as an `Address` if it is one, else as `check_path` does.

    Raises for a `Path` of an address, which has lost a slash.
    """
    if not is_address(value) or not isinstance(value, (str, Path, Address)):
        return check_path(name, value, way_out)
    if isinstance(value, Path):
        raise ConfigurationError(
            f"{name} is Path('{value}'), an address of a store, which loses a slash as a Path. "
            "Pass it as text."
        )
    if flaw := flaw_of_address(str(value)):
        raise ConfigurationError(f"{name} is '{value}', {flaw}. {way_out}")
    return Address(str(value).rstrip("/"))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # Infinity is above 0, so comparisons alone would let it pass.
    return is_number and math.isfinite(float(value))


def plain(value: Any) -> Any:
    """Return the number of Python for one of numpy or torch, which JSON, `is` and many libraries do not know.

    So are truth values and strings of numpy; anything else is returned as it is.
    """
    is_scalar = isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0
    return value.item() if is_scalar or isinstance(value, np.generic) else value


def plain_arguments(kwargs: Any) -> Any:
    """Return a copy of a dictionary of arguments with `plain` values, or anything else as it is."""
    return {name: plain(value) for name, value in kwargs.items()} if isinstance(kwargs, dict) else kwargs
