"""SaveBestModelCallback: export the best model, and load it at the end."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from accel_core import CheckpointError, ConfigurationError, TrainerCallback
from accel_core.extending import (
    Address,
    StoreError,
    check_flag,
    check_place_in_reach,
    check_whole_number,
    files,
    notify,
    read_origin,
    run_on_main,
)

from .export_path import Exported, as_argument, check_export_path, export_to, why_not_own
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class SaveBestModelCallback(TrainerCallback):
    """Export the model with `save_checkpoint` whenever a metric was better than ever before.

    It looks at each evaluation that records the metric, in mid-epoch too, and at the end of each epoch.

    The export also holds the value, under the name of the metric, and its run and update. At the end of
    the run, or after an agreed stop, the best weights are loaded into the model, but not if a signal ends
    the run. If the file is not this run's best any more, the model keeps its last weights and a line says
    so. The best values are saved with the training state. A new run replaces the export of an older one
    at its first best value.
    """

    runs_in_replay = False
    order = 900
    """After all that record metrics, and before the training state is saved, which holds the best value."""

    argument_sources: ClassVar[dict[str, str]] = {
        "watch_metric": "watched.name",
        "greater_is_better": "watched.greater_is_better",
    }

    def __init__(
        self,
        save_path: str | Path = "best_model.pt",
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        reset_on_train: bool = True,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        load_saved_checkpoint: bool = True,
        *,
        keep: int = 1,
        load_optimizer: bool = False,
    ) -> None:
        """Hold what to watch.

        Args:
            save_path: a path, or the address of a store. A `.safetensors` file holds weights only, any other
                file also what the flags ask for. A store that fails warns, and never ends the run.
            watch_metric: its name in the run history.
            greater_is_better: the best value is the greatest, and not the smallest.
            save_optimizer: whether the export holds the state of the optimizer.
            save_scheduler: whether it holds that of the scheduler.
            reset_on_train: forget the best value when a run begins; a resumed run continues with the one it
                saved, and a later stage (`reset_run_history=False`) with that of the stages before.
            load_saved_checkpoint: load the weights of the export when the run ends.
            keep: how many of the best models stay. The best is at `save_path`, the others beside it with
                their update in the name, as in `best_model-update_00001200.pt`.
            load_optimizer: load the states of optimizer and scheduler too, and with them the learning rate.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.save_path = check_place_in_reach(
            "save_path", save_path, "Pass the name of a file, such as 'best_model.pt'."
        )
        self.reset_on_train = check_flag("reset_on_train", reset_on_train)
        self.save_optimizer = check_flag("save_optimizer", save_optimizer)
        self.save_scheduler = check_flag("save_scheduler", save_scheduler)
        self.load_saved_checkpoint = check_flag("load_saved_checkpoint", load_saved_checkpoint)
        self.keep = check_whole_number("keep", keep, "Use 1 to keep the best model only.")
        if self.keep > 1 and isinstance(self.save_path, Address):
            raise ConfigurationError(
                f"keep is {self.keep}, but save_path is '{self.save_path}', and a store keeps one model. Use "
                "keep=1, or a path of this machine."
            )
        self.load_optimizer = check_flag("load_optimizer", load_optimizer)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.exported: list[Exported] = []
        """What stands on the disk, the best first."""
        self.best_metric_epoch: int | None = None
        """Epoch of the best value, from 1."""

    @property
    def best_metric(self) -> float | None:
        """The best value so far."""
        return self.exported[0]["value"] if self.exported else None

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before."""
        self.watched.begin(trainer)
        check_export_path(trainer, self, self.save_path)
        if self.reset_on_train and trainer.run_progress.stage == 1:
            self.exported = []
            self.best_metric_epoch = None

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Remove models beside the best that the run had exported after the state from which it goes on."""
        updates = trainer.run_progress.updates_completed
        run_on_main(lambda: self._remove_later(trainer.run_id, updates), trainer.is_main_process)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Export the model if the value of this epoch is among the best so far."""
        self._look(trainer, self.watched.new_value_of_epoch(trainer))

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Export the model if the value of an evaluation in mid-epoch is among the best so far."""
        self._look(trainer, self.watched.new_value_in_mid_epoch(trainer))

    def _look(self, trainer: Trainer, value: float | None) -> None:
        if value is None or not self.watched.is_better(value, None):
            return
        rank = sum(1 for exported in self.exported if not self.watched.is_better(value, exported["value"]))
        if rank >= self.keep:
            return
        update = trainer.run_progress.updates_completed
        path = self.save_path if self.keep == 1 else self.path_beside(update)
        flags = {"save_optimizer": self.save_optimizer, "save_scheduler": self.save_scheduler}
        if not export_to(trainer, path, {self.watched.name: value}, **flags):
            return
        self.exported.insert(rank, {"run_id": trainer.run_id, "update": update, "value": value})
        dropped = self.exported[self.keep :]
        del self.exported[self.keep :]
        if isinstance(path, Path) and self.keep > 1:
            run_on_main(lambda: self._arrange(path, rank, dropped), trainer.is_main_process)
        if rank == 0:
            self.best_metric_epoch = trainer.run_history.current_epoch

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Load the best weights, after the state of the run with its last weights has been saved."""
        # A run that a signal ended is to be resumed from its last weights, and has no time for more.
        if not self.load_saved_checkpoint or trainer.agreement.signal_number:
            return
        reason = f"'{self.save_path}' was not saved by this run"
        if self.exported:
            best, name = self.exported[0], self.watched.name
            # An export may be replaced by another run, or by this one before it was killed and
            # went on from earlier.
            reason = run_on_main(lambda: why_not_own(self.save_path, best, name), trainer.is_main_process)
        if reason is not None:
            notify(trainer, f"{reason}, so the model keeps its last weights.", "saves")
            return
        # Savers come after this callback, but their state has to hold the last weights, not the best.
        trainer.callbacks.call_event("save_last_state")
        try:
            trainer.load_checkpoint(as_argument(self.save_path), self.load_optimizer, self.load_optimizer)
        except StoreError as error:
            notify(trainer, f"{error} The model keeps its last weights.", "saves")
            return
        notify(
            trainer,
            f"Loaded the best weights, of epoch {self.best_metric_epoch}, with {self.watched.name} "
            f"{self.best_metric:.6g}.",
            "saves",
        )

    @property
    def _path(self) -> Path:
        """Where the best model is on this machine. A store has no others beside it."""
        return cast(Path, self.save_path)

    def path_beside(self, update: int) -> Path:
        """Return where the model of an update stands that is not the best."""
        return self._path.with_name(f"{self._path.stem}-update_{update:08d}{self._path.suffix}")

    def state_dict(self) -> dict[str, Any]:
        """What was exported, and the epoch of the best."""
        return {
            "exported": [dict(each) for each in self.exported],
            "best_metric_epoch": self.best_metric_epoch,
            **self.watched.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        # States of earlier versions have the best value alone.
        value = state.get("best_metric")
        old = [] if value is None else [{"run_id": None, "update": None, "value": value}]
        self.exported = [cast(Exported, dict(each)) for each in state.get("exported", old)]
        self.best_metric_epoch = state["best_metric_epoch"]
        self.watched.load_state_dict(state)

    def _arrange(self, path: Path, rank: int, dropped: list[Exported]) -> None:
        """Give the new best its name, and the one before it that of its update.

        Remove what is no longer kept.

        At every moment a model stands at `save_path`.
        """
        if rank == 0:
            before = next(iter([*self.exported[1:], *dropped]), None)
            if before is not None and before["update"] is not None and self._is_at_save_path(before):
                beside = self.path_beside(before["update"])
                with contextlib.suppress(FileExistsError):
                    _link(self._path, beside)
            files.rename(path, self._path)
        for each in dropped:
            if each["update"] is not None:
                with contextlib.suppress(OSError):
                    self.path_beside(each["update"]).unlink()

    def _is_at_save_path(self, exported: Exported) -> bool:
        return self._path.is_file() and why_not_own(self._path, exported, self.watched.name) is None

    def _remove_later(self, run_id: str | None, updates: int) -> None:
        if isinstance(self.save_path, Address):
            return
        pattern = re.compile(re.escape(self._path.stem) + r"-update_(\d{8,})" + re.escape(self._path.suffix))
        for path in self._path.parent.glob("*"):
            found = pattern.fullmatch(path.name)
            if found is not None and int(found[1]) > updates:
                with contextlib.suppress(CheckpointError, OSError):
                    if read_origin(path)["run_id"] == run_id:
                        path.unlink()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy, if the disk has no such names."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        content = source.read_bytes()
        files.replace_file(target, lambda staging: staging.write_bytes(content))
