"""Callbacks for the trainer of accel-core: one a file."""

from accel_core import LogMetricsCallback, TerminateOnNaNCallback, TrainerCallback

from .early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
from .metrics import MetricsCallback as MetricsCallback
from .periodic import Periodic as Periodic
from .progress_bar import ProgressBarCallback as ProgressBarCallback
from .save_best_model import SaveBestModelCallback as SaveBestModelCallback
from .save_training_state import SaveTrainingStateCallback as SaveTrainingStateCallback
from .watched_metric import WatchedMetric as WatchedMetric

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (TerminateOnNaNCallback, ProgressBarCallback, LogMetricsCallback)
"""For `Trainer(..., callbacks=DEFAULT_CALLBACKS)`: a bar in place of the lines of `accel_core.DEFAULT_CALLBACKS`."""
