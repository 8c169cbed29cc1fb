"""Callbacks for the trainer of accel-core: one a file."""

from accel_core import LogMetricsCallback, TerminateOnNaNCallback, TrainerCallback

from .metrics import MetricsCallback as MetricsCallback
from .progress_bar import ProgressBarCallback as ProgressBarCallback

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (TerminateOnNaNCallback, ProgressBarCallback, LogMetricsCallback)
"""For `Trainer(..., callbacks=DEFAULT_CALLBACKS)`: a bar in place of the lines of `accel_core.DEFAULT_CALLBACKS`."""
