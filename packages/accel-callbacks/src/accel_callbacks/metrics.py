"""MetricsCallback: update, compute and record metrics of torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from accel_core import ConfigurationError
from accel_core.extending import (
    all_gather_object,
    check_callable,
    check_choice,
    preview,
    run_on_main,
)

from .recorded_names import RecordsMetrics

if TYPE_CHECKING:
    from accel_core import Trainer
    from accel_core.extending import DataGroup

Update = Callable[[Any, Any, Mapping[str, Any]], None]


class MetricsCallback(RecordsMetrics):
    """Record metrics of each evaluation, of training, or of both, exactly on any number of processes.

    A metric `accuracy` is recorded as `accuracy` for the evaluations of a training run, `train_accuracy`
    for training, `intermediate_accuracy` in mid-epoch, `evaluation_accuracy` by `evaluate`, and
    `ema_model_accuracy` for averaged weights.
    """

    def __init__(
        self, metrics: Any, update: Update | None = None, prefix: str = "", on: str = "eval"
    ) -> None:
        """Hold the metrics.

        Args:
            metrics: a `torchmetrics.Metric`, a `MetricCollection`, or a dict of metrics by name.
            update: called as `update(metric, batch, batch_output)` for each metric and batch. By default it
                is `metric.update(batch_output["model_outputs"], batch[1])`, or `metric.update` of the
                outputs' `logits` and `batch["labels"]` if batches are mappings.
            prefix: beginning of each name.
            on: what is measured, `"train"`, `"eval"` or `"both"`.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        check_choice("on", on, ("train", "eval", "both"))
        check_callable(
            "update", update, "Pass update=lambda metric, batch, batch_output: ..., or leave it out."
        )
        if not isinstance(prefix, str):
            raise ConfigurationError(
                f"prefix is {preview(prefix)}, but must be a string. Pass 'test_', for example."
            )
        self._metrics = _by_name(metrics)
        self.update = _update_with_outputs_and_targets if update is None else update
        self.prefix = prefix
        self.on = on
        # Copies, since an evaluation in mid-epoch must not touch the sums of the epoch.
        self._train_metrics = (
            {name: metric.clone() for name, metric in self._metrics.items()} if on != "eval" else {}
        )
        self._eval_metrics = self._metrics if on != "train" else {}
        self._num_processes = 1

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Move the metrics to the device."""
        self._num_processes = trainer.data_group.size
        self._check_names(trainer)
        self._move(trainer.device)

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Move the metrics to the device."""
        self._check_names(trainer)
        self._move(trainer.device)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Reset the metrics of training."""
        _reset(self._train_metrics)

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Add a batch."""
        # The outputs still have their graph, which the sums would keep alive.
        with torch.no_grad():
            self._add(self._train_metrics, batch, batch_output)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Record the metrics of the epoch, unless a stop cut it short."""
        # A resumed run continues with an epoch that was cut short, and records it then.
        if trainer.run_progress.train_epoch_completed or trainer.stop_reason is None:
            self._record(trainer, self._train_metrics, "train_")

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Reset the metrics of evaluation."""
        _reset(self._eval_metrics)

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """Add a batch."""
        self._add(self._eval_metrics, batch, batch_output)

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Record the metrics of the evaluation."""
        self._record(trainer, self._eval_metrics, "")

    def state_dict(self) -> dict[str, Any]:
        """Return what this process has added to the metrics of training in the current epoch."""
        if not self._train_metrics:
            return {}
        states = {name: _states_of(metric) for name, metric in self._train_metrics.items()}
        return {"num_processes": self._num_processes, "metrics": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the sums of `state`.

        Sums of another number of processes cannot be divided, so the metrics then cover only the rest of the
        epoch.
        """
        _reset(self._train_metrics)
        if state["num_processes"] == self._num_processes:
            for name, metric in self._train_metrics.items():
                if name in state["metrics"]:
                    _set_states(metric, [state["metrics"][name]])

    def _recorded_names(self) -> set[str]:
        """Return the names that the metrics are recorded as, without those of evaluation sets."""
        return {
            f"{start}{self.prefix}" + f"{name}_{key}".strip("_")
            for start, metrics in (("train_", self._train_metrics), ("", self._eval_metrics))
            for name, metric in metrics.items()
            for key in (metric.keys() if isinstance(metric, torch.nn.ModuleDict) else [""])
        }

    def _move(self, device: torch.device) -> None:
        for metric in (*self._train_metrics.values(), *self._eval_metrics.values()):
            metric.to(device)

    def _add(self, metrics: dict[str, Any], batch: Any, batch_output: dict[str, Any]) -> None:
        for metric in metrics.values():
            self.update(metric, batch, batch_output)

    def _record(self, trainer: Trainer, metrics: dict[str, Any], prefix: str) -> None:
        """Compute over all processes, and record the same on each. Every process takes part."""
        for name, metric in metrics.items():
            for key, number in compute_over_processes(name, metric, trainer.data_group).items():
                trainer.run_history.update_metric(f"{prefix}{self.prefix}{key}", number)


