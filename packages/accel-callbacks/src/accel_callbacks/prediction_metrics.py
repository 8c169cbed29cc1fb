"""PredictionMetricsCallback: record what functions compute from all predictions of an evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from accel_core import ConfigurationError
from accel_core.extending import check_callable, gather_on_main, preview, run_on_main, to_cpu

from .metrics import outputs_and_targets
from .recorded_names import RecordsMetrics

if TYPE_CHECKING:
    from accel_core import Trainer

Collect = Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]


class PredictionMetricsCallback(RecordsMetrics):
    """Record metrics that need all predictions of an evaluation at once, in the style of scikit-learn.

    After each evaluation the main process calls `fn(outputs, targets)` for each metric, with those of all
    samples of all processes, each once, in the order of the data (batches that a collate function leaves out
    are skipped). They are on the CPU, without gradients. So the value is the same on any number of processes.

    A metric `roc_auc` is recorded as `roc_auc` for the evaluations of a training run, `intermediate_roc_auc`
    in mid-epoch, `evaluation_roc_auc` by `evaluate`, `ema_model_roc_auc` for averaged weights, and
    `shifted_roc_auc` for the evaluation set `shifted`.

    All predictions have to fit in the memory of the main process. `MetricsCallback` adds up batch by batch,
    and is the better choice for what torchmetrics can add up.
    """

    def __init__(
        self,
        metrics: Mapping[str, Callable[[Any, Any], float]],
        collect: Collect | None = None,
        prefix: str = "",
        on: str = "eval",
    ) -> None:
        """Hold the functions.

        Args:
            metrics: functions by name, each called as `fn(outputs, targets)`. They return a number.
            collect: called as `collect(batch, batch_output)` for each batch, and returns what to keep of its
                outputs and targets: tensors of shape (samples, ...), which are concatenated; lists of one
                item a sample, of any size each, which are put one behind the other; or tuples and mappings
                of those. By default `batch_output["model_outputs"]` and `batch[1]`, or the outputs' `logits`
                and `batch["labels"]` if batches are mappings.
            prefix: beginning of each name.
            on: `"eval"`, the only choice: outputs of training come from different weights in each batch.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.metrics = _checked(metrics)
        check_callable("collect", collect, "Pass collect=lambda batch, batch_output: ..., or leave it out.")
        if not isinstance(prefix, str):
            raise ConfigurationError(
                f"prefix is {preview(prefix)}, but must be a string. Pass 'test_', for example."
            )
        if on != "eval":
            raise ConfigurationError(
                f"on is {preview(on)}, but PredictionMetricsCallback measures evaluations only. Pass 'eval', "
                "and use MetricsCallback(..., on='train') for metrics of training."
            )
        self.collect = _outputs_and_targets if collect is None else collect
        self.prefix = prefix
        self.on = on
        self._collected: list[tuple[Any, Any]] = []

    def _recorded_names(self) -> set[str]:
        """Return the names that the metrics are recorded as, without those of evaluation sets."""
        return {f"{self.prefix}{name}" for name in self.metrics}

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Check the names."""
        self._check_names(trainer)

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Check the names."""
        self._check_names(trainer)

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Begin with nothing, also after an evaluation that failed."""
        self._collected = []

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """Keep outputs and targets of a batch; raise `ConfigurationError` if `collect` gives others."""
        collected = self.collect(batch, batch_output)
        if not isinstance(collected, tuple) or len(collected) != 2:
            raise ConfigurationError(
                f"collect returned {preview(collected)}, but must return a tuple of outputs and targets. "
                "Return batch_output['model_outputs'], batch[1], for example."
            )
        # On the CPU, since the outputs of a whole data set seldom fit beside the model.
        self._collected.append(to_cpu(collected))

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Compute and record the metrics. Every process takes part."""
        group = trainer.data_group
        collected, self._collected = self._collected, []
        # Processes that hold one copy of the model together have read the same batches.
        by_share = [collected] if group.is_single else group.one_of_each_copy(gather_on_main(collected))
        for name, value in run_on_main(lambda: self._compute(by_share), group.is_main).items():
            trainer.run_history.update_metric(f"{self.prefix}{name}", value)

    def _compute(self, by_share: list[list[tuple[Any, Any]]]) -> dict[str, float]:
        # The batches were dealt out in turn, and a process may have fewer than others.
        steps = itertools.zip_longest(*by_share)
        batches = [batch for step in steps for batch in step if batch is not None]
        if not batches:
            return {}
        outputs, targets = _join("outputs", batches, 0), _join("targets", batches, 1)
        return {name: _number(name, fn(outputs, targets)) for name, fn in self.metrics.items()}


def _checked(metrics: Any) -> dict[str, Callable[[Any, Any], float]]:
    if (
        isinstance(metrics, Mapping)
        and metrics
        and all(isinstance(name, str) and name and callable(fn) for name, fn in metrics.items())
    ):
        return dict(metrics)
    raise ConfigurationError(
        f"metrics is {preview(metrics)}, but must be a dict of functions by name. Pass "
        "{'roc_auc': lambda outputs, targets: roc_auc_score(targets, outputs)}, for example."
    )


def _outputs_and_targets(batch: Any, batch_output: Mapping[str, Any]) -> tuple[Any, Any]:
    way_out = "collect=lambda batch, batch_output: (batch_output['model_outputs'], batch['labels'])"
    return outputs_and_targets(batch, batch_output, "collect", way_out)


def _join(what: str, batches: list[tuple[Any, Any]], place: int) -> Any:
    return _joined(what, [batch[place] for batch in batches])


def _joined(what: str, parts: list[Any]) -> Any:
    """Return the parts of all batches as one, in their structure."""
    first = parts[0]
    if all(isinstance(part, torch.Tensor) and part.ndim for part in parts):
        shapes = sorted({tuple(part.shape[1:]) for part in parts})
        if len(shapes) > 1:
            raise ConfigurationError(
                f"The {what} of batches have samples of the shapes {shapes}, which cannot be concatenated. "
                "Return lists of one item a sample from collect, such as list(boxes), or pad them there."
            )
        return torch.cat(parts)
    if all(isinstance(part, list) for part in parts):
        return [item for part in parts for item in part]
    if isinstance(first, Mapping) and all(part.keys() == first.keys() for part in parts):
        return {key: _joined(what, [part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and all(len(part) == len(first) for part in parts):
        return tuple(_joined(what, list(column)) for column in zip(*parts, strict=True))
    raise ConfigurationError(
        f"The {what} of a batch are {preview(first)}, but must be a tensor with a first dimension of "
        "samples, a list of one item a sample, or a tuple or mapping of those. Each batch needs the same "
        "kind. Choose what to keep by collect=lambda batch, batch_output: (..., ...)."
    )


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"The metric {name!r} is {preview(value)}, but must be one number. Return float(value), and give "
            "several values a function each."
        ) from error
