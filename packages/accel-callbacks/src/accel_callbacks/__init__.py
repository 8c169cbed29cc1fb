"""Callbacks for the trainer of accel-core: one a file."""

from accel_core import LogMetricsCallback, TerminateOnNaNCallback, TrainerCallback

from .convert_sync_batch_norm import ConvertSyncBatchNormCallback as ConvertSyncBatchNormCallback
from .early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
from .max_time import MaxTimeCallback as MaxTimeCallback
from .metrics import MetricsCallback as MetricsCallback
from .model_ema import ModelEmaCallback as ModelEmaCallback
from .model_freezer import Layer as Layer
from .model_freezer import LayerGroup as LayerGroup
from .model_freezer import ModelFreezer as ModelFreezer
from .periodic import Periodic as Periodic
from .plot_history import plot_history as plot_history
from .progress_bar import ProgressBarCallback as ProgressBarCallback
from .save_best_model import SaveBestModelCallback as SaveBestModelCallback
from .save_training_state import SaveTrainingStateCallback as SaveTrainingStateCallback
from .step_based_evaluation import StepBasedEvaluationCallback as StepBasedEvaluationCallback
from .watched_metric import WatchedMetric as WatchedMetric

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (TerminateOnNaNCallback, ProgressBarCallback, LogMetricsCallback)
"""For `Trainer(..., callbacks=DEFAULT_CALLBACKS)`: a bar in place of the lines of `accel_core.DEFAULT_CALLBACKS`."""
