"""Schedulers of learning rates and other fields of parameter groups, by the number of updates completed."""

from .cosine_scheduler import CosineLrScheduler as CosineLrScheduler
from .scheduler_base import SchedulerBase as SchedulerBase
from .scheduler_base import StatefulSchedulerBase as StatefulSchedulerBase
from .wsd_checkpoint import WSDCheckpointCallback as WSDCheckpointCallback
from .wsd_periods import estimate_checkpoint_steps as estimate_checkpoint_steps
from .wsd_scheduler import WSDLrScheduler as WSDLrScheduler
