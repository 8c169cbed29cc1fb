"""What one call of `train`, `evaluate` or `predict` asked for, what was built for it, and where it stands."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from ..checks.values import check_positive
from ..data.loader import ShardedDataLoader
from ..data.order import ORDER_VERSION
from ..engines.engine import Engine, Prepared
from ..engines.modes import TrainingModes
from ..engines.trained import clear_gradients, parameters_of
from ..errors import ConfigurationError
from ..state.resume import ResumePoint
from .counted_loss import CountedLoss
from .history_lines import HistoryLines
from .loss_tracker import MeanTrackers
from .rollback import Rollback
from .run_progress import RunProgress
from .scheduling import Schedule
from .steps import Step
from .train_arguments import TrainArguments
from .update_groups import ItemTotals, UpdateGroup, eval_steps


class Phase(enum.Enum):
    """Where a run stands."""

    BETWEEN_UPDATES = "between two updates"
    IN_STEPS = "in the steps of an update"
    IN_UPDATE = "between the steps of an update and its end"
    EVALUATING = "in the steps of an evaluation"
    CUT_SHORT = "after an epoch that ended before its data, since all processes stop"


_WITHOUT_GATHER = {
    Phase.EVALUATING: "an evaluation step, but {missing}. Update the metric on each process and compute "
    "it in on_eval_epoch_end, or use MetricsCallback.",
    Phase.IN_STEPS: "a training step, but {missing}. Gather in on_optimizer_step_end, or pass "
    "train_dataloader_kwargs={{'drop_last': True}}.",
}
"""Where `gather` may wait forever, and the way out."""


class Run:
    """One call of `train`, `evaluate` or `predict`.

    The trainer makes a new one for each call. It keeps the latest training run, whose state may be saved
    afterwards.
    """

    background: Any = None
    """The `BackgroundSaves` that are to write what is saved at this moment, if any are."""
    beginning: Mapping[str, Any] = MappingProxyType({})
    """What the run began with: digests, and the order of the data. Empty if that is not known."""
    launches: Sequence[dict[str, Any]] = ()
    """How each call of `train` of this run has read the data, up to this one."""
    data_facts: dict[str, Any] | None = None
    """What the run card tells of the data, once it was asked for."""
    tidied_folders: frozenset[Path] = frozenset()
    """Where a save of this run has removed what crashes had left."""

    afterwards: tuple[Callable[[], None], ...] = ()
    """What is done when the run is closed and the trainer may run again, unless an error has ended it."""
    is_between_sets = False
    """No run can continue from here: in mid-epoch between two sets, or in an evaluation of another model."""
    is_evaluating_start = False
    """The evaluation before the first update goes on."""

    evaluation_ended_on: dict[str, Any] | None = None
    """The sets of an evaluation while callbacks are told of its end, if they are not those of the run."""

    evaluated_loader: ShardedDataLoader | None = None
    """What the evaluation at this moment reads."""

    order_version = ORDER_VERSION
    """Of the function from seed and epoch to the order of the samples; a resumed run keeps its own."""

    def __init__(
        self,
        engine: Engine,
        arguments: TrainArguments | None = None,
        rollback: Rollback | None = None,
        known_states: dict[Path, dict[str, Any]] | None = None,
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
        """Freezing and unfreezing parameters in mid-run may need the model wrapped again."""
        self.step: Step | None = None
        """The current or latest step of training or evaluation."""
        self.group: UpdateGroup | None = None
        """The current or latest update."""
        self.stepped: list[torch.optim.Optimizer] = []
        """Further optimizers that have stepped inside the current step."""
        self.lacks_gradients = False
        """Trainable parameters of the optimizer had no gradient in the first update on this process."""
        self.are_weights_compared = engine.group.is_only_process
        """The processes have found that they have made the same of the parameters, after the first update."""
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
        self.counted_loss: tuple[Any, CountedLoss | None] = (None, None)
        """The loss function of the latest default step, and how it counts."""
        self.is_before_first_loss = True
        """The default step has computed no loss yet."""
        self.has_weight = False
        """Some update has changed the parameters; false while no batch weighs anything."""
        self.counts_before_forward = False
        """`count_items` counts the batches of an update before its first forward pass."""
        self.training_modes = TrainingModes()
        self.unchecked_steps = {"calculate_train_batch_loss", "calculate_eval_batch_loss"}
        """Methods whose first output is still to be checked."""
        self.known_states = known_states or {}
        """Training states that this run has saved or begun from, in any stage, and their progress."""
        self.history_lines = HistoryLines()

    @property
    def prepared(self) -> Prepared:
        """The model and the optimizer of the run."""
        if self.engine.prepared is None:
            raise ConfigurationError(
                "The run has not prepared its model and optimizer yet. Do this in an event after "
                "on_prepare_start, such as on_training_run_start."
            )
        return self.engine.prepared

    @property
    def loader_to_train(self) -> ShardedDataLoader:
        """This process's training data."""
        if self.train_loader is None:
            raise ConfigurationError(
                "The run has no training data yet. Call run_train_epoch in run_training, which train calls "
                "when the data is there."
            )
        return self.train_loader

    @property
    def is_in_update(self) -> bool:
        """Whether gradients are there that no update has used yet, so that the state cannot be saved."""
        return self.phase in (Phase.IN_STEPS, Phase.IN_UPDATE)

    def weight_of_step(self) -> float | None:
        """Return the samples of this process in the current step; None outside of steps.

        Gradients of a loss that is the mean over them weigh as much. What has no plan weighs the same on all
        processes.
        """
        if self.phase is not Phase.IN_STEPS or self.step is None:
            return None
        if self.step.is_padding:
            return 0.0
        return 1.0 if self.step.planned_items is None else float(self.step.planned_items)

    def step_optimizer(self, optimizer: Any, clip_norm: Any, clip_value: Any) -> None:
        """Step a further optimizer, as `Trainer.step_optimizer` promises. Every process takes part."""
        way_out = "Use None not to clip."
        clip_norm = check_positive("gradient_clip_norm", clip_norm, way_out, optional=True)
        clip_value = check_positive("gradient_clip_value", clip_value, way_out, optional=True)
        if self.arguments is None or self.engine.further is None:
            outside_run("step_optimizer")
        self.engine.further.step(optimizer, clip_norm, clip_value)
        # It has changed parameters, which are not put back.
        self.rollback = None

    def clear_stepped(self) -> None:
        """Clear what the loss of a step has added to the gradients of optimizers that have stepped in it."""
        while self.stepped:
            clear_gradients(parameters_of(self.stepped.pop()))

    def has_reached_limit(self, progress: RunProgress) -> bool:
        """Whether the epochs or the updates that this call of `train` was asked for are done."""
        epochs = progress.epochs_completed - progress.epochs_before_stage
        updates = progress.updates_completed - progress.updates_before_stage
        if self.num_epochs is not None and epochs >= self.num_epochs:
            return True
        return self.max_num_train_steps is not None and updates >= self.max_num_train_steps

    def is_over(self, progress: RunProgress, stop_reason: str | None) -> bool:
        """Whether there is no further update, by a limit of the run or by a stop."""
        return stop_reason is not None or self.has_reached_limit(progress)

    def is_finished(self, progress: RunProgress) -> bool:
        """Whether the limit is reached and the last epoch closed."""
        is_closed = progress.run_completed or not progress.updates_completed_in_epoch
        return is_closed and self.has_reached_limit(progress)

    def is_last_epoch(self, progress: RunProgress, stop_reason: str | None) -> bool:
        """Whether no epoch comes after the one whose training is done."""
        epochs = progress.epochs_completed + 1 - progress.epochs_before_stage
        is_last = self.num_epochs is not None and epochs >= self.num_epochs
        return is_last or progress.epoch_cut_by_limit or self.is_over(progress, stop_reason)

    def evaluates_epoch(self, progress: RunProgress, stop_reason: str | None) -> bool:
        """Whether the epoch whose training is done has an evaluation: every n-th has, and the last."""
        is_due = self.arguments is None or progress.current_epoch % self.arguments.eval_every_n_epochs == 0
        return is_due or self.is_last_epoch(progress, stop_reason)

    def evaluates_start(self, progress: RunProgress) -> bool:
        """Whether the evaluation before the first update of this call is wanted and not yet done."""
        is_before_first = progress.updates_completed == progress.updates_before_stage
        is_wanted = self.arguments is not None and self.arguments.eval_at_start
        return is_wanted and is_before_first and not progress.start_evaluated

    def completes_evaluation(self, progress: RunProgress) -> bool:
        """Whether the sets of an evaluation are counted: after an epoch's training, and at the start."""
        return progress.train_epoch_completed or self.is_evaluating_start

    def eval_steps(self, loader: ShardedDataLoader, is_intermediate: bool = False) -> Iterator[Step]:
        """Return the steps of an evaluation; padding only for engines whose forward needs every process."""
        loader.begin_epoch(
            0, max_steps=loader.max_intermediate_steps if is_intermediate else loader.max_steps
        )
        self.phase = Phase.EVALUATING
        self.lacks_batches = loader.may_lack_batches
        return eval_steps(loader, keep_padding=self.engine.has_collective_forward)

    def check_gather(self, tensor: torch.Tensor) -> None:
        """Raise if a process might never answer, or if a loss would lose its gradient silently."""
        self.check_collective("gather")
        if self.phase is Phase.IN_STEPS and tensor.requires_grad and torch.is_grad_enabled():
            raise ConfigurationError(
                "gather was called inside a training step with a tensor that requires a gradient, but what "
                "it returns has none. Call gather_with_grad(tensor) for a loss, and gather(tensor.detach()) "
                "for a metric."
            )

    def check_collective(self, call: str) -> None:
        """Raise if a process may be without a batch in the current step, and would never answer.

        Args:
            call: what was called, for the message.
        """
        if self.lacks_batches and self.phase in _WITHOUT_GATHER:
            num_processes = self.engine.group.size
            missing = (
                f"process {num_processes - 1} of {num_processes} has no batch there and would never answer"
            )
            where = _WITHOUT_GATHER[self.phase].format(missing=missing)
            raise ConfigurationError(f"{call} was called inside {where}")

    def close(self) -> None:
        """End the workers of all loaders."""
        while self.loaders:
            self.loaders.pop().close()


def outside_run(method: str) -> NoReturn:
    """Raise for a method that belongs to a run and was called outside of one."""
    raise ConfigurationError(
        f"{method} was called outside of a run, but needs what a run has prepared. Call train or evaluate, "
        f"and {method} only in an event of a callback or in a method that the run calls."
    )


def require_training(run: Run | None, method: str) -> tuple[Run, TrainArguments]:
    """Return the current training run, and its arguments.

    Raises `ConfigurationError` if there is none.
    """
    if run is None or run.arguments is None:
        outside_run(method)
    return run, run.arguments
