"""LogMetricsCallback shows the metrics of an epoch: in a line, in a table of a notebook, or in a log."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigurationError
from ..screen import columns_of, join_fields, notebook, separator
from ..text import preview
from .callback import TrainerCallback
from .metric_names import BestValues, directions, readable_name, readable_value
from .metric_table import MetricTable

if TYPE_CHECKING:
    from ..trainer import Trainer


class LogMetricsCallback(TrainerCallback):
    """Show what an epoch or an evaluation has recorded, with samples a second and seconds of the epoch.

    It is a line, broken where the terminal ends; in a notebook a row of a table that grows; with a `logger` a
    message of level INFO. `(best)` marks the loss of an evaluation, and what a callback watches, if the value
    is better than all before it. Names are those that people use: `eval_loss_epoch` is `val loss`. What is
    recorded by updates, such as the statistics of a run, is in the history and not in the line.

    Override `log_metrics` to send all metrics elsewhere.
    """

    runs_in_replay = False

    # After callbacks that record metrics, and before those that read them to stop or save.
    order: ClassVar[int] = 50

    # Of the class, so that a subclass with a constructor of its own need not call this one.
    logger: logging.Logger | None = None
    _table: MetricTable | None = None
    _best: BestValues | None = None
    _began: float | None = None
    _seconds = 0.0
    _samples = 0
    _is_evaluate = False

    def __init__(self, logger: logging.Logger | None = None) -> None:
        """Hold where to.

        Args:
            logger: gets one message an epoch, on the main process, in place of what would be printed.

        Raises:
            ConfigurationError: it is no logger.
        """
        if logger is not None and not isinstance(logger, (logging.Logger, logging.LoggerAdapter)):
            raise ConfigurationError(
                f"logger is {preview(logger)}, but must be a logger. Pass logging.getLogger('train')."
            )
        self.logger = logger

    @property
    def is_shown(self) -> bool:
        """Whether this callback itself shows the metrics to the person who watches the run."""
        return self.logger is None and type(self).log_metrics is LogMetricsCallback.log_metrics

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin a new table."""
        self._table = None
        self._is_evaluate = False
        self._samples = 0
        self._num_records_before = len(trainer.run_history.get_records())

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Start the clock."""
        self._epoch_began = self._began = perf_counter()
        self._seconds = 0.0
        # A resumed epoch begins behind samples that it has not read.
        self._samples = -trainer.run_progress.samples_completed_in_epoch

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Stop the clock."""
        self._stop_clock()
        self._samples += trainer.run_progress.samples_completed_in_epoch

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Stop the clock for an evaluation in mid-epoch."""
        self._is_training = self._began is not None
        self._stop_clock()

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Start the clock again if the epoch goes on."""
        if self._is_training:
            self._began = perf_counter()

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Log the metrics of an evaluation before the first update, which belong to no epoch of training."""
        if not is_intermediate and not trainer.run_progress.train_epoch_completed:
            self._log_records(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Log the metrics of the epoch."""
        self._log_since(trainer, trainer.run_history.current_epoch)

    def on_evaluation_run_start(self, trainer: Trainer) -> None:
        """Remember what was recorded before."""
        # An evaluation has no epoch of its own by which its records could be found.
        self._num_records_before = len(trainer.run_history.get_records())
        self._samples = 0
        self._is_evaluate = True

    def on_evaluation_run_end(self, trainer: Trainer) -> None:
        """Log the metrics of the evaluation."""
        self._log_records(trainer)

    def on_run_close(self, trainer: Trainer) -> None:
        """Forget an epoch that an error has left open."""
        self._began = None

    def log_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Show `metrics`, the newest value by name. Called on every process; the main one shows them."""
        if not trainer.is_main_process:
            return
        shown = self._of_the_end(trainer, metrics)
        speed = self._speed()
        start = self._start(trainer)
        if self.logger is None and notebook() is not None and start.startswith("Epoch"):
            self._table = self._table or MetricTable()
            self._table.add(start.removeprefix("Epoch "), shown, speed, self._bests(trainer, shown))
            return
        bests = self._bests(trainer, shown)
        fields = [
            f"{readable_name(name)} {readable_value(value)}{' (best)' if name in bests else ''}"
            for name, value in shown.items()
        ]
        fields += [f"{value} {unit}".strip() for unit, value in speed.items()]
        if self.logger is None:
            trainer.print(join_fields(start, fields, columns_of(), separator()))
        else:
            self.logger.info("%s", join_fields(start, fields, None, ", "))

    def _log_records(self, trainer: Trainer) -> None:
        records = trainer.run_history.get_records()[self._num_records_before :]
        self.log_metrics(trainer, {record["name"]: record["value"] for record in records})

    def _log_since(self, trainer: Trainer, epoch: int) -> None:
        records = trainer.run_history.get_records()
        # Read from the end: a long history is not searched in every epoch.
        first = len(records)
        while first and records[first - 1]["epoch"] == epoch:
            first -= 1
        self._first_of_epoch = first
        self.log_metrics(trainer, {record["name"]: record["value"] for record in records[first:]})

    def _of_the_end(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Leave out what was recorded by updates: its newest value says little about an epoch."""
        if "train_loss_epoch" not in metrics:
            return metrics
        records = trainer.run_history.get_records()[self._first_of_epoch :]
        names = [record["name"] for record in records]
        # The loss of the epoch is the first that is recorded at its end.
        at_end = set(names[len(names) - 1 - names[::-1].index("train_loss_epoch") :])
        shown = {
            name: value
            for name, value in metrics.items()
            if name in at_end or name.startswith("intermediate_")
        }
        # The two losses first, which everybody looks for.
        first = [name for name in ("train_loss_epoch", "eval_loss_epoch") if name in shown]
        return {name: shown[name] for name in [*first, *(name for name in shown if name not in first)]}

    def _bests(self, trainer: Trainer, shown: dict[str, float]) -> set[str]:
        records, greater = trainer.run_history.get_records(), directions(shown, trainer.callbacks)
        if self._best is None or not self._best.can_read_on(records, greater):
            self._best = BestValues(greater)
        self._best.read(records)
        # The newest values are those that are shown.
        return self._best.new_bests & shown.keys()

    def _start(self, trainer: Trainer) -> str:
        if self._is_evaluate:
            return ""
        progress, num_epochs = trainer.run_progress, trainer.run_config.num_epochs
        # Epochs are counted through all stages of a run, and its limit is that of the call.
        of = "" if num_epochs is None else f"/{progress.epochs_before_stage + num_epochs}"
        return f"Epoch {trainer.run_history.current_epoch}{of}"

    def _speed(self) -> dict[str, str]:
        """Return samples a second, and the time of the epoch, by their units."""
        if not self._samples or self._samples < 0:
            return {}
        # The coarse clocks of some platforms may not have moved.
        rate = self._samples / max(self._seconds, 1e-9)
        return {"samples/s": f"{rate:,.0f}", "": _duration(perf_counter() - self._epoch_began)}

    def _stop_clock(self) -> None:
        if self._began is not None:
            self._seconds += perf_counter() - self._began
            self._began = None


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d} min"
