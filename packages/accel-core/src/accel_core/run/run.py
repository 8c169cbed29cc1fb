"""What one call of `train`, `evaluate` or `predict` asked for, what was built for it, and where it stands."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from ..data.loader import ShardedDataLoader
from ..engines.engine import Engine, Prepared
from ..errors import ConfigurationError
from ..state.resume import ResumePoint
from .counted_loss import CountedLoss
from .loss_tracker import MeanTrackers
from .rollback import Rollback
from .run_progress import RunProgress
from .scheduling import Schedule
from .train_arguments import TrainArguments
from .update_groups import ItemTotals


class Phase(enum.Enum):
    """Where a run stands."""

    BETWEEN_UPDATES = "between two updates"
    IN_STEPS = "in the steps of an update"
    IN_UPDATE = "between the steps of an update and its end"
    EVALUATING = "in the steps of an evaluation"
    CUT_SHORT = "after an epoch that ended before its data, since all processes stop"


_WITHOUT_GATHER = {
    Phase.EVALUATING: "an evaluation step, but {missing}. Update the metric on each process and compute it in "
    "on_eval_epoch_end, or use MetricsCallback.",
    Phase.IN_STEPS: "a training step, but {missing}. Gather in on_optimizer_step_end, or pass "
    "train_dataloader_kwargs={{'drop_last': True}}.",
}
"""Where `gather` may wait forever, and the way out."""


class Run:
    """One call of `train`, `evaluate` or `predict`.

    The trainer makes a new one for each call. It keeps the latest training run, whose state may be saved afterwards.
    """

    def __init__(
        self, engine: Engine, arguments: TrainArguments | None = None, rollback: Rollback | None = None
    ) -> None:
        self.engine = engine
        self.arguments = arguments
        """Those of `train`; None for an evaluation."""
        self.num_epochs = None if arguments is None else arguments.num_epochs
        self.max_num_train_steps = None if arguments is None else arguments.max_num_train_steps
        self.rollback = rollback
        """What a run found, to be put back if it fails before its first update; None after it."""
        self.phase = Phase.BETWEEN_UPDATES
        self.may_wrap_anew = not engine.group.is_single
        """Freezing and unfreezing parameters in mid-run may need the model wrapped anew."""
        self.lacks_batches = False
        """Some process may be without a batch in a step of the epoch begun."""
        self.loaders: list[ShardedDataLoader] = []
        """To be closed at the end."""
        self.train_loader: ShardedDataLoader | None = None
        self.schedule = Schedule()
        self.resume_point: ResumePoint | None = None
        """What the loop still has to restore once it is at the place where the state was saved."""
        self.item_totals = ItemTotals(engine.group)
        self.train_logs = MeanTrackers(torch.device("cpu"))
        self.samples_in_step: int | None = None
        """Samples that the loader gave for the step that goes on; None if it does not know."""
        self.counted_loss: tuple[Any, CountedLoss | None] = (None, None)
        """The loss function of the latest default step, and how it counts."""
        self.is_before_first_loss = True
        """The default step has computed no loss yet."""
        self.has_weight = False
        """Some update has changed the parameters; false while no batch weighs anything."""
        self.counts_before_forward = False
        """`count_items` counts the batches of an update before its first forward pass."""
        self.unchecked_steps = {"calculate_train_batch_loss", "calculate_eval_batch_loss"}
        """Methods whose first output is still to be checked."""
        self.known_states: dict[Path, dict[str, Any]] = {}
        """Training states that this very run has saved or begun from, with their progress."""

    @property
    def prepared(self) -> Prepared:
        """The model and the optimizer of the run."""
        if self.engine.prepared is None:
            raise ConfigurationError("Nothing is prepared yet. Call train or evaluate first.")
        return self.engine.prepared

    @property
    def loader_to_train(self) -> ShardedDataLoader:
        """This process's training data."""
        if self.train_loader is None:
            raise ConfigurationError("The run has no training data yet. Call train.")
        return self.train_loader

    @property
    def is_in_update(self) -> bool:
        """Whether gradients are there that no update has used yet, so that the state cannot be saved."""
        return self.phase in (Phase.IN_STEPS, Phase.IN_UPDATE)

    def has_reached_limit(self, progress: RunProgress) -> bool:
        """Whether the epochs or the updates that `train` was asked for are done."""
        if self.num_epochs is not None and progress.epochs_completed >= self.num_epochs:
            return True
        return self.max_num_train_steps is not None and progress.updates_completed >= self.max_num_train_steps

    def is_finished(self, progress: RunProgress) -> bool:
        """Whether the limit is reached and the last epoch closed."""
        is_closed = progress.run_completed or not progress.updates_completed_in_epoch
        return is_closed and self.has_reached_limit(progress)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put phase and `lacks_batches` back afterwards: an evaluation may happen in the middle of an epoch."""
        before = (self.phase, self.lacks_batches)
        try:
            yield
        finally:
            self.phase, self.lacks_batches = before

    def check_gather(self) -> None:
        """Raise if a process may be without a batch in the step that goes on, and would never answer."""
        if self.lacks_batches and self.phase in _WITHOUT_GATHER:
            num_processes = self.engine.group.size
            missing = (
                f"process {num_processes - 1} of {num_processes} has no batch there and would never answer"
            )
            where = _WITHOUT_GATHER[self.phase].format(missing=missing)
            raise ConfigurationError(f"gather was called inside {where}")

    def close(self) -> None:
        """End the workers of all loaders."""
        while self.loaders:
            self.loaders.pop().close()


def outside_run(method: str) -> NoReturn:
    """Raise for a method that belongs to a run and was called outside of one."""
    raise ConfigurationError(
        f"{method} was called outside of a run, but needs what a run has prepared. Call train or evaluate, and {method} "
        "only in an event of a callback or in a method that the run calls."
    )


def require_training(run: Run | None, method: str) -> tuple[Run, TrainArguments]:
    """Return the training run that goes on, and its arguments. Raises `ConfigurationError` if there is none."""
    if run is None or run.arguments is None:
        outside_run(method)
    return run, run.arguments
