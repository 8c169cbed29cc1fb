"""A metric of the run history that a callback watches, and the comparison of its values."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from accel_core import ConfigurationError
from accel_core.extending import check_flag, did_you_mean

if TYPE_CHECKING:
    from accel_core import Trainer


class WatchedMetric:
    """Reads the newest value of one metric after each evaluation and epoch, and compares it with others."""

    def __init__(self, owner: str, name: str, greater_is_better: bool) -> None:
        """Hold the name.

        Args:
            owner: the class of the callback, for errors.
            greater_is_better: the best value is the greatest, and not the smallest.

        Raises:
            ConfigurationError: the name is no string, or `greater_is_better` neither True nor False.
        """
        if not isinstance(name, str):
            raise ConfigurationError(
                f"watch_metric is {name!r}, but must be the name of a metric, such as 'eval_loss_epoch'."
            )
        self.owner = owner
        self.name = name
        self.greater_is_better = check_flag("greater_is_better", greater_is_better)
        self.values_seen: int | None = None
        """Values in the run history that were looked at; None if the state of an earlier version lacks it."""

    def begin(self, trainer: Trainer) -> None:
        """Look only at what is recorded from now on, and raise if that will never be.

        Call it in `on_training_run_start`, before an epoch is spent.
        """
        self.check_will_be_recorded(trainer)
        self.values_seen = len(self._values(trainer))

    def check_will_be_recorded(self, trainer: Trainer) -> None:
        """Raise `ConfigurationError` if the loss of evaluations is watched, but the run has no such set."""
        # Other names are not known before they are recorded: callbacks and the user's own steps choose them.
        if self.name == "eval_loss_epoch" and trainer.eval_dataloader is None:
            raise ConfigurationError(
                f"{self.owner} watches 'eval_loss_epoch', but train got no eval_dataset, so it would never "
                "be recorded. Pass an eval_dataset, or watch_metric='train_loss_epoch'."
            )
        sets = list(trainer.eval_dataloaders)
        if self.name == "eval_loss_epoch" and "" not in sets:
            raise ConfigurationError(
                f"{self.owner} watches 'eval_loss_epoch', but the evaluation sets are called {sets}, so it "
                f"would never be recorded. Pass watch_metric='{sets[0]}_eval_loss_epoch'."
            )

    def new_value(self, trainer: Trainer) -> float | None:
        """Return the newest value, or None if it was looked at before or is not of the current epoch."""
        values = self._values(trainer)
        seen = self._seen_before(trainer, values)
        self.values_seen = len(values)
        return values[-1] if len(values) > seen else None

    def new_value_in_mid_epoch(self, trainer: Trainer) -> float | None:
        """Return what `new_value` does, but None after an evaluation that belongs to the end of an epoch.

        Call it in `on_evaluation_end`. Who watches acts on those others in `on_training_run_epoch_end`, where
        the epoch is counted and its scheduler has stepped.
        """
        return None if trainer.run_progress.train_epoch_completed else self.new_value(trainer)

    def new_value_of_epoch(self, trainer: Trainer) -> float | None:
        """Return what `new_value` does. Call it in `on_training_run_epoch_end`.

        Raises:
            ConfigurationError: the run history has no such metric at all, though the epoch was evaluated.
        """
        names = sorted(trainer.run_history.get_metric_names())
        if self.name not in names and self._should_be_there(trainer):
            raise ConfigurationError(
                f"{self.owner} watches {self.name!r}, but the run history has only "
                f"{names}.{did_you_mean(self.name, names)}"
            )
        return self.new_value(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state has to hold."""
        return {"values_seen": self.values_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which in earlier versions had nothing of this."""
        self.values_seen = state.get("values_seen")

    def _values(self, trainer: Trainer) -> list[float]:
        history = trainer.run_history
        return history.get_metric_values(self.name) if self.name in history.get_metric_names() else []

    def _seen_before(self, trainer: Trainer, values: list[float]) -> int:
        if self.values_seen is None:
            # Earlier versions looked once, at the end of each epoch.
            records = trainer.run_history.get_records()
            current = trainer.run_history.current_epoch
            return sum(1 for record in records if record["name"] == self.name and record["epoch"] < current)
        # A metric that was deleted from the history begins from scratch.
        return self.values_seen if self.values_seen <= len(values) else 0

    def _should_be_there(self, trainer: Trainer) -> bool:
        if not trainer.eval_dataloaders:
            return True
        # In mid-epoch the first evaluation may be due only in a later epoch, and so may that of an epoch.
        if "intermediate_" in self.name:
            return False
        # An average of weights may begin in a later epoch.
        if any(each.begins_later(self.name) for each in trainer.callbacks if hasattr(each, "begins_later")):
            return False
        history = trainer.run_history
        # Read from the end: a long history is not searched after every epoch.
        newest = itertools.takewhile(
            lambda record: record["epoch"] == history.current_epoch, reversed(history.get_records())
        )
        names = {record["name"] for record in newest}
        return any(name.endswith("eval_loss_epoch") and "intermediate_" not in name for name in names)

    def is_better(self, value: float, best: float | None, by_more_than: float = 0.0) -> bool:
        """Whether `value` is better than `best`. None is worse than any number; nan is never better.

        Args:
            by_more_than: the least difference that counts.
        """
        # A comparison with nan is False, so nan is never better; as the first value it has to be refused
        # here.
        if best is None:
            return not math.isnan(value)
        return (value - best if self.greater_is_better else best - value) > by_more_than
