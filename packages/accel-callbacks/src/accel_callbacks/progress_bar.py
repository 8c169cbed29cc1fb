"""ProgressBarCallback: show a bar in a terminal and in a notebook, and print a few lines elsewhere."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar

from tqdm import tqdm

from accel_core import LogMetricsCallback, TrainerCallback
from accel_core.extending import columns_of, how_it_ended, loader_of_evaluation, wrap

from .bar import Bar, TextBar

if TYPE_CHECKING:
    from accel_core import Trainer
    from accel_core.extending import ShardedDataLoader


class ProgressBarCallback(TrainerCallback):
    """Show epoch, running loss, learning rate, samples a second and remaining time, on the main process.

    A terminal or a notebook shows a bar for each epoch of training and one for each evaluation. They
    disappear when they are done: `LogMetricsCallback` writes the line of the epoch. Without that callback the
    bars of epochs stay. What does not fit into the terminal is left out from the right, but never the loss.
    Elsewhere the callback prints the name of each epoch, and at most one line per minute, so that no log is
    filled.

    The loss is the main process's mean so far; samples per second are those of all processes. A step may
    return more to be shown beside the loss, `"progress": {"loss_g": loss_g}`, and a callback may set the same
    key of `batch_output`. All values are read only when they are drawn, so a step costs one look at the
    clock. What `trainer.print` prints while a bar is in the terminal appears above it.

    If all processes stop early, the last line has the reason.
    """

    runs_in_replay = False

    reads_batches = False
    order = 10
    """After callbacks that put values of their own beside the loss."""
    seconds_between_draws: ClassVar[float] = 0.1
    """Shortest time between two states of the bar in a terminal or a notebook."""
    seconds_between_lines: ClassVar[float] = 60.0
    """Time between two lines about the current epoch, if there is no terminal."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin without a bar."""
        self._bars: list[Bar] = []

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
        bar = Bar(
            f"Epoch {progress.current_epoch}{of}",
            trainer.train_loss,
            _samples_in_step(trainer, loader),
            total,
            completed=progress.steps_completed_in_epoch,
            # Else the loss would stand there twice.
            stays=not any(
                isinstance(callback, LogMetricsCallback) and callback.is_shown
                for callback in trainer.callbacks
            ),
            periods=self._periods(),
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
                self._bars[-1].show(trainer, batch_output)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Close the bar of the epoch."""
        self._close(trainer)

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Open the bar of the evaluation."""
        loader = loader_of_evaluation(trainer)
        if trainer.is_main_process:
            total = None
            if loader is not None and loader.has_certain_length:
                limits = [loader.num_steps, loader.max_intermediate_steps if is_intermediate else None]
                total = min((each for each in limits if each is not None), default=None)
            samples_in_step = _samples_in_step(trainer, loader)
            bar = Bar(
                "Evaluation", trainer.eval_loss, samples_in_step, total, stays=False, periods=self._periods()
            )
            self._open(trainer, bar)

    def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        """Count the batch, and draw the bar if it is time."""
        if self._bars:
            self._bars[-1].completed += 1
            if perf_counter() >= self._bars[-1].next_time:
                self._bars[-1].show(trainer, batch_output)

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Close the bar of the evaluation."""
        self._close(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Print why the run was stopped, if it was."""
        if trainer.stop_reason is not None:
            trainer.print(wrap(how_it_ended(trainer), columns_of()))

    def on_run_close(self, trainer: Trainer) -> None:
        """Close bars that an exception has left open."""
        # A run that fails while it prepares its model has no bars yet.
        for bar in reversed(getattr(self, "_bars", [])):
            bar.close()
        self._bars = []
        self._print_as_before(trainer)

    def _periods(self) -> tuple[float, float]:
        return self.seconds_between_draws, self.seconds_between_lines

    def _open(self, trainer: Trainer, bar: Bar) -> None:
        if isinstance(bar.tqdm, TextBar) and not self._bars:
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


def _samples_in_step(trainer: Trainer, loader: ShardedDataLoader | None) -> int:
    """Return the samples of a full step on all processes, or 0 if the size of a batch is not known."""
    return 0 if loader is None else (loader.batch_size or 0) * trainer.data_group.size
