"""Iterable data sets in a loader of torch's own: each step of their samples is sharded over the processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ..processes.group import DataGroup
from .counted_batches import CountingCollate
from .readers import First, ShardedIterable, collate_with_first, length_of, unwrapped
from .source import SequentialSource, is_plain_loader
from .workers import Workers, rebuild_loader, seed_workers


class IterableSource(SequentialSource):
    """Every process reads all samples and joins its part of each step to a batch."""

    def __init__(self, loader: Any, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        super().__init__(loader, seed, group)
        self.generator = torch.Generator("cpu")
        self.workers = Workers()
        dataset = loader.dataset
        # Workers may look at the data set, and divide it among themselves. Then it has to be the user's own.
        if not loader.num_workers or not group.is_single:
            dataset = ShardedIterable(dataset, loader.batch_size, loader.drop_last, group)
        changed: dict[str, Any] = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        if not group.is_single:
            changed["collate_fn"] = functools.partial(collate_with_first, CountingCollate(loader.collate_fn))
        self.torch_loader: DataLoader[Any] | None = rebuild_loader(loader, dataset, self.generator, **changed)

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return whether a loader of torch's own joins samples of an `IterableDataset` to batches."""
        return (
            is_plain_loader(loader)
            and isinstance(loader.dataset, IterableDataset)
            and loader.batch_size is not None
        )

    @property
    def num_steps(self) -> int | None:
        """Steps by the length of the data set, which counts its samples, or None if it has none."""
        num_samples = length_of(unwrapped(self.dataset))
        if num_samples is None:
            return None
        return num_samples // self.step_size if self.loader.drop_last else -(-num_samples // self.step_size)

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        """Go to `position`; workers draw their random numbers from (seed, epoch)."""
        super().begin_epoch(epoch, position, max_steps)
        # The same on every process: what shuffles in its workers has to have one order on all of them.
        seed_workers(self.generator, self.seed, epoch, DataGroup())

    def open_batches(self) -> Iterator[Any]:
        """Begin to read: the samples to skip are left out singly, with workers in whole batches."""
        torch_loader: Any = self.torch_loader
        if not self.loader.num_workers:
            # Samples are counted before they are joined, so a batch of another size begins at the right one.
            torch_loader.dataset.num_skipped = self.samples_to_skip
            return self.workers.start(torch_loader)
        # What a worker reads cannot be reached any more, so a cut batch is read again as a whole.
        return itertools.islice(
            self.workers.start(torch_loader), self.samples_to_skip // self.loader.batch_size, None
        )

    def take_step(self, batches: Iterator[Any]) -> list[Any]:
        """Return the next batch, which consists of this process's samples alone."""
        step = list(itertools.islice(batches, 1))
        if not self.group.is_single:
            first = step[0].digest if step and isinstance(step[0], First) else None
            step = [batch.value if isinstance(batch, First) else batch for batch in step]
            self.compare_first_items(first)
        return step

    def close(self) -> None:
        """End the workers."""
        self.workers.end()
        self.torch_loader = None
