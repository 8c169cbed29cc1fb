"""ProgressBarCallback: show a bar in a terminal and in a notebook, and print a few lines elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from accel_core import TrainerCallback
from accel_core.extending import how_it_ended

if TYPE_CHECKING:
    from accel_core import LossTracker, Trainer
    from accel_core.extending import ShardedDataLoader


class ProgressBarCallback(TrainerCallback):
    """Show epoch, running loss, learning rate, samples a second and remaining time, on the main process.

    A terminal or a notebook shows a bar for each epoch of training, which stays, and one for each
    evaluation, which disappears when it is done. Elsewhere the callback prints the name of each epoch, and
    at most one line per minute, so that no log is filled. The loss is the main process's mean so far;
    samples per second are those of all processes. Both are read only when they are drawn, so a step costs
    one look at the clock. What `trainer.print` prints while a bar is in the terminal appears above it.

    If all processes stop early, the last line has the reason.
    """

    reads_batches = False
    seconds_between_draws: ClassVar[float] = 0.1
    seconds_between_lines: ClassVar[float] = 60.0

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin without a bar."""
        self._bars: list[_Bar] = []

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Begin without a bar."""
        self._bars = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Open the bar of the epoch."""
        config = trainer.run_config
        progress = trainer.run_progress
        loader = trainer.train_dataloader
        if not trainer.is_main_process or loader is None:
            return
        total = loader.num_steps if loader.has_certain_length else None
        # A limit in updates may end the run in the middle of this epoch.
        if total is not None and config.max_num_train_steps is not None:
            updates = config.max_num_train_steps + progress.updates_before_stage - progress.updates_completed
            total = min(
                total, progress.steps_completed_in_epoch + updates * config.gradient_accumulation_steps
            )
        # Epochs are counted through all stages of a run, and its limit is that of the call.
        of = "" if config.num_epochs is None else f"/{progress.epochs_before_stage + config.num_epochs}"
        bar = _Bar(
            f"Epoch {progress.current_epoch}{of}",
            trainer.train_loss,
            _samples_in_step(trainer, loader),
            total,
            completed=progress.steps_completed_in_epoch,
            stays=True,
        )
        self._open(trainer, bar)
        if bar.tqdm is None:
            trainer.print(bar.title)

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Count the batch, and draw the bar if it is time."""
        if self._bars:
            # An evaluation in mid-epoch has closed its own bar by now, so the last one is that of training.
            self._bars[-1].completed = step + 1
            if perf_counter() >= self._bars[-1].next_time:
                self._bars[-1].show(trainer)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Close the bar of the epoch."""
        self._close(trainer)

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Open the bar of the evaluation."""
        loader = trainer.eval_dataloader
        if trainer.is_main_process:
            total = loader.num_steps if loader is not None and loader.has_certain_length else None
            samples_in_step = _samples_in_step(trainer, loader)
            self._open(trainer, _Bar("Evaluation", trainer.eval_loss, samples_in_step, total, stays=False))

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """Count the batch, and draw the bar if it is time."""
        if self._bars:
            self._bars[-1].completed += 1
            if perf_counter() >= self._bars[-1].next_time:
                self._bars[-1].show(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Close the bar of the evaluation."""
        self._close(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Print why the run was stopped, if it was."""
        if trainer.stop_reason is not None:
            trainer.print(how_it_ended(trainer))

    def on_run_close(self, trainer: Trainer) -> None:
        """Close bars that an exception has left open."""
        # A run that fails while it prepares its model has no bars yet.
        for bar in reversed(getattr(self, "_bars", [])):
            bar.close()
        self._bars = []
        self._print_as_before(trainer)

    def _open(self, trainer: Trainer, bar: _Bar) -> None:
        if isinstance(bar.tqdm, _TextBar) and not self._bars:
            # Else a line would be printed into the bar, and the bar be drawn again below it.
            self._print = trainer.print
            trainer.print = self._print_above  # type: ignore[method-assign]
        self._bars.append(bar)

    def _close(self, trainer: Trainer) -> None:
        if self._bars:
            bar = self._bars.pop()
            if bar.tqdm is not None:
                bar.show(trainer)
            bar.close()
        if not self._bars:
            self._print_as_before(trainer)

    def _print_above(self, *args: Any, **kwargs: Any) -> None:
        with tqdm.external_write_mode():
            self._print(*args, **kwargs)

    def _print_as_before(self, trainer: Trainer) -> None:
        # Another callback may have replaced it meanwhile, and would lose its own.
        if vars(trainer).get("print") == self._print_above:
            del trainer.print


class _Bar:
    """Draws one bar, or prints lines if there is no terminal."""

    def __init__(
        self,
        title: str,
        loss: LossTracker,
        samples_in_step: int,
        total: int | None,
        completed: int = 0,
        stays: bool = True,
    ) -> None:
        self.title = title
        self.loss = loss
        self.samples_in_step = samples_in_step
        self.total = total
        self.completed = completed
        self.begun_at = completed
        self.began = perf_counter()
        bar_class = _bar_class()
        self.tqdm: Any = None
        self.seconds = ProgressBarCallback.seconds_between_lines
        if bar_class is not None:
            self.seconds = ProgressBarCallback.seconds_between_draws
            self.tqdm = bar_class(
                desc=title, total=total, initial=completed, leave=stays, unit="batch", **_width()
            )
        self.next_time = self.began + self.seconds

    def show(self, trainer: Trainer) -> None:
        """Read the values from the device, and draw the bar or print the line."""
        now = perf_counter()
        self.next_time = now + self.seconds
        values = {"loss": f"{self.loss.average:.4g}"}
        # An evaluation has no learning rate.
        if trainer.optimizer is not None and self.loss is trainer.train_loss:
            learning_rate = trainer.optimizer.param_groups[0].get("lr")
            # Some optimizers choose it at each update, and have none to show.
            if learning_rate is not None:
                values["lr"] = f"{float(learning_rate):.3g}"
        if self.samples_in_step:
            # Only steps of this process's own time: a resumed epoch begins behind some.
            rate = (self.completed - self.begun_at) * self.samples_in_step / max(now - self.began, 1e-9)
            values["samples/s"] = f"{rate:,.0f}"
        if self.tqdm is not None:
            self.tqdm.set_postfix(values, refresh=False)
            self.tqdm.n = self.completed
            self.tqdm.refresh()
        else:
            of = f"/{self.total}" if self.total is not None else ""
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            trainer.print(f"{self.title}: batch {self.completed}{of}, {text}{self._remaining(now)}")

    def close(self) -> None:
        """Release the line of the terminal."""
        if self.tqdm is not None:
            self.tqdm.close()

    def _remaining(self, now: float) -> str:
        steps = self.completed - self.begun_at
        if self.total is None or not steps:
            return ""
        seconds = (self.total - self.completed) * (now - self.began) / steps
        return f", {tqdm.format_interval(seconds)} remaining"


class _TextBar(tqdm):  # type: ignore[type-arg]
    """A bar in a terminal, without tqdm's thread: a process with threads cannot fork its workers safely."""

    monitor_interval = 0


def _samples_in_step(trainer: Trainer, loader: ShardedDataLoader | None) -> int:
    """Return the samples of a full step on all processes, or 0 if the size of a batch is not known."""
    return 0 if loader is None else (loader.batch_size or 0) * trainer.data_group.size


def _bar_class() -> Any:
    """Return the class of tqdm for a notebook or a terminal, or None if a bar would only fill a log."""
    ipython = sys.modules.get("IPython")
    # Libraries import ipykernel outside of notebooks too; only the shell of a notebook has a kernel.
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        # Without ipywidgets tqdm's bar for notebooks raises.
        has_widgets = importlib.util.find_spec("ipywidgets") is not None
        return importlib.import_module("tqdm.notebook").tqdm if has_widgets else _TextBar
    return _TextBar if sys.stderr is not None and sys.stderr.isatty() else None


def _width() -> dict[str, Any]:
    """Return the arguments of tqdm that set the width of the bar."""
    # Some terminals, as in containers, claim to have no width, and tqdm would draw nothing.
    try:
        has_width = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        # Standard error was replaced by something without a file, as in a notebook; tqdm has a default then.
        has_width = True
    return {"dynamic_ncols": True} if has_width else {"ncols": 100, "nrows": 20}
