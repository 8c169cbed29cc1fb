"""ModelEmaCallback: keep an exponential moving average of the model, evaluate and export it."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from accel_core import AccelWarning, ConfigurationError, TrainerCallback
from accel_core.extending import (
    NotFiniteError,
    broadcast_tensors,
    check_path,
    notify,
    run_on_main,
    with_names_of,
    with_plain_names,
)

from .ema_decay import check_decay
from .export_path import Exported, check_export_path, why_not_own
from .model_copy import copy_model, remove_patches
from .sharded_average import ShardedAverage, is_fractional
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class ModelEmaCallback(TrainerCallback):
    """Average the weights over the updates. The average is often better than the weights of any update.

    After update n, counted from 1, each parameter's average is `d * average + (1 - d) * parameter`, where d
    is `decay`, or with `warmup` the smaller of `decay` and `n / (9 + n)`. It begins with the weights that the
    run begins with. Buffers of floating-point numbers (the statistics of batch norm) are averaged alike; all
    others, and those that hold values that are not finite (masks), are copied.

    After each epoch the average is evaluated like the model, with the same metrics:
    `ema_model_eval_loss_epoch`, `ema_model_accuracy`. It is exported whenever the watched metric was better
    than ever before, or once at the end of the run if it is not evaluated. Training is bit-identical with
    and without this callback, and nothing waits for the device after an update. Averages and the best value
    are saved with the training state; each new call of `train` begins with new ones.

    Source:
        Warm-up: `tf.train.ExponentialMovingAverage` of TensorFlow, argument `num_updates`.
    """

    order = 20
    """After callbacks of your own, and before those that log, watch or save, which need its results."""

    argument_sources: ClassVar[dict[str, str]] = {
        "watch_metric": "watched.name",
        "greater_is_better": "watched.greater_is_better",
    }

    def __init__(
        self,
        decay: float = 0.999,
        warmup: bool = True,
        evaluate_during_training: bool = True,
        save_path: str | Path | None = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
    ) -> None:
        """Hold how to average.

        Args:
            decay: part of the average that an update keeps; 0.999 averages over about the last thousand.
            warmup: forget the beginning faster, so that the average is of use in short runs too.
            evaluate_during_training: evaluate after each epoch, if `train` has an `eval_dataset`.
            save_path: path of the export, which holds weights and the value of `watch_metric`; None exports
                nothing.
            watch_metric: name of the metric in the run history.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.decay = check_decay(decay)
        self.warmup = warmup
        self.evaluate_during_training = evaluate_during_training
        way_out = "Pass the name of a file, or None to export nothing."
        self.save_path = None if save_path is None else check_path("save_path", save_path, way_out)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.ema_model: nn.Module | None = None
        """The averaged model, unwrapped, in eval mode and without gradients; None before the first run, and
        with FSDP2 and tensor parallelism, where each process averages the parts that it holds."""
        self.num_updates = 0
        """Updates that are in the average."""
        self.best_metric: float | None = None
        self.best_metric_epoch: int | None = None
        """Epoch of the best value, from 1."""
        self._exported: Exported | None = None
        self._is_main_process = True
        self._loaded_state: dict[str, Any] | None = None
        self._sharded: ShardedAverage | None = None

    def calculate_decay(self, num_updates: int) -> float:
        """Return the part of the average that the next update keeps, when `num_updates` are in it."""
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin with the weights of the model, in a later stage too, which keeps the best value."""
        if trainer.engine.shards_parameters and not ShardedAverage.is_possible(trainer.model):
            raise ConfigurationError(
                f"ModelEmaCallback was given a model that {trainer.engine.name} has spread over the "
                "processes in a way that it cannot average. Use DDP or FSDP2, or leave it out."
            )
        if self.save_path is not None:
            check_export_path(trainer, self, self.save_path)
        self._begin(trainer)
        if self._is_evaluated(trainer):
            self.watched.begin(trainer)
        if trainer.run_progress.stage == 1:
            self.best_metric = None
            self.best_metric_epoch = None

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Average the weights of this update in."""
        averages = [*self._averages]
        values = [*self._values]
        for averaged_module, module, name, is_averaged in self._buffers:
            average, value = getattr(averaged_module, name), getattr(module, name)
            if average.shape != value.shape:
                # A table that grew with the length of the sequences.
                setattr(averaged_module, name, value.detach().clone())
            elif is_averaged:
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        # AveragedModel would wait for the device to count, and average whole numbers.
        get_ema_multi_avg_fn(self.calculate_decay(self.num_updates))(averages, values, self.num_updates)
        self.num_updates += 1

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Evaluate the average after each epoch in which the model is, and before the first update.

        An export by a metric that is recorded in mid-epoch follows it.
        """
        if self._is_evaluated(trainer) and not is_intermediate:
            with self._averaged() as model:
                trainer.run_eval_epoch(metric_prefix="ema_model_eval", model=model)
        self._export_if_best(trainer, self.watched.new_value_in_mid_epoch(trainer))

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Export the average if it is the best so far."""
        if self._is_evaluated(trainer):
            self._export_if_best(trainer, self.watched.new_value_of_epoch(trainer))

    def _export_if_best(self, trainer: Trainer, value: float | None) -> None:
        if (
            value is not None
            and self.watched.is_better(value, self.best_metric)
            and self._export(trainer, value)
        ):
            self.best_metric = value
            self.best_metric_epoch = trainer.run_history.current_epoch
            update = trainer.run_progress.updates_completed
            self._exported = {"run_id": trainer.run_id, "update": update, "value": value}

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Export an average that was not evaluated, or say if the export is not this run's best any more."""
        # A run that a signal ended goes on from its state, and has no time for more.
        if trainer.agreement.signal_number:
            return
        if not self._is_evaluated(trainer):
            self._export(trainer, None)
        elif self.save_path is not None and self._exported is not None:
            path, exported = self.save_path, self._exported
            reason = run_on_main(
                lambda: why_not_own(path, exported, self.watched.name), trainer.is_main_process
            )
            if reason is not None:
                notify(trainer, f"{reason}, which ModelEmaCallback has found best.")

    def on_run_close(self, trainer: Trainer) -> None:
        """Leave an average that computes as its weights are, whatever the precision of the run."""
        if self.ema_model is not None and trainer.engine.prepared is not None:
            remove_patches(self.ema_model)

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Go on with the averages of the state, or begin with its weights if it has none."""
        state = self._loaded_state
        self._loaded_state = None
        # The model has its weights of the state only now, after `on_training_run_start`.
        self._begin(trainer)
        if state is None:
            self.best_metric = None
            self.best_metric_epoch = None
            notify(trainer, f"'{path}' has no averages, so ModelEmaCallback begins with its weights.")
            return
        self.num_updates = state["num_updates"]
        self.best_metric = state["best_metric"]
        self.best_metric_epoch = state["best_metric_epoch"]
        # States of earlier versions do not know what was exported.
        exported = state.get("exported")
        self._exported = None if exported is None else cast(Exported, dict(exported))
        self.watched.load_state_dict(state)
        # Only the main process has saved the parameters.
        if self._sharded is not None:
            self._sharded.load(state["ema_model"])
            return
        model = cast(nn.Module, self.ema_model)
        own = model.state_dict()
        averages = with_names_of(own, state["ema_model"])
        if trainer.load_partial_states:
            # The average of what has another shape begins with the weight, like that of a new layer.
            averages = {name: value for name, value in averages.items() if _fits(own.get(name), value)}
        model.load_state_dict(averages, strict=False)
        broadcast_tensors(self._averages)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the best value; the main process's part holds the parameters."""
        if self._sharded is not None:
            state = self._sharded.state(self._is_main_process)
        elif self.ema_model is None:
            return {}
        else:
            # The parameters of all processes are equal, so one copy is enough; buffers may differ.
            state = self.ema_model.state_dict()
        if self.ema_model is not None and not self._is_main_process:
            parameters = dict(self.ema_model.named_parameters(remove_duplicate=False))
            state = {name: value for name, value in state.items() if name not in parameters}
        return {
            "num_updates": self.num_updates,
            "best_metric": self.best_metric,
            "best_metric_epoch": self.best_metric_epoch,
            "exported": None if self._exported is None else dict(self._exported),
            **self.watched.state_dict(),
            "ema_model": with_plain_names(state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hold `state` until `on_checkpoint_loaded`, when the model has the weights of the state."""
        self._loaded_state = state

    def _begin(self, trainer: Trainer) -> None:
        self.num_updates = 0
        self._is_main_process = trainer.is_main_process
        model = trainer.get_model(keep_torch_compile=False)
        self._sharded = ShardedAverage(model) if trainer.engine.shards_parameters else None
        if self._sharded is not None:
            self._averages, self._values = self._sharded.averages, self._sharded.values
            self._buffers = self._sharded.buffers
            return
        self.ema_model = copy_model(model, "ModelEmaCallback")
        self.ema_model.requires_grad_(False).eval()
        pairs = zip(self.ema_model.parameters(), model.parameters(), strict=True)
        # Whole numbers are quantised weights, which no optimizer changes.
        changing = [(average, value) for average, value in pairs if is_fractional(average)]
        self._averages = [average for average, _ in changing]
        self._values = [value for _, value in changing]
        modules = zip(self.ema_model.modules(), model.modules(), strict=True)
        # With the modules that hold them, since a forward pass may replace a buffer by another tensor.
        self._buffers = [
            (averaged_module, module, name, is_fractional(buffer) and bool(torch.isfinite(buffer).all()))
            for averaged_module, module in modules
            for name, buffer in module.named_buffers(recurse=False)
        ]
        if any(average.element_size() < 4 for average in self._averages):
            warnings.warn(
                "ModelEmaCallback averages parameters of half precision, which is too coarse for its small "
                "changes. Keep the parameters in float32, and use the mixed_precision of the Accelerator.",
                AccelWarning,
            )

    def _averaged(self) -> contextlib.AbstractContextManager[nn.Module | None]:
        """Return a context that gives the model with the averages."""
        sharded = self._sharded
        return contextlib.nullcontext(self.ema_model) if sharded is None else sharded.standing_in()

    def _is_evaluated(self, trainer: Trainer) -> bool:
        return self.evaluate_during_training and trainer.eval_dataloader is not None

    def _export(self, trainer: Trainer, value: float | None) -> bool:
        """Export the average, and return whether it may count as the best. Every process takes part."""
        if self.save_path is None:
            return True
        content = {} if value is None else {self.watched.name: value}
        try:
            with self._averaged() as model:
                trainer.save_checkpoint(
                    self.save_path, content, save_optimizer=False, save_scheduler=False, model=model
                )
        except NotFiniteError as error:
            # The export before is intact, and training itself may still be fine.
            warnings.warn(str(error), AccelWarning)
            return False
        return True


def _fits(own: Any, value: Any) -> bool:
    """Whether `value` has the shape of `own`, which is None if the model has nothing of that name."""
    return own is not None and getattr(own, "shape", None) == getattr(value, "shape", None)
