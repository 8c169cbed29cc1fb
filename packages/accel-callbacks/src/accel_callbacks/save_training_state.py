"""SaveTrainingStateCallback: training states by epochs, updates, minutes, at the end and on signals, with rotation."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from accel_core import AccelWarning, ConfigurationError, TrainerCallback
from accel_core.extending import (
    NotFiniteError,
    check_folder_of_run,
    check_whole_number,
    complete_checkpoints,
    remove_checkpoint,
    remove_leftovers,
    run_on_main,
)

from .periodic import Periodic
from .watched_metric import WatchedMetric

if TYPE_CHECKING:
    from accel_core import Trainer

_NAME = re.compile(r"update_\d+(\.replaced)?")
_NOT_ON_EVERY_PLATFORM = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGBREAK"}
_CANNOT_BE_HANDLED = {"SIGKILL", "SIGSTOP"}
SECONDS_OF_ONE_SIGNAL = 1.0
"""A signal to a whole job reaches a worker of torchrun twice within this time: by itself, and forwarded by the launcher."""


class SaveTrainingStateCallback(TrainerCallback):
    """Save the training state in folders named `update_00001200` inside `save_dir`.

    `latest_checkpoint` finds the newest.

    A signal on any process lets all of them finish the update, save and close; `train` then raises
    `RunInterrupted`. A second signal ends the process at once (under a launcher one that comes a second
    later, since launchers forward what they receive, too). Signals are handled only in the main thread, and
    the handlers that were there before come back at the end. An agreed stop saves the state of the update
    after which all processes stop.

    Parameters that are not finite are never saved: a warning says so, and the states before stay.
    """

    order = 1000
    """After all others, so that their state is that of the same moment."""

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
    ) -> None:
        """Hold when to save and what to keep.

        Args:
            save_dir: of one run; on several machines on a disk that they share.
            save_at_end: at the end of the run and at an agreed stop. A signal saves in any case.
            keep_last: how many of the newest states stay; None keeps all, unless `keep_best` is given.
            keep_best: how many of those with the best values of `watch_metric` stay, besides the newest. Only
                states that were saved after the very update at which the metric was recorded have a value.
            save_on_signals: their names; those that the platform does not have are left out. "SIGINT" makes
                Ctrl-C save.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.save_dir = Path(save_dir)
        self.periodic = Periodic("save", save_every_n_epochs, save_every_n_updates, save_every_n_minutes)
        self.save_at_end = save_at_end
        self.keep_last = check_whole_number("keep_last", keep_last, "Use None to keep all.", optional=True)
        way_out = "Use None to keep none for its metric."
        self.keep_best = check_whole_number("keep_best", keep_best, way_out, optional=True)
        self.watched = WatchedMetric(type(self).__name__, watch_metric, greater_is_better)
        self.signal_numbers = _signal_numbers(save_on_signals)
        self._handlers_before: dict[int, Any] = {}
        self._signalled_at: float | None = None
        self._stop_saved_at: int | None = None
        self._is_end_saved = False

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Refuse a folder of another run, begin to count, and listen to signals."""
        if self.keep_best is not None:
            self.watched.check_will_be_recorded(trainer)
        run_on_main(lambda: check_folder_of_run(self.save_dir, str(trainer.run_id)), trainer.is_main_process)
        self.periodic.start(trainer, self)
        self._stop_saved_at = None
        self._is_end_saved = False
        self._listen_to_signals(trainer)

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Refuse a folder with later states of the run that goes on from an earlier one."""
        self._check_folder(trainer)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Save if it is due, or if all processes stop now."""
        is_due = self.periodic.is_due_after_update(trainer)
        is_stopping = trainer.stop_reason is not None and self._saves_at_end(trainer)
        if is_stopping:
            self._stop_saved_at = trainer.run_progress.updates_completed
        if is_due or is_stopping:
            self.save(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Save if it is due."""
        if self.keep_best is not None:
            self.watched.value_of_epoch(trainer)
        if self.periodic.is_due_after_epoch(trainer):
            self.save(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Save at the end."""
        self.save_last_state(trainer)

    def save_last_state(self, trainer: Trainer) -> None:
        """Save the state at the end of the run, if that is wanted and not done yet.

        Who changes the weights in `on_training_run_end` calls this before:
        `trainer.callbacks.call_event("save_last_state")`.
        """
        progress = trainer.run_progress
        is_at_update = progress.updates_completed_in_epoch > 0 and not progress.train_epoch_completed
        # After a stop in the middle of an epoch the others have closed it already, so only the state of the
        # update counts.
        is_saved = is_at_update and self._stop_saved_at == progress.updates_completed
        if self._saves_at_end(trainer) and not (is_saved or self._is_end_saved):
            self._is_end_saved = True
            self.save(trainer)

    def on_run_close(self, trainer: Trainer) -> None:
        """Give the signal handlers back."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers_before = {}

    def save(self, trainer: Trainer) -> None:
        """Save now, between updates, and remove what need not be kept. Every process takes part."""
        self._check_folder(trainer)
        try:
            trainer.save_training_state(
                self.save_dir / f"update_{trainer.run_progress.updates_completed:08d}"
            )
        except NotFiniteError as error:
            warnings.warn(str(error), AccelWarning)
            return
        if trainer.is_main_process:
            # Those of a crash after the last save, which no other save would remove.
            remove_leftovers(self.save_dir)
            self._remove_old_states(str(trainer.run_id))

    def _check_folder(self, trainer: Trainer) -> None:
        """Before each save, since another job may have begun to write there."""
        run_id, updates = str(trainer.run_id), trainer.run_progress.updates_completed
        run_on_main(lambda: check_folder_of_run(self.save_dir, run_id, updates), trainer.is_main_process)

    def _saves_at_end(self, trainer: Trainer) -> bool:
        return self.save_at_end or trainer.agreement.signal_number > 0

    def _remove_old_states(self, run_id: str) -> None:
        if self.keep_last is None and self.keep_best is None:
            return
        states = {
            path: state
            for path, state in complete_checkpoints(self.save_dir).items()
            if _NAME.fullmatch(path.name) and state["run_id"] == run_id
        }
        kept = set(list(states)[-(self.keep_last or 1) :])
        values = {
            path: value for path, state in states.items() if (value := self._value_in(state)) is not None
        }
        best_first = sorted(values, key=values.__getitem__, reverse=self.watched.greater_is_better)
        kept.update(best_first[: self.keep_best or 0])
        for path in states:
            if path not in kept:
                remove_checkpoint(path)

    def _value_in(self, state: Mapping[str, Any]) -> float | None:
        """The value of the watched metric that was recorded for the very weights of a state."""
        for record in reversed(state["run_history"]["records"]):
            if record["name"] == self.watched.name:
                is_own = record["update"] == state["run_progress"]["updates_completed"]
                return record["value"] if is_own and self.watched.is_better(record["value"], None) else None
        return None

    def _listen_to_signals(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        self._signalled_at = None

        def end_by_the_next() -> None:
            for handled in self._handlers_before:
                signal.signal(
                    handled, signal.default_int_handler if handled == signal.SIGINT else signal.SIG_DFL
                )

        def handle(number: int, frame: FrameType | None) -> None:
            if self._signalled_at is None:
                self._signalled_at = time.monotonic()
                if "TORCHELASTIC_RUN_ID" not in os.environ:
                    end_by_the_next()  # Also where Python itself no longer gets to run.
                trainer.request_stop(
                    f"the signal {signal.Signals(number).name} was received", signal_number=number
                )
            elif time.monotonic() > self._signalled_at + SECONDS_OF_ONE_SIGNAL:
                end_by_the_next()
                signal.raise_signal(number)

        handle.is_of_accel = True  # type: ignore[attr-defined]
        for number in self.signal_numbers:
            # A stop makes every saver save, so one handler is enough for several of them.
            if not getattr(signal.getsignal(number), "is_of_accel", False):
                self._handlers_before[number] = signal.signal(number, handle)


def _signal_numbers(names: Sequence[str]) -> list[int]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name in _CANNOT_BE_HANDLED:
            raise ConfigurationError(
                f"save_on_signals has {name!r}, which no process can handle. Use 'SIGTERM'."
            )
        if name not in _NOT_ON_EVERY_PLATFORM and name not in signal.Signals.__members__:
            raise ConfigurationError(
                f"save_on_signals has {name!r}, but must have names of signals, such as 'SIGTERM'."
            )
    return [signal.Signals[name].value for name in names if name in signal.Signals.__members__]
