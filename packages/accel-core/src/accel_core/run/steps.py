"""Makes the steps of an epoch on this process, with padding for missing batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from ..data.devices import move_to_device
from ..data.loader import ShardedDataLoader
from ..processes.collectives import all_gather_object, sum_over_processes


class Step(NamedTuple):
    """One batch of an update on this process."""

    batch: Any
    is_last: bool
    """It is the last of its update, so gradients are synchronised."""
    is_padding: bool
    """This process has no samples here: it repeats a batch with weight zero for the others."""
    planned_items: float | None
    """Samples that the batch has if nothing drops any; None for data without a length."""
    num_samples: int | None = None
    """Samples that were joined to the batch; None if only the batch itself tells."""
    is_left_out: bool = False
    """The batch was None. The step keeps its place and has weight zero; `batch` is one to repeat, or None."""


def planned_steps(
    loader: ShardedDataLoader,
    plan: Sequence[tuple[int, int]],
    steps_of_update: int,
    keep_padding: bool = True,
) -> Iterator[Step]:
    """Yield all steps of the epoch begun.

    Args:
        keep_padding: give a step without samples a batch to repeat, on several processes. All of them take
            part.
    """
    waiting = loader.waiting
    asked_at = perf_counter()
    waiting.begin(asked_at, loader.seconds_waited)
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
            read_at = perf_counter()
            loader.seconds_waited += read_at - asked_at
            if read_at > waiting.due_at:
                waiting.look(read_at, loader.seconds_waited, loader.log)
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
    """What a process repeats if it has no samples and others do: its latest batch, or another's."""

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
            self.batch = move_to_device(shared, self.loader.device) if self.batch is None else self.batch
        self.is_missing = False


def steps_without_plan(ahead: LookAhead, most: int, group: Any) -> Iterator[Step]:
    """Yield the steps of one update of data without a length, `most` of them. Every process takes part.

    Args:
        ahead: has fetched the first batch.
        group: the update, which counts the samples that are known only now.
    """
    is_single = ahead.loader.group.is_single
    for number in range(1, most + 1):
        step, num_samples = ahead.take()
        group.num_samples += num_samples
        is_last = number == most
        # Several processes synchronise their gradients in the last step, so they have to know which it is.
        if not is_last and not is_single:
            is_last = not ahead.fetch()
        yield step._replace(is_last=is_last)
        if is_last or (is_single and not ahead.fetch()):
            return


class LookAhead:
    """Batches of this process, and whether any process has a next one."""

    def __init__(self, loader: ShardedDataLoader) -> None:
        self.loader = loader
        asked_at = perf_counter()
        loader.waiting.begin(asked_at, loader.seconds_waited)
        self.batches = iter(loader)
        loader.seconds_waited += perf_counter() - asked_at
        self.repeated = RepeatedBatch(loader, is_needed=True)
        self.next: list[Any] = []
        """The batch that was fetched, if there is one; it is None if it is left out."""

    def fetch(self) -> bool:
        """Read the next batch, and return whether any process has one. Every process takes part."""
        loader, waiting = self.loader, self.loader.waiting
        asked_at = perf_counter()
        self.next = list(itertools.islice(self.batches, 1))
        read_at = perf_counter()
        loader.seconds_waited += read_at - asked_at
        if read_at > waiting.due_at:
            waiting.look(read_at, loader.seconds_waited, loader.log)
        has_next = any(all_gather_object(bool(self.next)))
        if self.repeated.is_missing and has_next:
            # The batch that comes next is good enough for those that get none before.
            if self.repeated.batch is None and self.next:
                self.repeated.batch = self.next[0]
            self.repeated.share()
        return has_next

    def take(self) -> tuple[Step, int]:
        """Return the step of the batch fetched, and its samples if only its source knows them, else 0.

        If only other processes have a batch, the step repeats one.
        """
        batch = self.next[0] if self.next else None
        is_left_out = batch is None and bool(self.next)
        if batch is not None and self.repeated.is_kept:
            self.repeated.batch = batch
        self.loader.batches_left_out += is_left_out
        size = self.loader.take_size()
        if batch is None:
            return Step(self.repeated.batch, False, True, None, None, is_left_out), size or 0
        # What a collate function was given, or else what the sampler has asked for.
        given = size if self.loader.samples_given is None else self.loader.samples_given
        return Step(batch, False, False, None, given), size or 0


def report_left_out(loader: ShardedDataLoader) -> None:
    """Log how many batches of the epoch begun were left out on all processes, each of which takes part."""
    if not loader.may_leave_out_batches:
        return
    total = sum_over_processes([loader.batches_left_out], loader.device)[0]
    # Processes that read the same batches have left out the same ones.
    number = round(total / loader.group.processes_per_copy)
    if number:
        loader.log(f"Left out {number} {'batch that was' if number == 1 else 'batches that were'} None.")
