"""SaveTrainingStateCallback: save training states periodically, at the end and on signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accel_core import TrainerCallback
from accel_core.extending import check_choice, check_flag, check_not_negative, check_path, check_whole_number

from .failed_saves import MOST_FAILURES as MOST_FAILURES
from .mirrored_saves import MirroredSaves
from .periodic import Periodic
from .rotation import Place, states_to_remove
from .run_folder import RunFolder
from .state_saver import StateSaver
from .stop_signals import StopSignals
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer


class SaveTrainingStateCallback(TrainerCallback):
    """Save the training state in folders named `update_00001200` inside `save_dir`.

    `latest_checkpoint` finds the newest. `run_card.json` beside them says what is needed to repeat the run.

    After a signal on any process, all of them finish the update, save and close, and `train` raises
    `RunInterrupted`. A second signal ends the process at once. Under a launcher, which forwards the signals
    that it receives, the second one counts if it comes at least a second later. Signals are handled in the
    main thread only, and the handlers that were there before come back at the end. An agreed stop saves the
    state of the update after which all processes stop. The state is saved too when a later stage of a run
    begins, which is another call of `train` with `reset_run_history=False`.

    Parameters that are not finite are never saved: the callback warns, and earlier states stay.
    """

    runs_in_replay = False
    order = 1000
    """After all others, so that the saved state holds what they did after the same update."""

    argument_sources: ClassVar[dict[str, str]] = {
        "watch_metric": "watched.name",
        "greater_is_better": "watched.greater_is_better",
        "save_every_n_epochs": "periodic.epochs",
        "save_every_n_updates": "periodic.updates",
        "save_every_n_minutes": "periodic.minutes",
        "save_on_signals": "signals.names",
    }

    def __init__(
        self,
        save_dir: str | Path = "checkpoints",
        save_every_n_epochs: int | None = None,
        save_every_n_updates: int | None = None,
        save_every_n_minutes: float | None = None,
        save_at_end: bool = True,
        keep_last: int | None = None,
        keep_best: int | None = None,
        watch_metric: str = "eval_loss_epoch",
        greater_is_better: bool = False,
        save_on_signals: Sequence[str] = ("SIGTERM", "SIGUSR1"),
        *,
        on_error: str = "raise",
        if_other_run: str = "raise",
        in_background: bool = False,
        mirror: str | Path | None = None,
        mirror_wait_seconds: float = 300.0,
    ) -> None:
        """Hold when to save and what to keep.

        Args:
            save_dir: folder for the states of one run, on the disk of the main process. If an engine shards
                the model, several machines have to share the disk.
            save_every_n_epochs: save after every n-th epoch.
            save_every_n_updates: save after every n-th update of the run.
            save_every_n_minutes: save after the update at which the last save is so many minutes old.
            save_at_end: save at the end of the run and at an agreed stop. A signal saves in any case.
            keep_last: number of the newest states that stay; None keeps all, unless `keep_best` is given.
            keep_best: number of states with the best values of `watch_metric` that stay besides the newest.
                With it a state is saved wherever the metric is recorded, since only a state of that very
                update has its value.
            greater_is_better: the best value is the greatest, and not the smallest.
            save_on_signals: names of signals; those that the platform does not have are left out. "SIGINT"
                makes Ctrl-C save.
            on_error: "raise" ends the run if a save fails. "retry" warns once and tries again after the next
                update, then after 2, 4 and 8 more. Five failures in a row, or one at the end of the run, end
                it.
            if_other_run: "raise" refuses a folder with states of another run. "set_aside" moves them into a
                folder inside of it, which `latest_checkpoint` does not see.
            in_background: copy the state in memory, and let a thread of the main process write it while
                training continues; with FSDP2 one of each process. A save that is due while another one is
                written waits for it. The save at the end, or at a stop, is written before `train` returns.
                Not for other engines that shard.
            mirror: address of a store, such as "s3://bucket/run1", or a folder of another disk. A thread of
                the main process copies each state there once it stands in `save_dir`, and removes what
                `keep_last` and `keep_best` do not keep. A store that fails is tried again, and never ends
                the run. Continue with `latest_checkpoint(mirror, cache=save_dir)`.
            mirror_wait_seconds: the longest wait for the mirror at the end of the run.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.save_dir = check_path("save_dir", save_dir, "Pass the name of a folder, such as 'checkpoints'.")
        self.periodic = Periodic("save", save_every_n_epochs, save_every_n_updates, save_every_n_minutes)
        self.save_at_end = check_flag("save_at_end", save_at_end)
        self.keep_last = check_whole_number("keep_last", keep_last, "Use None to keep all.", optional=True)
        way_out = "Use None to keep none for its metric."
        self.keep_best = check_whole_number("keep_best", keep_best, way_out, optional=True)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.signals = StopSignals(save_on_signals)
        self.on_error = check_choice("on_error", on_error, ("raise", "retry"))
        self.if_other_run = check_choice("if_other_run", if_other_run, ("raise", "set_aside"))
        self.in_background = check_flag("in_background", in_background)
        self.mirror_wait_seconds = check_not_negative(
            "mirror_wait_seconds", mirror_wait_seconds, "Use 0 to wait for nothing."
        )
        self.mirror = mirror
        mirrored = (
            None
            if mirror is None
            else MirroredSaves(mirror, self.save_dir, self.mirror_wait_seconds, self._unwanted)
        )
        self._saver = StateSaver(self._folder(), self.in_background, mirrored)
        self._stop_saved_at: int | None = None
        self._is_end_saved = False

    def describe(self, trainer: Trainer) -> str:
        """Tell what the copies of a background save take, and where the mirror is."""
        return self._saver.describe(trainer)

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Raise if the folder holds states of another run; begin to count, and save a later stage's start."""
        if self.keep_best is not None:
            self.watched.check_will_be_recorded(trainer)
        self._saver.start(trainer, self._folder(), self.if_other_run == "set_aside")
        self.periodic.start(trainer, self)
        self._stop_saved_at = None
        self._is_end_saved = False
        self.signals.listen(trainer)
        # A later stage begins with what was done between two calls of train, such as loading the best weights
        # from a file that this stage will replace. One that is resumed has no counters yet.
        if trainer.run_progress.updates_before_stage:
            self.save(trainer)

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Raise if the folder holds later states of this run; set those aside that are damaged."""
        self._saver.resume(trainer, path)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Save if it is due, or if all processes stop now; tell of a save that was written meanwhile."""
        background = self._saver.background
        if background is not None and background.has_arrived(trainer):
            self._saver.finish(trainer, self._retries, goes_on=True)
        is_due = self.periodic.is_due_after_update(trainer) or self._has_value(trainer)
        is_stopping = trainer.stop_reason is not None and self._saves_at_end(trainer)
        if is_stopping:
            self._stop_saved_at = trainer.run_progress.updates_completed
        if is_stopping or self._saver.is_time(trainer, is_due):
            self.save(trainer, is_last=is_stopping)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Save if it is due."""
        if self.keep_best is not None:
            # Raises in the first epoch if there is no such metric, not when the disk is full of states.
            self.watched.new_value_of_epoch(trainer)
        is_due = self.periodic.is_due_after_epoch(trainer) or self._has_value(trainer)
        if self._saver.is_time(trainer, is_due):
            self.save(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Save at the end."""
        self._saver.finish(trainer, self._retries)
        self.save_last_state(trainer)
        self._saver.finish_mirror(trainer)

    def save_last_state(self, trainer: Trainer) -> None:
        """Save the state at the end of the run, if that is wanted and not done yet.

        A callback that changes the weights in `on_training_run_end` has to call this first:
        `trainer.callbacks.call_event("save_last_state")`.
        """
        progress = trainer.run_progress
        is_at_update = progress.updates_completed_in_epoch > 0 and not progress.train_epoch_completed
        # After a stop in the middle of an epoch the other callbacks have closed the epoch already, so the
        # state that was saved after the update is the one to resume from.
        is_saved = is_at_update and self._stop_saved_at == progress.updates_completed
        is_wanted = self._saves_at_end(trainer) or self._saver.failures.number > 0
        if is_wanted and not (is_saved or self._is_end_saved):
            self._is_end_saved = True
            self.save(trainer, is_last=True)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Wait for the save that is on its way, and for the mirror."""
        self._saver.close_after_error(trainer)

    def on_run_close(self, trainer: Trainer) -> None:
        """Give the signal handlers back, and write the run card with all states."""
        self.signals.close()
        self._saver.complete_card(trainer)

    def save(self, trainer: Trainer, is_last: bool = False) -> None:
        """Save now, between updates, and remove what need not be kept. Every process takes part.

        Args:
            is_last: no later save could make up for this one, so that a failure is raised in any case.
        """
        path = self.save_dir / f"update_{trainer.run_progress.updates_completed:08d}"
        self._saver.save(trainer, path, is_last, self._retries)

    @property
    def last_mirrored(self) -> str | None:
        """Address of the newest state of the run in the mirror, as far as the main process knows."""
        mirrored = self._saver.mirrored
        newest = None if mirrored is None else mirrored.mirror.newest
        return None if newest is None else str(newest)

    @property
    def _retries(self) -> bool:
        return self.on_error == "retry"

    def _has_value(self, trainer: Trainer) -> bool:
        """Whether the watched metric was recorded at this very update."""
        if self.keep_best is None:
            return False
        for record in reversed(trainer.run_history.get_records()):
            if record["update"] != trainer.run_progress.updates_completed:
                break
            if record["name"] == self.watched.name:
                return self.watched.is_better(record["value"], None)
        return False

    def _saves_at_end(self, trainer: Trainer) -> bool:
        return self.save_at_end or trainer.agreement.signal_number > 0

    def _folder(self) -> RunFolder:
        keeps_all = self.keep_last is None and self.keep_best is None
        return RunFolder(self.save_dir, None if keeps_all else self._unwanted)

    def _unwanted(self, states: Mapping[Place, Any]) -> list[Place]:
        """Return the states, in the folder or in the mirror, that need not be kept."""
        return states_to_remove(states, self.keep_last, self.keep_best, self.watched)
