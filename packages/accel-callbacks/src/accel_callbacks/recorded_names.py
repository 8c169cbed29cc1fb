"""Makes sure that no two metrics of callbacks are recorded under one name."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import named_sets, prefix_of

if TYPE_CHECKING:
    from accel_core import Trainer


class RecordsMetrics(TrainerCallback):
    """A callback that knows the names of its metrics before it computes them."""

    def _recorded_names(self) -> set[str]:
        """Return the names that the metrics are recorded as, without those of evaluation sets."""
        raise NotImplementedError

    def _check_names(self, trainer: Trainer) -> None:
        """Raise if another callback records a metric of the same name: it would have two values per epoch."""
        for other in trainer.callbacks:
            shared = (
                self._recorded_names() & other._recorded_names()
                if isinstance(other, RecordsMetrics) and other is not self
                else set()
            )
            if shared:
                kinds = " and a ".join(sorted(type(callback).__name__ for callback in (self, other)))
                raise ConfigurationError(
                    f"A {kinds} record {min(shared)!r}, so the run history would have two values "
                    "of it per epoch. Give one of them a prefix, or pass its metrics as a dict with other "
                    "names."
                )

        sets = [prefix_of(name) for name in named_sets(trainer.eval_dataset)]
        by_set = Counter(f"{prefix}{name}" for prefix in sets for name in self._recorded_names())
        name, number = by_set.most_common(1)[0] if by_set else ("", 0)
        if number > 1:
            raise ConfigurationError(
                f"Two evaluation sets record {name!r}, so the run history would have two values of it per "
                "evaluation. Give the metric or the set another name."
            )
