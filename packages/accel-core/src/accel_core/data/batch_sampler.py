"""Batch sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Sampler

from .order import EpochOrder, share_of


class ShardedBatchSampler(Sampler[Any]):
    """The batches of one process in one epoch, from a position on; `begin_epoch` chooses both.

    A process that has no sample in the last step gets no batch for it; if it would get none at all, it gets
    one with the first sample of the order, to take part with weight zero.
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
            batch_size: of one process, or None where `order` gives ready batches, of which each process takes
                every W-th.
            convert: from the indices of a batch and the epoch to what the data set is asked for; None asks
                for the indices.
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
    """The sampler, batch size and drop_last of torch's own `BatchSampler`.

    Of any other itself, None and False.
    """
    if type(batch_sampler) is BatchSampler:
        return batch_sampler.sampler, batch_sampler.batch_size, batch_sampler.drop_last
    return batch_sampler, None, False
