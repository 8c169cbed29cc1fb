"""Batches that travel with the number of samples that were joined, where that is not known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class CountedBatch(NamedTuple):
    """What a collate function returned, which may be None, and the samples that it was given."""

    batch: Any
    num_samples: int | None
    """Samples that are not None, as which data sets give those that cannot be read; None if not known."""


class CountingCollate:
    """Joins samples by a collate function and counts them, in a worker too."""

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: Any) -> CountedBatch:
        """Return the batch with its count, which is taken first: the function may change the list."""
        is_list = isinstance(samples, (list, tuple))
        num_samples = sum(sample is not None for sample in samples) if is_list else None
        return CountedBatch(self.collate_fn(samples), num_samples)
