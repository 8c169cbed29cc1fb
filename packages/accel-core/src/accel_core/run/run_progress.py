"""Counts what has been completed of a run.

Units: a *stage* is one call of `train` within a run. A call with `reset_run_history=False` continues with the
run before and counts on; any other call begins a run of its own. The *order epoch* is what the order of the
data depends on besides the seed: it counts the epochs that this trainer has begun, whatever the calls are.
"""

from __future__ import annotations

import dataclasses
from typing import cast

from ..state.checkpoint import ProgressState


@dataclasses.dataclass
class RunProgress:
    """Counts what is finished, alike on every process. The training state holds the counters."""

    epochs_completed: int = 0
    """Epochs whose training and evaluation are done."""
    updates_completed: int = 0
    """Updates of the run, with those of earlier stages and those that were skipped."""
    updates_skipped: int = 0
    """Updates that changed nothing: skipped by a gradient scaler, or all batches had weight zero."""
    updates_completed_in_epoch: int = 0
    """Updates in the current epoch."""
    steps_completed_in_epoch: int = 0
    """Batches of this process in the current epoch."""
    samples_completed_in_epoch: int = 0
    """Samples of all processes in the current epoch: the position from which a run is resumed."""
    train_epoch_completed: bool = False
    """The training of the current epoch is done and its loss recorded, the epoch itself not yet."""
    eval_epoch_completed: bool = False
    """The evaluation of the current epoch is done too."""
    eval_sets_completed: int = 0
    """Evaluation sets of the current epoch that are done while others are not."""
    evaluation_told: bool = False
    """Callbacks were told of the end of the evaluation of the current epoch."""
    evaluation_step_due: bool = False
    """A scheduler that follows evaluations is still to step by the one of whose end callbacks were told."""
    start_evaluated: bool = False
    """The evaluation before the first update of the stage is done."""
    scheduler_values_used: int = 0
    """Values of its metric that a scheduler that follows evaluations has used or left out."""
    epoch_cut_by_limit: bool = False
    """A limit of the run ended the training of the current epoch before all of its data was seen."""
    run_completed: bool = False
    """That epoch is closed as well: nothing is left to do unless the limit is raised."""
    stage: int = 1
    """The current or latest call of `train`, counted from 1 within the run."""
    stage_skipped: bool = False
    """That call did nothing, since its `resume_from` is of a later stage: the model has other weights."""
    epochs_before_stage: int = 0
    """Value of `epochs_completed` when the stage began; the limits of a call count from there."""
    updates_before_stage: int = 0
    """Value of `updates_completed` when the stage began."""
    order_epoch: int = 0
    """Counts from 0 the epochs that this trainer has begun; with the seed it determines the order."""

    @property
    def current_epoch(self) -> int:
        """Return the current epoch, counted from 1, for people to read."""
        return self.epochs_completed + 1

    def complete_update(self, steps: int, samples: int, was_skipped: bool) -> None:
        """Count an update of `steps` batches here and `samples` samples on all processes.

        Args:
            was_skipped: its gradients were not finite in float16, so the parameters did not change.
        """
        # An update that the scaler skipped has used its samples, so it counts as well.
        self.updates_completed += 1
        self.updates_completed_in_epoch += 1
        self.updates_skipped += was_skipped
        self.steps_completed_in_epoch += steps
        self.samples_completed_in_epoch += samples

    def complete_epoch(self) -> None:
        """Count the epoch and begin at the first sample of the next."""
        self.epochs_completed += 1
        self.order_epoch += 1
        self.updates_completed_in_epoch = self.steps_completed_in_epoch = self.samples_completed_in_epoch = 0
        self.train_epoch_completed = self.eval_epoch_completed = self.evaluation_told = False
        self.eval_sets_completed = 0

    def complete_eval_set(self, num_sets: int) -> None:
        """Count the evaluation of one of `num_sets` sets after an epoch, or before the first update."""
        self.eval_sets_completed += 1
        if self.train_epoch_completed and self.eval_sets_completed >= num_sets:
            self.eval_epoch_completed, self.eval_sets_completed = True, 0

    def reopen_epoch(self) -> None:
        """Continue with an epoch that a limit had cut, now that the limit is higher."""
        if self.epoch_cut_by_limit:
            self.train_epoch_completed = self.eval_epoch_completed = self.evaluation_told = False
            self.eval_sets_completed = 0
            self.epoch_cut_by_limit = self.run_completed = False

    def begin_run(self) -> RunProgress:
        """Return the counters of a new run of the same trainer: only the order of the data goes on."""
        # The next run sees the data in a new order, also after an epoch that was cut short.
        return RunProgress(order_epoch=self.order_epoch + self._has_begun_epoch)

    def begin_stage(self) -> RunProgress:
        """Return the counters of the next stage of this run.

        An epoch that a limit, a stop or an error has cut short counts, so that no two epochs have one number.
        """
        # A bool adds 0 or 1.
        epochs = self.epochs_completed + self._has_begun_epoch
        return RunProgress(
            epochs_completed=epochs,
            updates_completed=self.updates_completed,
            updates_skipped=self.updates_skipped,
            stage=self.stage + 1,
            epochs_before_stage=epochs,
            updates_before_stage=self.updates_completed,
            order_epoch=self.order_epoch + self._has_begun_epoch,
        )

    @property
    def _has_begun_epoch(self) -> bool:
        # An epoch without an update has changed nothing; a run that is resumed just there begins it again.
        return self.updates_completed_in_epoch > 0

    def state_dict(self) -> ProgressState:
        """Return the counters as a training state holds them."""
        return cast(ProgressState, dataclasses.asdict(self))
