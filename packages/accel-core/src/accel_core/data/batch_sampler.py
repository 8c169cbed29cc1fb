"""The indices of the batches of one process, as its shard of the order of an epoch."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, Sampler

from ..processes.group import DataGroup
from .order import EpochOrder, shard_of


class StepPlan(Sequence[tuple[int, int]]):
    """The sizes of equal steps and of the last one, of all processes and of this one.

    It takes the same memory for any number of steps.
    """

    def __init__(self, num_steps: int, full: tuple[int, int], last: tuple[int, int]) -> None:
        self.num_steps = num_steps
        self.full = full
        self.last = last

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: Any) -> Any:
        steps = range(self.num_steps)[step]
        if isinstance(steps, range):
            return [self.last if each == self.num_steps - 1 else self.full for each in steps]
        return self.last if steps == self.num_steps - 1 else self.full

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Without a call of Python in each step.
        return itertools.chain(itertools.repeat(self.full, self.num_steps - 1), [self.last])


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
        group: DataGroup,
        convert: Callable[[list[Any], int], Any] | None = None,
        in_tensors: bool = False,
    ) -> None:
        """Shard `order`.

        Args:
            batch_size: of one process, or None if `order` gives ready batches, which are assigned
                round-robin.
            convert: from the indices of a batch and the epoch to what the data set is asked for; None asks
                for the indices.
            in_tensors: ask for the indices as an int64 tensor, not as a list.
        """
        self.order = order
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.group = group
        self.convert = convert
        self.in_tensors = in_tensors
        self.max_steps: int | None = None
        """Global steps of an epoch, counted from its beginning, after which it ends early."""
        self.step_size = (batch_size or 1) * group.size
        """Items of the order in a full global step."""
        self.epoch = 0
        self._position = 0
        self._items: Any = ()
        self._start = 0
        self.is_live = group.is_only_process and order.is_users
        """The sampler is iterated while the epoch goes on, as torch does: it may look at what happens."""
        self.counts_batches = False
        """The position counts ready batches: of a share nobody knows the samples of the others."""
        self.live_sizes: deque[int] = deque()
        """Samples of the batches that a live sampler has given and the loop has not taken yet."""

    @property
    def num_steps(self) -> int:
        """Global steps of a whole epoch without a limit."""
        num_items = len(self.order)
        return num_items // self.step_size if self.drop_last else -(-num_items // self.step_size)

    def begin_epoch(self, epoch: int, position: int = 0) -> None:
        """Go to the sample `position` (counted over all processes) of `epoch` (from 0)."""
        self.epoch = epoch
        self._position = position
        self._items = None

    @property
    def items(self) -> Any:
        """The order of the epoch begun, drawn when it is first asked for.

        Callbacks may change data and sampler when the epoch starts, which is after `begin_epoch`.
        """
        if self._items is None:
            items = self.order.of_epoch(self.epoch)
            # An array is sliced in a tenth of the time.
            self._items = items.numpy() if isinstance(items, torch.Tensor) else items
            position = self._position
            self._start = position if self.batch_size is not None else self._batch_at(position)
        return self._items

    def _batch_at(self, position: int) -> int:
        """Return the number of the ready batch that begins at the sample `position`, or after it."""
        if self.counts_batches:
            return min(position, len(self._items))
        skipped = 0
        for number, batch in enumerate(self._items):
            if skipped >= position:
                return number
            skipped += len(batch)
        return len(self._items)

    def plan(self) -> Sequence[tuple[int, int]]:
        """Return the samples of all processes and of this one for each global step of the epoch."""
        items = self.items
        if self.batch_size is None:
            return [
                (sum(map(len, items[first:stop])), sum(map(len, items[part])))
                for first, stop, part in self._steps(items)
            ]
        firsts = self._firsts(items)
        if not firsts:
            return []
        size_of_last = min(self.step_size, len(items) - firsts[-1])
        return StepPlan(len(firsts), self._sizes(self.step_size), self._sizes(size_of_last))

    def _sizes(self, size: int) -> tuple[int, int]:
        part = shard_of(size, self.group)
        return size, part.stop - part.start

    @property
    def last_step_lacks_batches(self) -> bool:
        """Whether a process is without a batch in the last step of the epoch begun."""
        items = self.items
        firsts = self._firsts(items)
        return bool(firsts) and min(self.step_size, len(items) - firsts[-1]) < self.group.size

    def __iter__(self) -> Iterator[Any]:
        return self._live_batches() if self.is_live else self._planned_batches()

    def _live_batches(self) -> Iterator[Any]:
        self.live_sizes.clear()
        size = self.batch_size
        # What comes before the position is drawn and left out, but not read.
        items = iter(self.order.sampler)
        if size is not None:
            items = itertools.islice(items, self._position, None)
            batches: Iterator[list[Any]] = iter(lambda: list(itertools.islice(items, size)), [])
        else:
            # Copied, since many a batch sampler gives one list again and again.
            # The limit counts from the beginning of the epoch, in batches of any size.
            batches = self._after_position(map(list, itertools.islice(items, self.max_steps)))
        most = None
        if self.max_steps is not None and size is not None:
            most = max(self.max_steps - -(-self._position // self.step_size), 0)
        for batch in itertools.islice(batches, most):
            if self.drop_last and size is not None and len(batch) < size:
                return
            self.live_sizes.append(len(batch))
            given: Any = torch.as_tensor(batch, dtype=torch.int64, device="cpu") if self.in_tensors else batch
            yield given if self.convert is None else self.convert(given, self.epoch)

    def _after_position(self, batches: Iterator[list[Any]]) -> Iterator[list[Any]]:
        skipped = 0
        for batch in batches:
            if skipped >= self._position:
                yield batch
            skipped += 1 if self.counts_batches else len(batch)

    def _planned_batches(self) -> Iterator[Any]:
        has_batch = False
        items = self.items
        for first, _, part in self._steps(items):
            if part.stop == part.start:
                # Only the last step may lack samples, so a batch that was read before can be repeated.
                if has_batch:
                    continue
                part = slice(first, first + 1)
            has_batch = True
            batch = items[part] if self.batch_size is not None else items[part.start]
            if self.in_tensors:
                if type(batch) is range:
                    batch = np.arange(batch.start, batch.stop)
                # An array is taken as it is, in a third of the time of `as_tensor`.
                if type(batch) is np.ndarray:
                    batch = torch.from_numpy(batch)
                else:
                    batch = torch.as_tensor(batch, dtype=torch.int64, device="cpu")
            elif isinstance(batch, (np.ndarray, torch.Tensor)):
                # Data sets expect the numbers of python, as torch's own samplers give them.
                batch = batch.tolist()
            elif type(batch) is range:
                batch = list(batch)
            yield batch if self.convert is None else self.convert(batch, self.epoch)

    def batches_with_samples(self) -> Iterator[list[Any]]:
        """Yield the indices of this process for each global step, from the position on; maybe none."""
        items = self.items
        for _, _, part in self._steps(items):
            batch = items[part]
            batch = batch.tolist() if isinstance(batch, np.ndarray) else list(batch)
            yield batch if self.batch_size is not None else list(itertools.chain.from_iterable(batch))

    def _firsts(self, items: Any) -> range:
        """Return the first of `items` of each global step, from the position on."""
        # An incomplete step is left out with drop_last, on all processes.
        end = len(items) - (self.step_size - 1 if self.drop_last else 0)
        firsts = range(self._start, end, self.step_size)
        if self.max_steps is None:
            return firsts
        # The limit counts from the beginning of the epoch; a step that the position cuts counts as one.
        steps_before = -(-self._start // self.step_size)
        return firsts[: max(self.max_steps - steps_before, 0)]

    def _steps(self, items: Any) -> Iterator[tuple[int, int, slice]]:
        """Return first item, end and this process's slice of each global step, from the position on."""
        firsts = self._firsts(items)
        if not firsts:
            return iter(())
        last = firsts[-1]
        stop = min(last + self.step_size, len(items))
        part = shard_of(self.step_size, self.group)
        part_of_last = shard_of(stop - last, self.group)
        full = firsts[:-1]
        # Without a call of Python in each step.
        parts = map(slice, _shifted(full, part.start), _shifted(full, part.stop))
        step = (last, stop, slice(last + part_of_last.start, last + part_of_last.stop))
        return itertools.chain(zip(full, _shifted(full, self.step_size), parts, strict=True), [step])


def _shifted(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by, numbers.step)


def sampler_of(loader: Any) -> tuple[Any, int | None, bool]:
    """Return the sampler, batch size and drop_last of a torch loader.

    Of a batch sampler of the user's own, or of ready batches, itself, None and False.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    # Torch's own BatchSampler only groups what its sampler gives, which the order of accel replaces.
    if type(sampler) is BatchSampler:
        return sampler.sampler, sampler.batch_size, sampler.drop_last
    return sampler, None, False
