"""Map-style data in a loader of torch's own: planned beforehand, and read in the order of accel."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..processes.group import DataGroup
from .batch_sampler import ShardedBatchSampler, sampler_of
from .order import EpochOrder
from .readers import IndexedTensors, SampleReader, SeededSampleReader, indexable_tensors
from .source import is_plain_loader
from .workers import Workers, rebuild_loader, seed_workers


class MapStyleSource:
    """Every process knows the order of the whole epoch, and reads its samples of each step by index."""

    state = None

    def __init__(self, loader: Any, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        sampler, batch_size, drop_last = sampler_of(loader)
        self.seed = seed
        self.group = group
        self.batch_size = batch_size
        self.generator = torch.Generator("cpu")
        self.workers = Workers()
        self.has_workers = loader.num_workers > 0
        order = EpochOrder(sampler, seed, is_shared=not group.is_only_process)
        dataset = loader.dataset
        reader = SeededSampleReader(dataset, seed) if seed_each_sample else SampleReader(dataset)
        self.torch_loader: DataLoader[Any] | None
        if loader.batch_sampler is None:
            # The data set gives ready batches, which torch must not join again: one for the index of a step,
            # or one for the list of indices that a BatchSampler gives.
            convert: Any = None if batch_size is not None else _first
            if seed_each_sample:
                convert = _with_epoch if batch_size is not None else _first_with_epoch
            self.sampler = ShardedBatchSampler(order, batch_size or 1, drop_last, group, convert)
            self.torch_loader = rebuild_loader(
                loader, reader, self.generator, batch_size=None, sampler=self.sampler
            )
            return
        if _is_in_memory(loader):
            # Tensors draw no random numbers, so seeding each sample would change nothing.
            self.sampler = ShardedBatchSampler(order, batch_size, drop_last, group, in_tensors=True)
            tensors = IndexedTensors(dataset)
            self.torch_loader = rebuild_loader(loader, tensors, self.generator, batch_sampler=self.sampler)
            return
        convert = _with_epoch if seed_each_sample else None
        self.sampler = ShardedBatchSampler(order, batch_size, drop_last, group, convert)
        self.torch_loader = rebuild_loader(loader, reader, self.generator, batch_sampler=self.sampler)

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return whether a loader of torch's own reads by index, from a sampler that knows its length."""
        if not is_plain_loader(loader) or isinstance(loader.dataset, IterableDataset):
            return False
        return hasattr(sampler_of(loader)[0], "__len__")

    @property
    def is_sized(self) -> bool:
        """Whether the order is known beforehand; that of a live sampler only when it is read."""
        return not self.sampler.is_live

    @property
    def live_sizes(self) -> deque[int]:
        """Samples of the batches that are read, if `is_sized` is false."""
        return self.sampler.live_sizes

    @property
    def num_samples(self) -> int | None:
        """Samples of the order, or None if a batch sampler of the user's own gives batches of any size."""
        return None if self.sampler.batch_size is None else len(self.sampler.order)

    @property
    def num_steps(self) -> int:
        """Steps of an epoch."""
        return self.sampler.num_steps

    @property
    def may_lack_batches(self) -> bool:
        """Whether the last step of the epoch begun is too small for all processes."""
        return not self.group.is_single and self.sampler.last_step_lacks_batches

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        """Go to `position`, without reading what comes before it."""
        if self.has_workers:
            seed_workers(self.generator, self.seed, epoch, self.group)
        self.sampler.max_steps = max_steps
        self.sampler.begin_epoch(epoch, position)

    def plan(self) -> Sequence[tuple[int, int]] | None:
        """Return the samples on all processes and on this one for each step of the epoch begun.

        None if a live sampler gives the order.
        """
        return None if self.sampler.is_live else self.sampler.plan()

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        """Return an iterator over the batches that costs a step no call of its own."""
        loader: Any = self.torch_loader
        data = loader.dataset
        if self.has_workers:
            return self.workers.start(loader)
        # What torch's iterator does without workers, but for its record of the profiler around each batch,
        # which takes as long as a small model.
        if isinstance(data, IndexedTensors):
            data.renew()
            return map(data.__getitems__, self.sampler)
        read_batch = data.__getitem__ if loader.batch_sampler is None else data.__getitems__
        return map(loader.collate_fn, map(read_batch, self.sampler))

    def restore(self, state: Any) -> None:
        """Do nothing: the position is enough."""

    def limits_of_exactness(self, saved_position: int, saved_num_processes: int) -> list[str]:
        """Return a sentence if the sampler may give another order after a restart."""
        order = self.sampler.order
        if order.is_function_of_epoch:
            return []
        return [
            f"The sampler {type(order.sampler).__name__} has no set_epoch, so its order may differ after a "
            "restart: samples may come twice or not at all. Give it a method set_epoch(epoch) that sets its "
            "order."
        ]

    def count_batches(self) -> None:
        """Take positions for numbers of batches if a batch sampler of the user's own makes them."""
        self.sampler.counts_batches = self.sampler.batch_size is None

    def close(self) -> None:
        """End the workers."""
        self.workers.end()
        self.torch_loader = None


def _is_in_memory(loader: Any) -> bool:
    """Whether whole batches can be indexed from tensors in memory."""
    # Another collate function needs single samples, and a copy of the tensors in each worker gains nothing.
    if loader.collate_fn is not default_collate or loader.num_workers:
        return False
    return indexable_tensors(loader.dataset) is not None


# From the indices of a batch to what the reader is asked for. Functions of the module and no lambdas, since a
# trainer is pickled with its loader.


def _first(indices: list[Any], epoch: int) -> Any:
    return indices[0]


def _with_epoch(indices: list[Any], epoch: int) -> tuple[int, list[Any]]:
    # The epoch travels with the indices, since persistent workers never see a changed attribute.
    return epoch, indices


def _first_with_epoch(indices: list[Any], epoch: int) -> tuple[int, Any]:
    return epoch, indices[0]
