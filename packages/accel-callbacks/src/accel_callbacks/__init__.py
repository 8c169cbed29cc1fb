"""Callbacks for the trainer of accel-core: one a file."""

# Those of the core too, so that every callback can be imported from here.
from accel_core import LimitBatches as LimitBatches
from accel_core import LimitBatchesCallback as LimitBatchesCallback
from accel_core import LogMetricsCallback as LogMetricsCallback
from accel_core import PrintProgressCallback as PrintProgressCallback
from accel_core import TerminateOnNaNCallback as TerminateOnNaNCallback
from accel_core import TrainerCallback as TrainerCallback

from .batch_size_finder import BatchSize as BatchSize
from .batch_size_finder import find_batch_size as find_batch_size
from .convert_sync_batch_norm import ConvertSyncBatchNormCallback as ConvertSyncBatchNormCallback
from .early_stopping import EarlyStoppingCallback as EarlyStoppingCallback
from .history_figure import plot_history as plot_history
from .history_file import HistoryFileCallback as HistoryFileCallback
from .layer_groups import Layer as Layer
from .layer_groups import LayerGroup as LayerGroup
from .learning_rate_finder import LearningRateRange as LearningRateRange
from .learning_rate_finder import find_learning_rate as find_learning_rate
from .max_time import MaxTimeCallback as MaxTimeCallback
from .metrics import MetricsCallback as MetricsCallback
from .model_average import ModelAverageCallback as ModelAverageCallback
from .model_ema import ModelEmaCallback as ModelEmaCallback
from .model_freezer import ModelFreezer as ModelFreezer
from .optuna_pruning import OptunaPruningCallback as OptunaPruningCallback
from .periodic import Periodic as Periodic
from .prediction_metrics import PredictionMetricsCallback as PredictionMetricsCallback
from .profile import ProfileCallback as ProfileCallback
from .progress_bar import ProgressBarCallback as ProgressBarCallback
from .save_best_model import SaveBestModelCallback as SaveBestModelCallback
from .save_training_state import SaveTrainingStateCallback as SaveTrainingStateCallback
from .step_based_evaluation import StepBasedEvaluationCallback as StepBasedEvaluationCallback
from .tracker import TrackerCallback as TrackerCallback
from .training_statistics import TrainingStatisticsCallback as TrainingStatisticsCallback
from .unfreeze import UnfreezeCallback as UnfreezeCallback
from .watched_metric import WatchedMetric as WatchedMetric

DEFAULT_CALLBACKS: tuple[type[TrainerCallback], ...] = (
    TerminateOnNaNCallback,
    ProgressBarCallback,
    LogMetricsCallback,
)
"""The callbacks of `accel_core.DEFAULT_CALLBACKS`, with a progress bar in place of printed lines.

Pass them as `Trainer(..., callbacks=DEFAULT_CALLBACKS)`.
"""
