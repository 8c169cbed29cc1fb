"""What has been completed of a run."""

from __future__ import annotations

import dataclasses
from typing import cast

from ..state.checkpoint import ProgressState


@dataclasses.dataclass
class RunProgress:
    """Counters of what is finished; the same on every process and saved with the training state."""

    epochs_completed: int = 0
    """Epochs whose training and evaluation are done."""
    updates_completed: int = 0
    """Updates since the beginning of the run, those that were skipped included."""
    updates_skipped: int = 0
    """Updates that changed nothing: a gradient was not finite under a gradient scaler, or no batch weighed anything."""
    updates_completed_in_epoch: int = 0
    steps_completed_in_epoch: int = 0
    """Batches of this process in the epoch that goes on."""
    samples_completed_in_epoch: int = 0
    """Samples of all processes in the epoch that goes on: the position from which a run is resumed."""
    train_epoch_completed: bool = False
    """The training of the current epoch is done and its loss recorded, the epoch itself not yet."""
    eval_epoch_completed: bool = False
    """The evaluation of the current epoch is done too."""
    epoch_cut_by_limit: bool = False
    """A limit of the run ended the training of the current epoch before all of its data was seen."""
    run_completed: bool = False
    """That epoch is closed as well: nothing is left to do unless the limit is raised."""

    @property
    def current_epoch(self) -> int:
        """The epoch that goes on, counted from 1, for people to read."""
        return self.epochs_completed + 1

    def complete_update(self, steps: int, samples: int, was_skipped: bool) -> None:
        """Count an update of `steps` batches on this process and `samples` samples on all of them."""
        self.updates_completed += 1
        self.updates_completed_in_epoch += 1
        self.updates_skipped += was_skipped
        self.steps_completed_in_epoch += steps
        self.samples_completed_in_epoch += samples

    def complete_epoch(self) -> None:
        """Count the epoch and begin at the first sample of the next."""
        self.epochs_completed += 1
        self.updates_completed_in_epoch = self.steps_completed_in_epoch = self.samples_completed_in_epoch = 0
        self.train_epoch_completed = self.eval_epoch_completed = False

    def reopen_epoch(self) -> None:
        """Go on with an epoch that a limit had cut, now that the limit is higher."""
        if self.epoch_cut_by_limit:
            self.train_epoch_completed = self.eval_epoch_completed = False
            self.epoch_cut_by_limit = self.run_completed = False

    def state_dict(self) -> ProgressState:
        """Return the counters as a training state holds them."""
        return cast(ProgressState, dataclasses.asdict(self))
