"""AveragingCallback: what all averages of weights share, such as evaluation, export and state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import (
    check_flag,
    check_place_in_reach,
    check_whole_number,
    notify,
    run_on_main,
)

from .averaged_weights import AveragedWeights
from .export_path import Exported, check_export_path, export_to, why_not_own
from .sharded_average import ShardedAverage
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class AveragingCallback(TrainerCallback):
    """Average the weights over the updates, evaluate the average like the model, and export the best.

    A subclass says which updates are averaged, and how.
    """

    order = 20
    """After your own callbacks, and before those that log, watch or save, which need its results."""

    argument_sources: ClassVar[dict[str, str]] = {
        "watch_metric": "watched.name",
        "greater_is_better": "watched.greater_is_better",
    }
    model_name: ClassVar[str]
    """Begins the names of metrics, and names the averages in the training state."""
    averages_buffers: ClassVar[bool]
    """Whether buffers of floating-point numbers are averaged; else all are copied."""

    def __init__(
        self,
        every_n_updates: int,
        evaluate_during_training: bool,
        save_path: str | Path | None,
        watch_metric: str,
        greater_is_better: bool,
    ) -> None:
        """Hold when to average, and what to watch.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        way_out = "Use 1 to average after each update."
        self.every_n_updates = check_whole_number("every_n_updates", every_n_updates, way_out)
        self.evaluate_during_training = check_flag("evaluate_during_training", evaluate_during_training)
        way_out = "Pass the name of a file, or None to export nothing."
        self.save_path = None if save_path is None else check_place_in_reach("save_path", save_path, way_out)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.num_updates = 0
        """Updates whose weights are in the average."""
        self.best_metric: float | None = None
        self.best_metric_epoch: int | None = None
        """Epoch of the best value, from 1."""
        self.weights: AveragedWeights | None = None
        """The averages; None before the first run."""
        self._exported: Exported | None = None
        self._is_main_process = True
        self._loaded_state: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a subclass says

    def average_in(self, averages: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Change the averages in place by the values of one more update."""
        raise NotImplementedError

    def updates_of_call(self, trainer: Trainer) -> int:
        """Return the updates that this call of `train`, or that which it resumes, has completed."""
        return trainer.run_progress.updates_completed - trainer.run_progress.updates_before_stage

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the weights after the latest update are averaged."""
        return self.updates_of_call(trainer) % self.every_n_updates == 0

    def has_average(self) -> bool:
        """Whether there is something to evaluate and to export."""
        return True

    def complete(self, trainer: Trainer, model: nn.Module) -> None:
        """Compute what the averaged model needs besides averages. Every process takes part."""

    # ------------------------------------------------------------------ events

    @property
    def averaged_model(self) -> nn.Module | None:
        """The averaged model, unwrapped, in eval mode and without gradients.

        None before the first run, and with FSDP2 and tensor parallelism, where each process averages the
        parts that it holds.
        """
        return None if self.weights is None else self.weights.model

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin with the weights of the model, in a later stage too, which keeps the best value."""
        owner = type(self).__name__
        if trainer.engine.shards_parameters and not ShardedAverage.is_possible(trainer.model):
            raise ConfigurationError(
                f"{owner} cannot average a model that {trainer.engine.name} has sharded. Use DDP or FSDP2, "
                f"or leave {owner} out."
            )
        if self.save_path is not None:
            check_export_path(trainer, self, self.save_path)
        self._begin(trainer)
        if self._is_evaluated(trainer):
            self._check_is_only_one(trainer)
            self.watched.begin(trainer)
        if trainer.run_progress.stage == 1:
            self.best_metric = None
            self.best_metric_epoch = None

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Average the weights of this update in, if it is due."""
        if self.is_due(trainer) and self.weights is not None:
            self.average_in(*self.weights.follow())
            self.num_updates += 1

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Evaluate the average after each epoch in which the model is, and before the first update.

        An export by a metric that is recorded in mid-epoch follows it.
        """
        if self._is_evaluated(trainer) and self.has_average() and not is_intermediate:
            self.evaluate(trainer, f"{self.model_name}_eval", is_intermediate=False)
        self._export_if_best(trainer, self.watched.new_value_in_mid_epoch(trainer))

    def evaluate(self, trainer: Trainer, metric_prefix: str, is_intermediate: bool) -> None:
        """Evaluate the average on the data of the evaluation that has just ended."""
        with self._completed(trainer) as model:
            trainer.run_eval_epoch(None, metric_prefix, is_intermediate, model=model)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Export the average if it is the best so far."""
        if self._is_evaluated(trainer) and self.has_average():
            self._export_if_best(trainer, self.watched.new_value_of_epoch(trainer))

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Export an average that was not evaluated, or say if the export is not this run's best any more."""
        # A run that a signal ended continues from its state, and has no time for more.
        if trainer.agreement.signal_number or not self.has_average():
            return
        if not self._is_evaluated(trainer):
            self._export(trainer, None)
        elif self.save_path is not None and self._exported is not None:
            path, exported = self.save_path, self._exported
            reason = run_on_main(
                lambda: why_not_own(path, exported, self.watched.name), trainer.is_main_process
            )
            if reason is not None:
                notify(trainer, f"The best average of {type(self).__name__} is not there any more: {reason}.")

    def on_run_close(self, trainer: Trainer) -> None:
        """Leave an average that computes as its weights are, whatever the precision of the run."""
        if self.weights is not None and trainer.engine.prepared is not None:
            self.weights.release()

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Continue with the averages of the state, or begin with its weights if it has none."""
        state = self._loaded_state
        self._loaded_state = None
        # The model has its weights of the state only now, after `on_training_run_start`.
        weights = self._begin(trainer)
        if state is None:
            self.best_metric = None
            self.best_metric_epoch = None
            notify(
                trainer,
                f"'{path}' has no averages, so {type(self).__name__} starts from the weights in it.",
            )
            return
        self.num_updates = state["num_updates"]
        self.best_metric = state["best_metric"]
        self.best_metric_epoch = state["best_metric_epoch"]
        # States of earlier versions do not know what was exported.
        exported = state.get("exported")
        self._exported = None if exported is None else cast(Exported, dict(exported))
        self.watched.load_state_dict(state)
        weights.load(state[self.model_name], trainer.load_partial_states)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the best value; the main process's part holds the parameters."""
        if self.weights is None:
            return {}
        return {
            "num_updates": self.num_updates,
            "best_metric": self.best_metric,
            "best_metric_epoch": self.best_metric_epoch,
            "exported": None if self._exported is None else dict(self._exported),
            **self.watched.state_dict(),
            self.model_name: self.weights.state(self._is_main_process),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold `state` until `on_checkpoint_loaded`, when the model has the weights of the state."""
        self._loaded_state = state

    # ------------------------------------------------------------------ helpers

    def _begin(self, trainer: Trainer) -> AveragedWeights:
        self.num_updates = 0
        self._is_main_process = trainer.is_main_process
        model = trainer.get_model(keep_torch_compile=False)
        owner, is_sharded = type(self).__name__, trainer.engine.shards_parameters
        self.weights = AveragedWeights(model, owner, is_sharded, self.averages_buffers)
        return self.weights

    def _is_evaluated(self, trainer: Trainer) -> bool:
        return self.evaluate_during_training and trainer.eval_dataloader is not None

    def _check_is_only_one(self, trainer: Trainer) -> None:
        """Raise if another callback evaluates an average under the same names."""
        others = [each for each in trainer.callbacks if each is not self and type(each) is type(self)]
        if any(other._is_evaluated(trainer) for other in others):
            raise ConfigurationError(
                f"Two callbacks record '{self.model_name}_eval_loss_epoch', so the run history would have "
                "two values of it per evaluation. Pass evaluate_during_training=False to one of them."
            )

    @contextlib.contextmanager
    def _completed(self, trainer: Trainer) -> Iterator[nn.Module]:
        """Give the model with the averages, and with all that it needs besides."""
        with cast(AveragedWeights, self.weights).standing_in() as model:
            self.complete(trainer, cast(nn.Module, model))
            yield cast(nn.Module, model)

    def _export_if_best(self, trainer: Trainer, value: float | None) -> None:
        if value is None or not (self.has_average() and self.watched.is_better(value, self.best_metric)):
            return
        if self._export(trainer, value):
            self.best_metric = value
            self.best_metric_epoch = trainer.run_history.current_epoch
            update = trainer.run_progress.updates_completed
            self._exported = {"run_id": trainer.run_id, "update": update, "value": value}

    def _export(self, trainer: Trainer, value: float | None) -> bool:
        """Export the average, and return whether it may count as the best. Every process takes part."""
        with self._completed(trainer) as model:
            if self.save_path is None:
                return True
            content = {} if value is None else {self.watched.name: value}
            flags = {"save_optimizer": False, "save_scheduler": False}
            return export_to(trainer, self.save_path, content, **flags, model=model)
