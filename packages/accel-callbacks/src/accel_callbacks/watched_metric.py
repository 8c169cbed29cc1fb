"""A metric of the run history that a callback watches, and the comparison of its values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from accel_core import ConfigurationError
from accel_core.extending import did_you_mean

if TYPE_CHECKING:
    from accel_core import Trainer


class WatchedMetric:
    """Reads the value of one metric at the end of each epoch, and compares it with others."""

    def __init__(self, owner: str, name: str, greater_is_better: bool) -> None:
        """Hold the name.

        Args:
            owner: the class of the callback, for errors.

        Raises:
            ConfigurationError: the name is no string.
        """
        if not isinstance(name, str):
            raise ConfigurationError(
                f"watch_metric is {name!r}, but must be the name of a metric, such as 'eval_loss_epoch'."
            )
        self.owner = owner
        self.name = name
        self.greater_is_better = greater_is_better

    def check_will_be_recorded(self, trainer: Trainer) -> None:
        """Raise if the loss of evaluations is watched, but the run has no evaluation data.

        Call it in `on_training_run_start`, before an epoch is spent.
        """
        # Other names are not known before they are recorded: callbacks and the user's own steps choose them.
        if self.name == "eval_loss_epoch" and trainer.eval_dataloader is None:
            raise ConfigurationError(
                f"{self.owner} watches 'eval_loss_epoch', but train got no eval_dataset, so it would never "
                "be recorded. Pass an eval_dataset, or watch_metric='train_loss_epoch'."
            )

    def value_of_epoch(self, trainer: Trainer) -> float | None:
        """Return the newest value, or None if it was not recorded in the current epoch.

        Raises:
            ConfigurationError: the run history has no such metric at all.
        """
        history = trainer.run_history
        for record in reversed(history.get_records()):
            if record["name"] == self.name:
                return record["value"] if record["epoch"] == history.current_epoch else None
        names = sorted(history.get_metric_names())
        raise ConfigurationError(
            f"{self.owner} watches {self.name!r}, but the run history has only "
            f"{names}.{did_you_mean(self.name, names)}"
        )

    def is_better(self, value: float, best: float | None, by_more_than: float = 0.0) -> bool:
        """Whether `value` is better than `best`. None is worse than any number; nan is never better."""
        # A comparison with nan is False, so nan is never better; as the first value it has to be refused
        # here.
        if best is None:
            return not math.isnan(value)
        return (value - best if self.greater_is_better else best - value) > by_more_than
