"""Lists the callbacks that a trainer has if it is given none."""

from __future__ import annotations

from .callback import TrainerCallback
from .log_metrics import LogMetricsCallback
from .print_progress import PrintProgressCallback
from .terminate_on_nan import TerminateOnNaNCallback

# Classes, so that each trainer gets instances of its own; a tuple, so that nobody changes it for all.
DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (
    TerminateOnNaNCallback,
    PrintProgressCallback,
    LogMetricsCallback,
)
"""The callbacks of a trainer that is given none: it stops at nan, prints each epoch, and logs the metrics."""
