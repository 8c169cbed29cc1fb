"""Which sample comes when: a function of (seed, epoch), shared out over the processes.

The global step k of an epoch takes the samples [k·B·W, (k+1)·B·W) of the order, B being the batch size of one process and
W the number of processes; each process takes its slice. What is left at the end is dealt out so that as many processes
as possible have some. The position in an epoch is a number of samples, so another B or W goes on with the next sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .distributed import is_distributed, share_from_main


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a function of `parts` alone; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of `range(num_samples)`, int64, that is a function of its arguments alone."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch)))


def share_of(num_items: int, num_processes: int, process_index: int) -> slice:
    """The contiguous part of `num_items` that falls to a process; sizes differ by one at most, the first have more."""
    size, extra = divmod(num_items, num_processes)
    start = process_index * size + min(process_index, extra)
    return slice(start, start + size + (process_index < extra))


class EpochOrder:
    """The order of the samples of an epoch, from a sampler or from (seed, epoch)."""

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def of_epoch(self, epoch: int) -> Sequence[Any] | torch.Tensor | np.ndarray[Any, Any]:
        """Indices in the order of `epoch` (from 0), the same on every process."""
        sampler: Any = self.sampler
        if type(sampler) is SequentialSampler:
            return np.arange(len(sampler))
        if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source):
            return random_order(len(sampler), self.seed, epoch)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if type(sampler) in (RandomSampler, WeightedRandomSampler, SubsetRandomSampler):
            own = sampler.generator
            sampler.generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            try:
                return list(sampler)
            finally:
                sampler.generator = own
        # Another's sampler may draw random numbers of its own, so only the main process's order counts.
        return share_from_main(list(sampler)) if is_distributed() else list(sampler)

    @property
    def is_function_of_epoch(self) -> bool:
        """Whether the order of an epoch can be had again after a restart."""
        known = (SequentialSampler, RandomSampler, WeightedRandomSampler, SubsetRandomSampler)
        return type(self.sampler) in known or hasattr(self.sampler, "set_epoch")


class ShardedBatchSampler(Sampler[Any]):
    """The batches of one process in one epoch, from a position on; `begin_epoch` chooses both.

    A process that has no sample in the last step gets no batch for it; if it would get none at all, it gets one with the
    first sample of the order, to take part with weight zero.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int | None,
        drop_last: bool,
        num_processes: int = 1,
        process_index: int = 0,
        convert: Callable[[list[Any], int], Any] | None = None,
        in_tensors: bool = False,
    ) -> None:
        """Share out `order`.

        Args:
            batch_size: of one process, or None where `order` gives ready batches, of which each process takes every W-th.
            convert: from the indices of a batch and the epoch to what the data set is asked for; None asks for the indices.
            in_tensors: ask for the indices as an int64 tensor, not as a list.
        """
        self.order = order
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_processes = num_processes
        self.process_index = process_index
        self.convert = convert
        self.in_tensors = in_tensors
        self.max_steps: int | None = None
        """Global steps of an epoch, counted from its beginning, after which it ends early."""
        self.step_size = (batch_size or 1) * num_processes
        """Items of the order in a full global step."""
        self.epoch = 0
        self.items: Any = ()
        self.start = 0

    def begin_epoch(self, epoch: int, position: int = 0) -> None:
        """Go to the sample `position` (counted over all processes) of `epoch` (from 0)."""
        self.epoch, self.items, self.start = epoch, self.order.of_epoch(epoch), position
        if isinstance(self.items, torch.Tensor):
            self.items = self.items.numpy()  # Slices of an array are had in a tenth of the time.
        if self.batch_size is None:
            skipped = 0
            self.start = len(self.items)
            for number, batch in enumerate(self.items):
                if skipped >= position:
                    self.start = number
                    break
                skipped += len(batch)

    def plan(self) -> Iterator[tuple[int, int]]:
        """For each global step of the epoch, the samples of all processes and of this one."""
        latest = (0, 0)
        for first, stop, part in self._steps():
            if self.batch_size is None:
                yield sum(map(len, self.items[first:stop])), sum(map(len, self.items[part]))
            elif latest != (sizes := (stop - first, part.stop - part.start)):
                latest = sizes
                yield sizes
            else:
                yield latest  # One pair for all equal steps: a long plan stays small.

    @property
    def is_unequal(self) -> bool:
        """Whether a process is without a batch in the last step of the epoch begun."""
        return any(stop - first < self.num_processes for first, stop, _ in list(self._steps())[-1:])

    def __iter__(self) -> Iterator[Any]:
        has_batch = False
        for first, _, part in self._steps():
            if part.stop == part.start:
                if has_batch:
                    continue
                part = slice(first, first + 1)
            has_batch = True
            batch = self.items[part] if self.batch_size is not None else self.items[part.start]
            if self.in_tensors:
                batch = torch.as_tensor(batch, dtype=torch.int64)
            elif isinstance(batch, (np.ndarray, torch.Tensor)):
                batch = batch.tolist()
            yield batch if self.convert is None else self.convert(batch, self.epoch)

    def _steps(self) -> Iterator[tuple[int, int, slice]]:
        """First and last item of each global step from the position on, and where those of this process lie."""
        num_items, step_size = len(self.items), self.step_size
        steps = range(self.start, num_items, step_size)
        if self.max_steps is not None:
            steps = steps[: max(self.max_steps - -(-self.start // step_size), 0)]
        part = share_of(step_size, self.num_processes, self.process_index)
        for first in steps:
            stop = first + step_size
            if stop > num_items:
                if self.drop_last:
                    return
                stop = num_items
                part = share_of(stop - first, self.num_processes, self.process_index)
            yield first, stop, slice(first + part.start, first + part.stop)


def split_batch_sampler(batch_sampler: Any) -> tuple[Any, int | None, bool]:
    """The sampler, batch size and drop_last of torch's own `BatchSampler`; of any other itself, None and False."""
    if type(batch_sampler) is BatchSampler:
        return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    return batch_sampler, None, False
