"""OptunaPruningCallback: reports evaluations to a trial of Optuna, and stops a trial that is not worth it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from accel_core import ConfigurationError, TrainerCallback

from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer

_REASON = "Optuna has pruned trial"
"""Begins the reason of a stop, by which all processes know whose it is."""


class OptunaPruningCallback(TrainerCallback):
    """Report each value of a metric to a trial, and end the trial if Optuna asks for it.

    The main process reports and asks; all processes stop after the same update. When everything is closed,
    `train` raises `optuna.TrialPruned` on every process. What is tried and what is pruned is Optuna's choice.
    """

    runs_in_replay = False
    order = 810
    """After all that record metrics, wherever they are listed."""
    argument_sources: ClassVar[dict[str, str]] = {"watch_metric": "watched.name"}

    def __init__(self, trial: Any, watch_metric: str = "eval_loss_epoch") -> None:
        """Hold the trial.

        Args:
            trial: the `optuna.Trial`; processes other than the main one may pass None.
            watch_metric: its name in the run history. The direction is that of the study.

        Raises:
            ConfigurationError: an argument cannot be used, or Optuna is not installed.
        """
        try:
            self._optuna = importlib.import_module("optuna")
        except ImportError:
            raise ConfigurationError(
                "OptunaPruningCallback needs the package 'optuna', which is not installed. Install it with: "
                'pip install "accel-callbacks[optuna]"'
            ) from None
        if trial is not None and not (hasattr(trial, "report") and hasattr(trial, "should_prune")):
            raise ConfigurationError(
                f"trial is {trial!r}, but must be a trial of Optuna. Pass the one that Optuna gives to your "
                "objective."
            )
        self.trial = trial
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better=False)
        self._reported = 0
        """The update whose value was reported last."""
        self._pruned: str | None = None

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin to report.

        Raises:
            ConfigurationError: the metric will not be recorded, or the main process has no trial.
        """
        if trainer.is_main_process and self.trial is None:
            raise ConfigurationError(
                "trial is None on the main process, which reports to Optuna. Pass the trial that Optuna "
                "gives to your objective."
            )
        self.watched.check_will_be_recorded(trainer)
        self._reported = 0
        self._pruned = None

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Report an evaluation in mid-epoch."""
        if is_intermediate:
            self._report(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Report the value of the epoch. Raises `ConfigurationError` if there is no such metric at all."""
        self.watched.new_value_of_epoch(trainer)
        self._report(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Note whether all processes have stopped for this trial."""
        reason = trainer.stop_reason
        if reason is not None and reason.startswith(_REASON):
            self._pruned = reason

    def on_run_close(self, trainer: Trainer) -> None:
        """Raise `TrialPruned`; the others close their files nevertheless."""
        pruned, self._pruned = self._pruned, None
        if pruned is not None:
            raise self._optuna.TrialPruned(pruned)

    def _report(self, trainer: Trainer) -> None:
        if not trainer.is_main_process:
            return
        for record in reversed(trainer.run_history.get_records()):
            if record["update"] <= self._reported:
                return
            if record["name"] == self.watched.name:
                self._reported = record["update"]
                self.trial.report(record["value"], step=record["update"])
                if self.trial.should_prune():
                    value = f"{self.watched.name} is {record['value']:.6g} after update {record['update']}"
                    trainer.request_stop(f"{_REASON} {self.trial.number}: {value}")
                return
