"""What extensions of accel need beyond the public names: callbacks, adapters and trainers of your own.

`accel_callbacks` and `accel_integrations` use nothing else of the core. The names here follow the same rules
of versions as those of `accel_core`.
"""

# `as` with the same name marks what is public here, for type checkers and the documentation.
from .callbacks.print_progress import how_it_ended as how_it_ended
from .checks.values import check_callable as check_callable
from .checks.values import check_choice as check_choice
from .checks.values import check_not_negative as check_not_negative
from .checks.values import check_path as check_path
from .checks.values import check_positive as check_positive
from .checks.values import check_whole_number as check_whole_number
from .data.loader import ShardedDataLoader as ShardedDataLoader
from .data.readers import is_ready_loader as is_ready_loader
from .engines.engine import Engine as Engine
from .engines.weights import check_finite as check_finite
from .engines.weights import is_frozen as is_frozen
from .errors import NotFiniteError as NotFiniteError
from .errors import OtherRunError as OtherRunError
from .processes.agreement import Agreement as Agreement
from .processes.collectives import all_gather_object as all_gather_object
from .processes.collectives import broadcast_tensors as broadcast_tensors
from .processes.collectives import is_distributed as is_distributed
from .processes.collectives import run_on_main as run_on_main
from .processes.collectives import sum_over_processes as sum_over_processes
from .run.batch_output import call_loss as call_loss
from .run.batch_output import num_samples_in as num_samples_in
from .run.batch_output import unpack_batch as unpack_batch
from .run.loss_tracker import MeanTrackers as MeanTrackers
from .run.placeholders import Placeholder as Placeholder
from .run.run_history import MetricRecord as MetricRecord
from .run.trial import check_trial as check_trial
from .run.trial import trial_of as trial_of
from .run.update_groups import Step as Step
from .run.update_groups import UpdateGroup as UpdateGroup
from .state import files as files
from .state.export import read_origin as read_origin
from .state.folder import complete_checkpoints as complete_checkpoints
from .state.housekeeping import KnownStates as KnownStates
from .state.housekeeping import check_folder_of_run as check_folder_of_run
from .state.housekeeping import refuse_other_run as refuse_other_run
from .state.housekeeping import remove_checkpoint as remove_checkpoint
from .state.housekeeping import remove_leftovers as remove_leftovers
from .state.housekeeping import set_other_runs_aside as set_other_runs_aside
from .state.random import preserving_random_state as preserving_random_state
from .text import did_you_mean as did_you_mean
from .text import preview as preview
from .text import with_full_stop as with_full_stop
