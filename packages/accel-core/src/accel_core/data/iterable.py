"""Iterable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset

from .order import share_of


class ShardedIterable(IterableDataset[Any]):
    """Any iterable as an `IterableDataset`, of which a process keeps its part of each global step."""

    def __init__(self, iterable: Iterable[Any], step: tuple[int, int, int, bool] | None = None) -> None:
        self.iterable = iterable
        self.step = step
        """Batch size, number of processes, index of this process, drop_last; None to keep everything."""
        self.num_skipped = 0
        """Samples that are read and left out at the beginning."""

    def __iter__(self) -> Iterator[Any]:
        samples = itertools.islice(self.iterable, self.num_skipped, None)
        if self.step is None or self.step[1] == 1:
            yield from samples
            return
        batch_size, num_processes, process_index, drop_last = self.step
        while chunk := list(itertools.islice(samples, batch_size * num_processes)):
            if len(chunk) == batch_size * num_processes or not drop_last:
                yield from chunk[share_of(len(chunk), num_processes, process_index)]
