"""Names of metrics as people read them, and which direction is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WORDS = {"eval": "val"}
"""Parts of names that people know by another word."""


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


def new_bests(
    metrics: Mapping[str, float],
    values_before: Mapping[str, list[float]],
    greater_is_better: Mapping[str, bool],
) -> set[str]:
    """Return the names whose value is better than all before it; the first value is no new best."""
    best = set()
    for name, greater in greater_is_better.items():
        # A comparison with nan is False, so nan is no best value and stands in nobody's way.
        before = [value for value in values_before.get(name, []) if value == value]
        if name in metrics and before:
            value = metrics[name]
            if value > max(before) if greater else value < min(before):
                best.add(name)
    return best
