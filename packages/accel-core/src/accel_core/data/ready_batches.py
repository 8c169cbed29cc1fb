"""Ready batches, from a loader that iterates in its own way: assigned to the processes round-robin."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..processes.group import DataGroup
from .readers import length_of
from .source import SequentialSource
from .workers import Workers


class ReadyBatchesSource(SequentialSource):
    """Every process iterates the whole loader and keeps one batch of each step.

    The loader is used as it is: its batches may be of any size, and its workers are its own.
    """

    def __init__(self, loader: Any, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        super().__init__(loader, seed, group)
        self.workers = Workers()

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return True: whatever can be iterated has batches."""
        return True

    @property
    def num_steps(self) -> int | None:
        """Steps by the length of the loader, which counts its batches, or None if it has none."""
        num_batches = length_of(self.loader)
        return None if num_batches is None else -(-num_batches // self.group.size)

    def open_batches(self) -> Iterator[Any]:
        """Begin to iterate the loader, in whole batches."""
        # A batch cannot be cut, so one that was trained on in part is read again as a whole.
        return itertools.islice(
            self.workers.start(self.loader), self.samples_to_skip // (self.batch_size or 1), None
        )

    def take_step(self, batches: Iterator[Any]) -> list[Any]:
        """Return the batch of this process among the next ones, of which there is one for each process."""
        # The others' batches are dropped one by one, so that no more than one is held.
        step = enumerate(itertools.islice(batches, self.group.size))
        return [batch for number, batch in step if number == self.group.index]
