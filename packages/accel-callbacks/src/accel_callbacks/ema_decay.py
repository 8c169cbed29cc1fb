"""Checks how much of an average an update keeps."""

from __future__ import annotations

import numbers
from typing import Any

from accel_core import ConfigurationError
from accel_core.extending import plain, preview


def check_decay(decay: Any) -> float:
    """Return `decay` as a number from 0 to below 1. Raises `ConfigurationError`."""
    number = plain(decay)
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (is_number and 0 <= float(number) < 1):
        raise ConfigurationError(
            f"decay is {preview(decay)}, but must be a number from 0 to below 1. Use 0.999 to average over "
            "about the last thousand updates."
        )
    return float(number)
