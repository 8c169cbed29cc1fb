"""accel: a readable PyTorch training loop on Hugging Face Accelerate."""

from .__about__ import __version__ as __version__
from .callbacks.callback import TrainerCallback as TrainerCallback
from .callbacks.callback_list import CallbackList as CallbackList
from .callbacks.defaults import DEFAULT_CALLBACKS as DEFAULT_CALLBACKS
from .callbacks.limit_batches import LIMIT_BATCHES_ENV_VAR as LIMIT_BATCHES_ENV_VAR
from .callbacks.limit_batches import LimitBatches as LimitBatches
from .callbacks.limit_batches import LimitBatchesCallback as LimitBatchesCallback
from .callbacks.log_metrics import LogMetricsCallback as LogMetricsCallback
from .callbacks.print_progress import PrintProgressCallback as PrintProgressCallback
from .callbacks.terminate_on_nan import TerminateOnNaNCallback as TerminateOnNaNCallback
from .errors import AccelError as AccelError
from .errors import AccelWarning as AccelWarning
from .errors import CheckpointError as CheckpointError
from .errors import ConfigurationError as ConfigurationError
from .errors import RunInterrupted as RunInterrupted
from .run.loss_tracker import LossTracker as LossTracker
from .run.placeholders import TrainerPlaceholderValues as TrainerPlaceholderValues
from .run.run_config import TrainerRunConfig as TrainerRunConfig
from .run.run_history import InMemoryRunHistory as InMemoryRunHistory
from .run.run_history import RunHistory as RunHistory
from .run.run_progress import RunProgress as RunProgress
from .state.folder import best_checkpoint as best_checkpoint
from .state.folder import latest_checkpoint as latest_checkpoint
from .state.verifying import verify_checkpoint as verify_checkpoint
from .trainer import Trainer as Trainer
