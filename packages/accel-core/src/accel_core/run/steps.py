"""The steps of an epoch on this process: its batches, what stands in for a missing one, and which is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from time import perf_counter
from typing import Any, NamedTuple

from accelerate.utils import send_to_device

from ..data.loader import ShardedDataLoader
from ..processes.collectives import all_gather_object, sum_over_processes


class Step(NamedTuple):
    """One batch of an update on this process."""

    batch: Any
    is_last: bool
    """It is the last of its update, so gradients are synchronised."""
    is_padding: bool
    """This process has no samples in this step: it repeats a batch with weight zero, because the others need it."""
    planned_items: float | None
    """Samples that the batch has if nothing drops any; None for data without a length."""
    num_samples: int | None = None
    """Samples that were joined to the batch; None if only the batch itself tells."""
    is_left_out: bool = False
    """The batch was None. The step keeps its place and weighs nothing; `batch` is one to repeat, or None."""


def planned_steps(
    loader: ShardedDataLoader, plan: list[tuple[int, int]], steps_of_update: int, keep_padding: bool = True
) -> Iterator[Step]:
    """Yield all steps of the epoch begun.

    Args:
        keep_padding: give a step without samples a batch to repeat, on several processes. All of them take part.
    """
    asked_at = perf_counter()
    batches = iter(loader)
    repeated = RepeatedBatch(loader, keep_padding)
    batch = None
    has_read = False
    # Starting the workers is part of waiting for the first batch.
    loader.seconds_waited += perf_counter() - asked_at
    counts_plan = loader.plan_counts_samples
    for number, (_, size) in enumerate(plan, start=1):
        if size or not has_read:
            asked_at = perf_counter()
            batch = next(batches)
            has_read = True
            loader.seconds_waited += perf_counter() - asked_at
            if batch is not None and repeated.is_kept:
                repeated.batch = batch
        if repeated.is_missing:
            repeated.share()
        is_last = number % steps_of_update == 0 or number == len(plan)
        if size and batch is not None:
            yield Step(batch, is_last, False, size, size if counts_plan else loader.samples_given)
            continue
        is_left_out = size > 0
        loader.batches_left_out += is_left_out
        yield Step(repeated.batch, is_last, True, size, None, is_left_out)


class RepeatedBatch:
    """What a process repeats in a step in which it has no samples and others do: its latest batch, or one of another."""

    def __init__(self, loader: ShardedDataLoader, is_needed: bool) -> None:
        self.loader = loader
        self.batch: Any = None
        self.is_kept = is_needed and not loader.group.is_single
        self.is_missing = self.is_kept and loader.may_leave_out_batches
        """Some process may have had no batch so far; the same on every process."""

    def share(self) -> None:
        """Take another process's batch if this one has had none so far. Every process takes part."""
        owners = all_gather_object(self.batch is not None)
        if not any(owners):
            return
        if not all(owners):
            owner = owners.index(True)
            shared = all_gather_object(self.batch if self.loader.group.index == owner else None)[owner]
            self.batch = send_to_device(shared, self.loader.device) if self.batch is None else self.batch
        self.is_missing = False


def steps_without_plan(ahead: LookAhead, most: int) -> Iterator[Step]:
    """Yield the steps of one update of data without a length, `most` of them. Every process takes part."""
    for number in range(1, most + 1):
        step = ahead.take()
        is_last = number == most or not ahead.has_next
        yield step._replace(is_last=is_last)
        if is_last:
            return


class LookAhead:
    """Batches of this process, and whether any process has a next one."""

    def __init__(self, loader: ShardedDataLoader) -> None:
        self.loader = loader
        asked_at = perf_counter()
        self.batches = iter(loader)
        loader.seconds_waited += perf_counter() - asked_at
        self.repeated = RepeatedBatch(loader, is_needed=True)
        self.next: list[Any] = []
        """The batch that comes next, if there is one; it is None if it is left out."""
        self._fetch()

    def _fetch(self) -> None:
        asked_at = perf_counter()
        self.next = list(itertools.islice(self.batches, 1))
        self.loader.seconds_waited += perf_counter() - asked_at
        self.has_next = any(all_gather_object(bool(self.next)))
        if self.repeated.is_missing and self.has_next:
            # The batch that comes next is good enough for those that get none before.
            if self.repeated.batch is None and self.next:
                self.repeated.batch = self.next[0]
            self.repeated.share()

    def take(self) -> Step:
        """Return the step of the next batch; if only other processes have one, it repeats a batch."""
        batch = self.next[0] if self.next else None
        is_left_out = batch is None and bool(self.next)
        num_samples = self.loader.samples_given
        if batch is not None and self.repeated.is_kept:
            self.repeated.batch = batch
        self.loader.batches_left_out += is_left_out
        self._fetch()
        if batch is not None:
            return Step(batch, False, False, None, num_samples)
        return Step(self.repeated.batch, False, True, None, None, is_left_out)


def report_left_out(loader: ShardedDataLoader) -> None:
    """Log how many batches of the epoch begun were left out on all processes, each of which takes part."""
    if not loader.may_leave_out_batches:
        return
    number = int(sum_over_processes([loader.batches_left_out], loader.device)[0])
    if number:
        loader.log(f"Left out {number} {'batch that was' if number == 1 else 'batches that were'} None.")
