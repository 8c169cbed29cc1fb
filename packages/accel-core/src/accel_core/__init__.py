"""accel: a readable PyTorch training loop on Hugging Face Accelerate."""

from .__about__ import __version__ as __version__
from .base_trainer import DEFAULT_CALLBACKS as DEFAULT_CALLBACKS
from .callback import TrainerCallback as TrainerCallback
from .callback_list import CallbackList as CallbackList
from .errors import AccelError as AccelError
from .errors import AccelWarning as AccelWarning
from .errors import CheckpointError as CheckpointError
from .errors import ConfigurationError as ConfigurationError
from .errors import RunInterrupted as RunInterrupted
from .limit_batches import LIMIT_BATCHES_ENV_VAR as LIMIT_BATCHES_ENV_VAR
from .limit_batches import LimitBatches as LimitBatches
from .limit_batches import LimitBatchesCallback as LimitBatchesCallback
from .log_metrics import LogMetricsCallback as LogMetricsCallback
from .loss_tracker import LossTracker as LossTracker
from .placeholders import TrainerPlaceholderValues as TrainerPlaceholderValues
from .print_progress import PrintProgressCallback as PrintProgressCallback
from .run_config import TrainerRunConfig as TrainerRunConfig
from .run_history import InMemoryRunHistory as InMemoryRunHistory
from .run_history import RunHistory as RunHistory
from .run_progress import RunProgress as RunProgress
from .terminate_on_nan import TerminateOnNaNCallback as TerminateOnNaNCallback
from .trainer import Trainer as Trainer
from .training_state import latest_checkpoint as latest_checkpoint
