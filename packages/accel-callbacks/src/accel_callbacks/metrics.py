"""MetricsCallback: metrics of torchmetrics, moved, reset, computed and recorded without help."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from accel_core import ConfigurationError, TrainerCallback
from accel_core.distributed import gather_values

if TYPE_CHECKING:
    from accel_core import Trainer

Update = Callable[[Any, Any, Mapping[str, Any]], None]


class MetricsCallback(TrainerCallback):
    """Record metrics of each evaluation, of training, or of both, exactly on any number of processes.

    A metric `accuracy` is recorded as `accuracy` for the evaluations of a training run, `train_accuracy` for training,
    `intermediate_accuracy` in mid-epoch, `evaluation_accuracy` by `evaluate`, and `ema_model_accuracy` for averaged weights.
    """

    def __init__(self, metrics: Any, update: Update | None = None, prefix: str = "", on: str = "eval") -> None:
        """Hold the metrics.

        Args:
            metrics: a `torchmetrics.Metric`, a `MetricCollection`, or a dict of metrics by name.
            update: called as `update(metric, batch, batch_output)` for each metric and batch; by default
                `metric.update(batch_output["model_outputs"], batch[1])`.
            prefix: put before each name.
            on: `"train"`, `"eval"` or `"both"`.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        if on not in ("train", "eval", "both"):
            raise ConfigurationError(f"on is {on!r}, but must be one of ['train', 'eval', 'both'].")
        self._metrics = _by_name(metrics)
        self.update = _update_with_outputs_and_targets if update is None else update
        self.prefix = prefix
        self.on = on
        self._train_metrics = {name: metric.clone() for name, metric in self._metrics.items()} if on != "eval" else {}
        self._eval_metrics = self._metrics if on != "train" else {}

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Move the metrics to the device."""
        self._move(trainer.device)

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Move the metrics to the device."""
        self._move(trainer.device)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin anew."""
        _reset(self._train_metrics)

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int) -> None:
        """Add a batch."""
        self._add(self._train_metrics, batch, batch_output)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Record the metrics of the epoch, unless a stop cut it short."""
        if trainer.run_progress.train_epoch_completed or trainer.stop_reason is None:
            self._record(trainer, self._train_metrics, "train_")

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Begin anew."""
        _reset(self._eval_metrics)

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """Add a batch."""
        self._add(self._eval_metrics, batch, batch_output)

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Record the metrics of the evaluation."""
        self._record(trainer, self._eval_metrics, name_prefix(metric_prefix))

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the epoch of training that goes on, as they are on this process."""
        return {
            name: {"state": _plain(metric.metric_state), "updates": metric.update_count}
            for name, metric in self._train_metrics.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of `state`."""
        for name, metric in self._train_metrics.items():
            if name in state:
                metric.reset()
                for key, value in state[name]["state"].items():
                    moved = [part.to(metric.device) for part in value] if isinstance(value, list) else value.to(metric.device)
                    setattr(metric, key, moved)
                metric._update_count = state[name]["updates"]

    def _move(self, device: torch.device) -> None:
        for metric in (*self._train_metrics.values(), *self._eval_metrics.values()):
            metric.to(device)
            for single in metric.values() if isinstance(metric, Mapping | torch.nn.ModuleDict) else [metric]:
                single.dist_sync_fn = single.dist_sync_fn or gather_states

    def _add(self, metrics: dict[str, Any], batch: Any, batch_output: dict[str, Any]) -> None:
        with torch.no_grad():
            for metric in metrics.values():
                self.update(metric, batch, batch_output)

    def _record(self, trainer: Trainer, metrics: dict[str, Any], prefix: str) -> None:
        """Compute over all processes and record; a process without any batch takes part with empty sums."""
        for name, metric in metrics.items():
            if metric.update_count == 0:
                # torchmetrics warns when a metric is computed that was never updated, which is right on one process only.
                metric._update_count = 1
            value = metric.compute()
            values = value if isinstance(value, Mapping) else {name: value}
            for key, number in values.items():
                trainer.run_history.update_metric(f"{prefix}{self.prefix}{key}", number)


def gather_states(state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The `state` of each process that has seen a batch. Every process takes part.

    What torchmetrics does by itself fails where a process has no batch: its empty state has another type and shape.
    """
    states = [part.to(state.device) for part in gather_values(state.cpu())]
    return [part for part in states if part.numel()] or states[:1]


def name_prefix(metric_prefix: str) -> str:
    """From the prefix of an evaluation to that of its metrics: `"intermediate_eval"` gives `"intermediate_"`."""
    return "evaluation_" if metric_prefix == "evaluation" else metric_prefix.removesuffix("eval")


def _by_name(metrics: Any) -> dict[str, Any]:
    if isinstance(metrics, (torch.nn.ModuleDict, Mapping)):
        return dict(metrics.items())
    if hasattr(metrics, "update") and hasattr(metrics, "compute"):
        name = type(metrics).__name__
        for kind in ("Binary", "Multiclass", "Multilabel"):
            name = name.removeprefix(kind)
        return {"".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_"): metrics}
    raise ConfigurationError(
        f"metrics is {metrics!r}, but must be a torchmetrics Metric, a MetricCollection or a dict of them by name. Pass "
        f"{{'accuracy': MulticlassAccuracy(num_classes=10)}}, for example."
    )


def _update_with_outputs_and_targets(metric: Any, batch: Any, batch_output: Mapping[str, Any]) -> None:
    metric.update(batch_output["model_outputs"], batch[1])


def _reset(metrics: dict[str, Any]) -> None:
    for metric in metrics.values():
        metric.reset()


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, list) else value.clone() for key, value in state.items()}
