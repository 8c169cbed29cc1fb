"""Which of the training states of a run stay: the newest, and the best by a metric."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from .watched_metric import WatchedMetric

_NAME = re.compile(r"update_\d+(\.replaced)?")

Place = TypeVar("Place")


def states_to_remove(
    states: Mapping[Place, Any], keep_last: int | None, keep_best: int | None, watched: WatchedMetric
) -> list[Place]:
    """Return the places of the states that need not be kept.

    Args:
        states: those of one run, the newest last, with their `metrics`. Only what
            `SaveTrainingStateCallback` has named is ever removed.
    """
    if keep_last is None and keep_best is None:
        return []
    own = {
        place: facts
        for place, facts in states.items()
        if _NAME.fullmatch(str(place).replace("\\", "/").rpartition("/")[2])
    }
    kept = set(list(own)[-(keep_last or 1) :])
    values = {place: facts.metrics.get(watched.name) for place, facts in own.items()}
    good = {
        place: value
        for place, value in values.items()
        if value is not None and watched.is_better(value, None)
    }
    best_first = sorted(good, key=good.__getitem__, reverse=watched.greater_is_better)
    kept.update(best_first[: keep_best or 0])
    return [place for place in own if place not in kept]