def compute_over_processes(name: str, metric: Any, group: DataGroup) -> dict[str, float]:
    """Return the values of `metric`, or of a collection, over what all processes have added to it.

    Returns nothing if no process has added a batch. Every process takes part.
    """
    # What torchmetrics does by itself waits forever if states are lists of different lengths, and counts a
    # process without a batch into means. So the states are gathered whole, and the main process computes.
    # Processes that read the same batches have the same sums.
    if group.is_single:
        is_updated = any(single.update_count for single in _singles(metric))
        return _numbers(name, metric.compute()) if is_updated else {}
    by_process = group.one_of_each_copy(all_gather_object(_states_of(metric)))
    if not any(single["updates"] for states in by_process for single in states):
        return {}

    def compute() -> dict[str, float]:
        merged = metric.clone()
        for single in _singles(merged):
            # All states are here, so torchmetrics must not gather them again on this process only.
            single._to_sync = False
        _set_states(merged, by_process)
        return _numbers(name, merged.compute())

    return run_on_main(compute, group.is_main)  # type: ignore[no-any-return]


def _by_name(metrics: Any) -> dict[str, Any]:
    if isinstance(metrics, Mapping) and not hasattr(metrics, "compute"):
        by_name = dict(metrics)
    elif isinstance(metrics, torch.nn.ModuleDict):
        # A collection names its metrics itself, and updates those that share sums only once.
        by_name = {"": metrics}
    else:
        # MulticlassF1Score becomes f1_score.
        name = re.sub("^(Binary|Multiclass|Multilabel)", "", type(metrics).__name__)
        by_name = {re.sub("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower(): metrics}
    if all(hasattr(metric, "compute") and not isinstance(metric, type) for metric in by_name.values()):
        return by_name
    raise ConfigurationError(
        f"metrics is {preview(metrics)}, but must be a torchmetrics Metric, a MetricCollection or a dict of "
        "them by name. Pass {'accuracy': MulticlassAccuracy(num_classes=10)}, for example."
    )


def _update_with_outputs_and_targets(metric: Any, batch: Any, batch_output: Mapping[str, Any]) -> None:
    way_out = (
        "update=lambda metric, batch, batch_output: "
        "metric.update(batch_output['model_outputs'], batch['labels'])"
    )
    metric.update(*outputs_and_targets(batch, batch_output, "update", way_out))


def outputs_and_targets(
    batch: Any, batch_output: Mapping[str, Any], argument: str, way_out: str
) -> tuple[Any, Any]:
    """Return what metrics compare if their user does not choose by `argument`, as `way_out` shows."""
    if "model_outputs" not in batch_output:
        raise ConfigurationError(
            f"The step returned the keys {list(batch_output)}, but without {argument} the metrics need "
            f"'model_outputs'. Return them from calculate_eval_batch_loss, or pass {argument}."
        )
    outputs = batch_output["model_outputs"]
    # As the default loss step unpacks a batch, or as models of transformers name its entries.
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return outputs, batch[1]
    if isinstance(batch, Mapping) and "labels" in batch:
        return getattr(outputs, "logits", outputs), batch["labels"]
    raise ConfigurationError(
        f"A batch is a {type(batch).__name__}, but without {argument} the metrics are given batch[1] as "
        f"targets. Pass, for example, {way_out}."
    )


def _reset(metrics: dict[str, Any]) -> None:
    for metric in metrics.values():
        metric.reset()


def _singles(metric: Any) -> list[Any]:
    """Return every metric in `metric`: itself, those of a collection, those inside a wrapper.

    They are in the same order on every process.
    """
    return [module for module in metric.modules() if hasattr(module, "_reductions")]


def _states_of(metric: Any) -> list[dict[str, Any]]:
    """Return the sums of this process, on the CPU."""
    return [
        {
            "updates": single.update_count,
            "state": {key: _moved(getattr(single, key), "cpu") for key in single._reductions},
        }
        for single in _singles(metric)
    ]


def _set_states(metric: Any, by_process: list[list[dict[str, Any]]]) -> None:
    """Give `metric` the sums of the processes that had a batch, reduced as each state asks for."""
    for number, single in enumerate(_singles(metric)):
        # The initial state of a process without a batch would pull a mean to zero.
        parts = [states[number] for states in by_process if states[number]["updates"]]
        single._update_count = sum(part["updates"] for part in parts)
        # torchmetrics keeps what it has computed until the next update.
        single._computed = None
        for key, reduction in single._reductions.items():
            values = [_moved(part["state"][key], single.device) for part in parts]
            if values:
                setattr(single, key, values[0] if len(values) == 1 else _reduced(values, reduction))


def _reduced(values: list[Any], reduction: Any) -> Any:
    if isinstance(values[0], list):
        return [item for value in values for item in value]
    stacked = torch.stack(values)
    return stacked if reduction is None else reduction(stacked)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Return numbers by name.

    Those of a dict are named after its keys too, and those of a vector after their indices.
    """
    if isinstance(value, Mapping):
        return {
            key: number
            for k, v in value.items()
            for key, number in _numbers(f"{name}_{k}".lstrip("_"), v).items()
        }
    tensor = torch.as_tensor(value)
    if tensor.ndim == 1 and tensor.numel() > 1:
        return {f"{name}_{index}": number for index, number in enumerate(map(float, tensor))}
    if tensor.numel() != 1:
        raise ConfigurationError(
            f"The metric {name!r} gives a tensor of shape {tuple(tensor.shape)}, but must give a number, a "
            "vector or a dict. Compute it in your own callback, and keep it there."
        )
    return {name: float(tensor)}
