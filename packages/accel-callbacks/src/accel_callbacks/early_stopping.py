"""EarlyStoppingCallback: an agreed stop when a metric no longer improves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accel_core import TrainerCallback
from accel_core.extending import check_not_negative, check_whole_number

from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class EarlyStoppingCallback(TrainerCallback):
    """Ask all processes to stop if a metric has not improved for `early_stopping_patience` epochs.

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
    ) -> None:
        """Hold what to watch.

        Args:
            early_stopping_patience: epochs without improvement after which the run stops.
            early_stopping_threshold: a value counts as better if it differs by more than this, in the
                metric's own unit.
            watch_metric: its name in the run history.
            reset_on_train: forget the best value when a run begins; a resumed run goes on with the one it
                saved. A later stage (`reset_run_history=False`) keeps the best value, and has the whole
                patience again.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.early_stopping_patience = check_whole_number(
            "early_stopping_patience", early_stopping_patience, "Use 1 to stop at the first such epoch."
        )
        way_out = "Use 0.0 to count every better value as an improvement."
        self.early_stopping_threshold = check_not_negative(
            "early_stopping_threshold", early_stopping_threshold, way_out
        )
        self.reset_on_train = reset_on_train
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.best_metric: float | None = None
        """Best value so far; None before the first."""
        self.epochs_without_improvement = 0
        """Epochs in a row since the best value."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before; a later stage of it has a patience of its own."""
        self.watched.check_will_be_recorded(trainer)
        if self.reset_on_train:
            self.epochs_without_improvement = 0
            if trainer.run_progress.stage == 1:
                self.best_metric = None

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Compare the value of this epoch with the best one."""
        value = self.watched.value_of_epoch(trainer)
        # A metric need not be recorded in every epoch; only those with a value count.
        if value is None:
            return
        if self.watched.is_better(value, self.best_metric, self.early_stopping_threshold):
            self.best_metric = value
            self.epochs_without_improvement = 0
        else:
            self.epochs_without_improvement += 1
        self._stop_if_exhausted(trainer)

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Stop at once if the patience was exhausted before the state was saved."""
        # Without this, resuming a run that this callback has ended would train one more epoch.
        self._stop_if_exhausted(trainer)

    def _stop_if_exhausted(self, trainer: Trainer) -> None:
        epochs = self.epochs_without_improvement
        if epochs >= self.early_stopping_patience:
            best = (
                "no value at all" if self.best_metric is None else f"the best value is {self.best_metric:.6g}"
            )
            trainer.request_stop(
                f"{self.watched.name!r} has not improved for {epochs} epochs in a row; {best}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of epochs since it was recorded."""
        return {
            "best_metric": self.best_metric,
            "epochs_without_improvement": self.epochs_without_improvement,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.best_metric = state["best_metric"]
        self.epochs_without_improvement = state["epochs_without_improvement"]
