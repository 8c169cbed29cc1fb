"""The run cards of two runs, side by side: what they were made of that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CARD_FILE = "run_card.json"

_COMPARED = ("versions", "hardware", "settings", "trainer", "arguments", "data", "seed", "beginning")
_LEFT_OUT = ("trainer.watching_callbacks",)
"""What has no influence, such as the folder of a saver."""


def differences_of_cards(a: Path, b: Path) -> dict[str, tuple[Any, Any]]:
    """Return what the cards of two runs say differently: both values, by a name such as `versions.torch`.

    Empty if one of the runs has no card, which older versions did not write.

    Args:
        a: a training state, or the folder of a run.
        b: the same of the other run.
    """
    one, other = _read_card(a), _read_card(b)
    if one is None or other is None:
        return {}
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    return {
        name: (ours.get(name), theirs.get(name))
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    }


def _read_card(path: Path) -> dict[str, Any] | None:
    for folder in (path, path.parent):
        try:
            card = json.loads((folder / CARD_FILE).read_bytes())
        # A card explains, and no weights depend on it: without one the states are compared alone.
        except (OSError, ValueError):
            continue
        return card if isinstance(card, dict) else None
    return None


def _flat(card: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _COMPARED:
        yield from _leaves(name, card.get(name))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if name in _LEFT_OUT:
        return
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value
