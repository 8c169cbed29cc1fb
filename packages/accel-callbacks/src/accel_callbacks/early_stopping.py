"""EarlyStoppingCallback: an agreed stop when a metric no longer improves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accel_core import TrainerCallback
from accel_core.extending import check_flag, check_not_negative, check_whole_number

from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class EarlyStoppingCallback(TrainerCallback):
    """Ask all processes to stop if a metric has not improved for `early_stopping_patience` evaluations.

    Each evaluation that records the metric counts, in mid-epoch too; a metric of training once an epoch.
    The best value and the patience that is left are saved with the training state.
    """

    order = 800
    """After all that record metrics, wherever they are listed."""

    argument_sources: ClassVar[dict[str, str]] = {
        "watch_metric": "watched.name",
        "greater_is_better": "watched.greater_is_better",
    }

    def __init__(
        self,
        early_stopping_patience: int = 1,
        early_stopping_threshold: float = 0.01,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        *,
        min_epochs: int = 0,
    ) -> None:
        """Hold what to watch.

        Args:
            early_stopping_patience: evaluations without improvement after which the run stops.
            early_stopping_threshold: a value counts as better if it differs by more than this, in the
                metric's own unit.
            watch_metric: its name in the run history.
            greater_is_better: the best value is the greatest, and not the smallest.
            min_epochs: epochs of the run that are completed before it may stop.
            reset_on_train: forget the best value when a run begins; a resumed run continues with the one it
                saved. A later stage (`reset_run_history=False`) keeps the best value, and has the whole
                patience again.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.early_stopping_patience = check_whole_number(
            "early_stopping_patience", early_stopping_patience, "Use 1 to stop at the first such evaluation."
        )
        way_out = "Use 0.0 to count every better value as an improvement."
        self.early_stopping_threshold = check_not_negative(
            "early_stopping_threshold", early_stopping_threshold, way_out
        )
        way_out = "Use 0 to stop at any time."
        self.min_epochs = check_whole_number("min_epochs", min_epochs, way_out, at_least=0)
        self.reset_on_train = check_flag("reset_on_train", reset_on_train)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.best_metric: float | None = None
        """Best value so far; None before the first."""
        self.evaluations_without_improvement = 0
        """Evaluations in a row since that of the best value."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before; a later stage of it has a patience of its own."""
        self.watched.begin(trainer)
        if self.reset_on_train:
            self.evaluations_without_improvement = 0
            if trainer.run_progress.stage == 1:
                self.best_metric = None

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Compare the value of an evaluation in mid-epoch, or before the first update, with the best one."""
        self._compare(trainer, self.watched.new_value_in_mid_epoch(trainer))

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Compare the value of this epoch with the best one."""
        self._compare(trainer, self.watched.new_value_of_epoch(trainer))

    def _compare(self, trainer: Trainer, value: float | None) -> None:
        # A metric need not be recorded in every evaluation; only those with a value count.
        if value is not None:
            if self.watched.is_better(value, self.best_metric, self.early_stopping_threshold):
                self.best_metric = value
                self.evaluations_without_improvement = 0
            else:
                self.evaluations_without_improvement += 1
        # Without a value too: the patience may have been exhausted before `min_epochs` were completed.
        self._stop_if_exhausted(trainer)

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Stop at once if the patience was exhausted before the state was saved."""
        # Without this, resuming a run that this callback has ended would train one more epoch.
        self._stop_if_exhausted(trainer)

    def _stop_if_exhausted(self, trainer: Trainer) -> None:
        evaluations = self.evaluations_without_improvement
        is_allowed = trainer.run_progress.epochs_completed >= self.min_epochs
        if is_allowed and evaluations >= self.early_stopping_patience:
            best = (
                "no value at all" if self.best_metric is None else f"the best value is {self.best_metric:.6g}"
            )
            trainer.request_stop(
                f"{self.watched.name!r} has not improved for {evaluations} evaluations in a row; {best}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of evaluations since it was recorded."""
        return {
            "best_metric": self.best_metric,
            "evaluations_without_improvement": self.evaluations_without_improvement,
            **self.watched.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.best_metric = state["best_metric"]
        # In earlier versions each epoch had one evaluation.
        name = "evaluations_without_improvement"
        self.evaluations_without_improvement = state[name if name in state else "epochs_without_improvement"]
        self.watched.load_state_dict(state)
