"""Schedulers of learning rates, and of any other field of the parameter groups, as functions of the updates completed."""

from .cosine_scheduler import CosineLrScheduler as CosineLrScheduler
from .scheduler_base import SchedulerBase as SchedulerBase
from .scheduler_base import StatefulSchedulerBase as StatefulSchedulerBase
from .wsd_checkpoint import WSDCheckpointCallback as WSDCheckpointCallback
from .wsd_scheduler import WSDLrScheduler as WSDLrScheduler
from .wsd_scheduler import estimate_checkpoint_steps as estimate_checkpoint_steps
