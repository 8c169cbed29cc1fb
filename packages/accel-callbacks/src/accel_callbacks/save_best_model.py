"""SaveBestModelCallback: export the best model, and load it at the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_core import AccelWarning, TrainerCallback
from accel_core.extending import NotFiniteError, run_on_main

from .export_path import check_export_path
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class SaveBestModelCallback(TrainerCallback):
    """Export the model with `save_checkpoint` after each epoch in which a metric was better than ever before.

    The export also holds the value, under the name of the metric. At the end of the run, or after an agreed
    stop, the best weights are loaded into the model, unless a signal ended the run. The best value is saved
    with the training state.
    """

    order = 900
    """After all that record metrics, and before the training state is saved, which holds the best value."""

    def __init__(
        self,
        save_path: str | Path = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
    ) -> None:
        """Hold what to watch.

        Args:
            save_path: a `.safetensors` file holds weights only, any other file also what the flags ask for.
            watch_metric: its name in the run history.
            reset_on_train: forget the best value when a run begins; a resumed run goes on with the one it
                saved, and a later stage (`reset_run_history=False`) with that of the stages before.
            load_saved_checkpoint: load the export when the run ends.
        """
        self.save_path = Path(save_path)
        self.reset_on_train = reset_on_train
        self.save_optimizer = save_optimizer
        self.save_scheduler = save_scheduler
        self.load_saved_checkpoint = load_saved_checkpoint
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.best_metric: float | None = None
        self.best_metric_epoch: int | None = None
        """Epoch of the best value, from 1."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before."""
        self.watched.check_will_be_recorded(trainer)
        check_export_path(trainer, self, self.save_path)
        if self.reset_on_train and trainer.run_progress.stage == 1:
            self.best_metric = None
            self.best_metric_epoch = None

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Export the model if the value of this epoch is the best so far."""
        value = self.watched.value_of_epoch(trainer)
        if value is None or not self.watched.is_better(value, self.best_metric):
            return
        try:
            trainer.save_checkpoint(
                self.save_path, {self.watched.name: value}, self.save_optimizer, self.save_scheduler
            )
        except NotFiniteError as error:
            # The export before is intact and better, so the run goes on.
            warnings.warn(str(error), AccelWarning)
            return
        self.best_metric = value
        self.best_metric_epoch = trainer.run_history.current_epoch

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Load the best weights, after the state of the run with its last weights has been saved."""
        # A run that a signal ended is to be resumed from its last weights, and has no time for more.
        if not self.load_saved_checkpoint or trainer.agreement.signal_number:
            return
        # The main process has written the file; on other machines' disks it may not be seen yet.
        is_there = self.best_metric is not None and run_on_main(
            self.save_path.is_file, trainer.is_main_process
        )
        if not is_there:
            trainer.print(
                f"'{self.save_path}' was not saved by this run, so the model keeps its last weights."
            )
            return
        # Savers come after this callback, but their state has to hold the last weights, not the best.
        trainer.callbacks.call_event("save_last_state")
        trainer.load_checkpoint(self.save_path)
        trainer.print(
            f"The model is that of epoch {self.best_metric_epoch}, with {self.watched.name} "
            f"{self.best_metric:.6g}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and its epoch."""
        return {"best_metric": self.best_metric, "best_metric_epoch": self.best_metric_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.best_metric = state["best_metric"]
        self.best_metric_epoch = state["best_metric_epoch"]
