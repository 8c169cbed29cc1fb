"""ModelAverageCallback: keep the plain mean of weights of many updates, evaluate and export it."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from accel_core import ConfigurationError
from accel_core.extending import (
    broadcast_tensors,
    check_choice,
    check_flag,
    check_whole_number,
    reading_training_data,
    run_on_main,
)

from .averaging import AveragingCallback
from .batch_norm_statistics import normalising_modules, update_statistics

if TYPE_CHECKING:
    from accel_core import Trainer


class ModelAverageCallback(AveragingCallback):
    """Average the weights after every n-th update of the later part of a run.

    With `average="mean"` it is the mean of all of them: stochastic weight averaging, or a tail average. With
    `"latest"` it is the mean of the last `num_latest` of them, which keeps as many copies of the parameters.
    Use a constant or a cyclic learning rate in the part that is averaged.

    Buffers are those of the model. The statistics of batch norm fit no average of weights, so they are
    computed again by a forward pass over the training data, before each evaluation of the average. That is an
    additional epoch without backward passes; with `evaluate_during_training=False` there is one at the end.

    After each epoch the average is evaluated like the model, with the same metrics:
    `average_model_eval_loss_epoch`, `average_model_accuracy`. Before the first weights are averaged there is
    nothing to evaluate. It is exported whenever the watched metric was better than ever before, or once at
    the end of the run if it is not evaluated. Training is bit-identical with and without this callback. The
    averages are saved with the training state; each new call of `train` begins with new ones.

    Source:
        SWA: https://arxiv.org/abs/1803.05407. Means of the latest weights: https://arxiv.org/abs/2209.14981.
    """

    order = 21
    """Among averages, which come before callbacks that log, watch or save."""
    model_name = "average_model"
    averages_buffers = False

    def __init__(
        self,
        average: str = "mean",
        start_update: int = 0,
        every_n_updates: int = 1,
        evaluate_during_training: bool = True,
        save_path: str | Path | None = "average_model.pt",
        watch_metric: str = "average_model_eval_loss_epoch",
        greater_is_better: bool = False,
        *,
        num_latest: int = 5,
        update_batch_norm: bool = True,
    ) -> None:
        """Hold what to average.

        Args:
            average: `"mean"` of all weights that are taken, or of the `"latest"`.
            start_update: updates of this call of `train` before averaging begins. The first weights are those
                after update `start_update + every_n_updates`.
            every_n_updates: the number of updates in an epoch takes weights once an epoch.
            evaluate_during_training: evaluate after each epoch, if `train` has an `eval_dataset`.
            save_path: path or address of the export, which holds weights and the value of `watch_metric`;
                None exports nothing.
            watch_metric: name of the metric in the run history.
            greater_is_better: the best value is the greatest, and not the smallest.
            num_latest: weights in an average of the latest.
            update_batch_norm: compute the statistics of batch norm again. False takes those of the model.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        super().__init__(
            every_n_updates, evaluate_during_training, save_path, watch_metric, greater_is_better
        )
        self.average = check_choice("average", average, ("mean", "latest"))
        way_out = "Use 0 to average from the beginning."
        self.start_update = check_whole_number("start_update", start_update, way_out, at_least=0)
        self.num_latest = check_whole_number("num_latest", num_latest, "Use 5 for the mean of the last five.")
        self.update_batch_norm = check_flag("update_batch_norm", update_batch_norm)
        self._latest: deque[list[torch.Tensor]] = deque(maxlen=self.num_latest)
        self._statistics_of = 0
        """Value of `num_updates` for which the statistics of batch norm were computed."""

    @property
    def average_model(self) -> nn.Module | None:
        """The averaged model, unwrapped, in eval mode and without gradients; None before the first run.

        It is None with FSDP2 and tensor parallelism too, where each process averages the parts that it holds.
        """
        return self.averaged_model

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin with no weights; raise `ConfigurationError` if the run is too short for an average."""
        if trainer.engine.shards_parameters:
            self._check_engine(trainer)
        super().on_training_run_start(trainer)
        planned = trainer.run_config.num_update_steps
        first = self.start_update + self.every_n_updates
        if planned is not None and planned < first:
            way_out = (
                f"start_update of at most {planned - self.every_n_updates}"
                if planned >= self.every_n_updates
                else f"every_n_updates of at most {planned}, and start_update=0"
            )
            raise ConfigurationError(
                f"start_update is {self.start_update} and every_n_updates {self.every_n_updates}, so the "
                f"first weights would be averaged after update {first}, but the run has {planned} updates. "
                f"Pass {way_out}."
            )
        self._latest.clear()
        self._statistics_of = 0

    def _check_engine(self, trainer: Trainer) -> None:
        name = trainer.engine.name
        if self.average == "latest":
            raise ConfigurationError(
                f"average is 'latest', but {name} has sharded the model, so no process has whole weights to "
                "keep. Pass average='mean'."
            )
        if self.update_batch_norm and normalising_modules(trainer.model, trainer.model):
            raise ConfigurationError(
                "update_batch_norm is True, but the statistics of batch norm cannot be computed for a model "
                f"that {name} has sharded. Pass update_batch_norm=False to use those of the model, or use "
                "DDP."
            )

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the weights after the latest update are averaged."""
        updates = self.updates_of_call(trainer) - self.start_update
        return updates > 0 and updates % self.every_n_updates == 0

    def has_average(self) -> bool:
        """Whether any weights are averaged yet."""
        return self.num_updates > 0

    def begins_later(self, name: str) -> bool:
        """Whether a metric called `name` may be recorded in a later epoch only."""
        return f"{self.model_name}_" in name and not self.has_average()

    def average_in(self, averages: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Take the weights of one more update."""
        mean = get_swa_multi_avg_fn()
        if self.average == "mean":
            mean(averages, values, self.num_updates)
            return
        self._latest.append([value.detach().clone() for value in values])
        for number, each in enumerate(self._latest):
            mean(averages, each, number)

    def complete(self, trainer: Trainer, model: nn.Module) -> None:
        """Compute the statistics of batch norm. Every process takes part."""
        if self._statistics_of == self.num_updates or not self.update_batch_norm:
            return
        wanted = normalising_modules(model, trainer.get_model(keep_torch_compile=False))
        if wanted:
            with reading_training_data(trainer, model) as batches:
                update_statistics(trainer, model, wanted, batches)
        self._statistics_of = self.num_updates

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, the best value, and on the main process the latest weights."""
        state = super().state_dict()
        if state:
            kept = self._is_main_process
            state["latest"] = [weights if kept else [] for weights in self._latest]
            state["statistics_of"] = self._statistics_of
        return state

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Continue with the averages and the latest weights of the state."""
        state = self._loaded_state
        super().on_checkpoint_loaded(trainer, path)
        self._latest.clear()
        self._statistics_of = 0
        if state is None or self.weights is None:
            return
        self._statistics_of = state["statistics_of"]
        averages, latest = self.weights.averages, state["latest"]
        # The latest weights of a model that has changed since make no average with its own.
        if not run_on_main(
            lambda: all(_are_alike(each, averages) for each in latest), trainer.is_main_process
        ):
            return
        # A smaller `num_latest` than that of the state keeps the newest.
        for saved in latest:
            kept = [torch.empty_like(average) for average in averages]
            for value, each in zip(kept, saved, strict=False):
                value.copy_(each)
            broadcast_tensors(kept)
            self._latest.append(kept)


def _are_alike(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return [each.shape for each in tensors] == [each.shape for each in others]
