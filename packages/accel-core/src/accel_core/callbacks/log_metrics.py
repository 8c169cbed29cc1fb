"""LogMetricsCallback prints the metrics of an epoch in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .callback import TrainerCallback

if TYPE_CHECKING:
    from ..trainer import Trainer


class LogMetricsCallback(TrainerCallback):
    """Print what was recorded in an epoch, or in an evaluation.

    Override `log_metrics` to send it elsewhere.
    """

    # After callbacks that record metrics, and before those that read them to stop or save.
    order: ClassVar[int] = 50

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Log the metrics of the epoch."""
        self._log_since(trainer, trainer.run_history.current_epoch)

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Remember what was recorded before."""
        # An evaluation has no epoch of its own by which its records could be found.
        self._num_records_before = len(trainer.run_history.get_records())

    def on_evaluation_run_end(self, trainer: Trainer) -> None:
        """Log the metrics of the evaluation."""
        records = trainer.run_history.get_records()[self._num_records_before :]
        self.log_metrics(trainer, {record["name"]: record["value"] for record in records})

    def _log_since(self, trainer: Trainer, epoch: int) -> None:
        records = trainer.run_history.get_records()
        # Read from the end: a long history is not searched in every epoch.
        first = len(records)
        while first and records[first - 1]["epoch"] == epoch:
            first -= 1
        self.log_metrics(trainer, {record["name"]: record["value"] for record in records[first:]})

    def log_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Print `metrics`, the newest value by name. Called on every process; `trainer.print` prints once."""
        trainer.print("  ".join(f"{name}: {value:.4g}" for name, value in metrics.items()))
