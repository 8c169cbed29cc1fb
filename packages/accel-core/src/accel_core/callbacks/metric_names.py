"""Names of metrics as people read them, and which direction is better."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

_WORDS = {"eval": "val"}
"""Parts of names that people know by another word."""


@functools.lru_cache(maxsize=4096)  # The same few names in every epoch.
def readable_name(name: str) -> str:
    """Return the name of a metric for people: `eval_loss_epoch` is `val loss`, `top_5` is `top 5`."""
    parts = name.removesuffix("_epoch").split("_")
    return " ".join(_WORDS.get(part, part) for part in parts if part) or name


def readable_value(value: Any) -> str:
    """Return four digits of a number, or a text as it is."""
    return value if isinstance(value, str) else f"{float(value):.4g}"


def directions(names: Iterable[str], callbacks: Iterable[Any]) -> dict[str, bool]:
    """Return of those metrics whose best value is known whether a greater one is better.

    They are the losses of evaluations, and what callbacks watch.
    """
    is_loss = {name: False for name in names if "eval_loss" in name}
    watched: list[Any] = [getattr(callback, "watched", None) for callback in callbacks]
    return is_loss | {
        each.name: bool(each.greater_is_better)
        for each in watched
        if hasattr(each, "name") and hasattr(each, "greater_is_better")
    }


class BestValues:
    """The best value of each metric of a history, which is read on from where it was read last."""

    def __init__(self, greater_is_better: dict[str, bool]) -> None:
        """Watch these metrics; the values of `greater_is_better` say which direction is better."""
        self.greater_is_better = greater_is_better
        self.new_bests: set[str] = set()
        """The metrics whose newest value is better than all before it; a first value is no new best."""
        self._best: dict[str, float] = {}
        self._records: Sequence[Any] | None = None
        self._num_read = 0

    def can_read_on(self, records: Sequence[Any], greater_is_better: dict[str, bool]) -> bool:
        """Whether `records` are those read last and new ones, and these metrics are watched."""
        is_watched = greater_is_better.items() <= self.greater_is_better.items()
        # A history makes a new list if one of its metrics is deleted.
        return is_watched and records is self._records and len(records) >= self._num_read

    def read(self, records: Sequence[Any]) -> None:
        """Read the records that are new."""
        for record in records[self._num_read :]:
            name, value = record["name"], record["value"]
            if name not in self.greater_is_better:
                continue
            best = self._best.get(name)
            # A comparison with nan is False, so nan is no best value and stands in nobody's way.
            is_better = best is not None and (value > best if self.greater_is_better[name] else value < best)
            (self.new_bests.add if is_better else self.new_bests.discard)(name)
            if is_better or (best is None and value == value):
                self._best[name] = value
        self._records, self._num_read = records, len(records)
