"""The parts of which data is made: what is inside loaders, subsets, joined data sets and other wrappers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

MOST_ITEMS_LOOKED_AT = 1000
"""A longer list in a data set holds samples or indices, hardly ever further data sets."""

# What has many values or parts of its own, and holds no data sets.
_WITHOUT_PARTS = (str, bytes, torch.Tensor, np.ndarray, torch.nn.Module, type)


def parts_of(data: Any) -> Iterator[Any]:
    """Yield `data` and every data set, sampler and loader that it holds at any depth, each once."""
    seen: set[int] = set()
    waiting = [data]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for name, value in _attributes_of(part).items():
            # The iterators of a loader point back to it and hold its workers.
            if not _may_hold_data(type(value)) or name.startswith("_iterator"):
                continue
            if isinstance(value, (list, tuple, dict)):
                waiting += [each for each in flattened([value]) if _may_be_data(type(each))]
            else:
                waiting.append(value)


def announce_epoch(data: Any, epoch: int) -> set[int]:
    """Call `set_epoch(epoch)` of every part of `data` that has it; return the identities of these parts."""
    told = set()
    for part in parts_of(data):
        # Asked of the class: a wrapper that passes on unknown names would tell the data inside twice.
        if callable(getattr(type(part), "set_epoch", None)) or "set_epoch" in _attributes_of(part):
            part.set_epoch(epoch)
            told.add(id(part))
    return told


def _attributes_of(part: Any) -> dict[str, Any]:
    attributes = getattr(part, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def flattened(values: list[Any]) -> Iterator[Any]:
    """Yield `values`, and in place of each short list, tuple or dictionary what is in it."""
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            if len(value) <= MOST_ITEMS_LOOKED_AT:
                yield from value.values() if isinstance(value, dict) else value
        else:
            yield value


def _is_kind_of_data(kind: type) -> bool:
    """Whether objects of `kind` may be data, or may hold some."""
    if issubclass(kind, _WITHOUT_PARTS) or not kind.__dictoffset__:
        return False
    return any(hasattr(kind, name) for name in ("__getitem__", "__iter__", "set_epoch"))


def _is_kind_of_holder(kind: type) -> bool:
    return issubclass(kind, (list, tuple, dict)) or _is_kind_of_data(kind)


# Asked for every attribute of every part in every epoch, and of few classes.
_may_be_data: Callable[[type], bool] = functools.lru_cache(maxsize=4096)(_is_kind_of_data)
_may_hold_data: Callable[[type], bool] = functools.lru_cache(maxsize=4096)(_is_kind_of_holder)
