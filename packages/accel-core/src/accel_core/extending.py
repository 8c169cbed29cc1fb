"""Exports what callbacks, adapters and trainers of your own need beyond the public names.

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
from .checks.values import plain as plain
from .data.loader import ShardedDataLoader as ShardedDataLoader
from .data.readers import is_ready_loader as is_ready_loader
from .engines.engine import Engine as Engine
from .engines.modes import allow_train_mode as allow_train_mode
from .engines.modes import keep_in_eval_mode as keep_in_eval_mode
from .engines.modes import stays_in_eval_mode as stays_in_eval_mode
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
from .run.batch_output import UnclearBatchSize as UnclearBatchSize
from .run.batch_output import call_loss as call_loss
from .run.batch_output import num_samples_in as num_samples_in
from .run.batch_output import unpack_batch as unpack_batch
from .run.counted_samples import COUNTS_BY_DEFAULT as COUNTS_BY_DEFAULT
from .run.counted_samples import create_batch_output as create_batch_output
from .run.counted_samples import samples_of as samples_of
from .run.loss_tracker import MeanTrackers as MeanTrackers
from .run.modes import weights_to_export as weights_to_export
from .run.placeholders import Placeholder as Placeholder
from .run.run_history import MetricRecord as MetricRecord
from .run.steps import Step as Step
from .run.trial import check_trial as check_trial
from .run.trial import trial_of as trial_of
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
from .state.weight_names import with_names_of as with_names_of
from .state.weight_names import with_plain_names as with_plain_names
from .text import did_you_mean as did_you_mean
from .text import preview as preview
from .text import with_full_stop as with_full_stop
