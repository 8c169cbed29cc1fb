"""The batches of one update, and what each of them weighs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ..data.loader import ShardedDataLoader
from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object, broadcast_object, sum_over_processes


class Step(NamedTuple):
    """One batch of an update on this process."""

    batch: Any
    is_last: bool
    """It is the last of its update, so gradients are synchronised."""
    is_idle: bool
    """This process has no samples in this step: it repeats a batch with weight zero, because the others need it to."""
    planned_items: int | None
    """Samples that the batch has if nothing drops any; None for data without a length."""


class UpdateGroup:
    """The steps of one update; iterate it once.

    The gradient of an update is the mean over all items of all its steps on all processes. Since processes
    are averaged by DDP, a step's loss, being the mean of n items, is multiplied by n over `planned_items`,
    the planned items of the group divided by the number of processes.
    """

    num_items: Any = 0
    """Items that this process has counted."""
    steps_completed = 0
    is_counted_ahead = False
    is_counted = False
    """What was counted on this process differs from the plan."""

    def __init__(
        self,
        steps: Iterator[Step],
        is_alone: bool,
        planned_items: float,
        num_samples: int = 0,
        step_size: int = 0,
    ) -> None:
        self.steps = steps
        self.num_samples = num_samples
        """Samples on all processes; 0 for a stream, where `step_size` are asked for in each step."""
        self.step_size = step_size
        self.planned_items = planned_items
        self.is_alone = is_alone
        """The only step of the only process: nothing to weigh."""

    def count_ahead(
        self, count_items: Callable[[Any], int | None], num_processes: int, device: torch.device
    ) -> None:
        """Plan with what `count_items` finds in the batches, which are all held for it.

        Every process takes part.
        """
        steps = list(self.steps)
        counts = [0 if step.is_idle else count_items(step.batch) for step in steps]
        numbers = [count for count in counts if count is not None]
        # Also a process that could not count takes part, so that none waits for it.
        total, num_uncounted = sum_over_processes([sum(numbers), len(counts) - len(numbers)], device)
        if not num_uncounted:
            steps = [step._replace(planned_items=count) for step, count in zip(steps, numbers, strict=True)]
            self.planned_items = total / num_processes
            self.is_counted_ahead = True
        self.steps = iter(steps)

    def count(self, step: Step, output: Mapping[str, Any], num_items: Any) -> Any:
        """Count the `num_items` of `step`, of which `output` came, and return what its loss is multiplied by.

        None is 1.
        """
        self.steps_completed += 1
        self.num_items = self.num_items + num_items
        if self.is_alone:
            return None
        is_token_count = "num_items_in_batch" in output and not self.is_counted_ahead
        if is_token_count or num_items != step.planned_items:
            self.is_counted = True
        return num_items / self.planned_items

    @property
    def samples_read(self) -> int:
        """Samples that all processes have asked for in the steps completed, however many a stream still had."""
        return self.num_samples or self.steps_completed * self.step_size

    def correction(self, num_processes: int, device: torch.device) -> float | torch.Tensor:
        """What the gradients are multiplied by because the counts differ from the plan.

        Every process takes part.
        """
        num_items = torch.as_tensor(self.num_items, dtype=torch.float64, device=device).clone()
        if num_processes > 1:
            torch.distributed.all_reduce(num_items)
        if device.type == "cpu" and num_items <= 0:
            raise ConfigurationError(
                f"The batches of an update have {num_items:g} items together, but must have at least one, "
                "since the loss is their mean. Leave out samples without any, or return a batch_size or "
                "num_items_in_batch above 0."
            )
        return self.planned_items * num_processes / num_items


def items_of(output: Mapping[str, Any]) -> Any:
    """What the loss of a batch is the mean of: a number, or a scalar on an accelerator, which is not waited for."""
    items = output["num_items_in_batch"] if "num_items_in_batch" in output else output["batch_size"]
    if isinstance(items, torch.Tensor):
        return items.item() if items.device.type == "cpu" else items.reshape(())
    return items


class ItemTotals:
    """Whether the processes have to add up what they counted, because it may differ from the plan on any of them.

    They do where a collate function of the user's own may drop samples, where the data has no length, and
    from the first update on where a step counts tokens.
    """

    def __init__(self, may_differ: bool, num_processes: int) -> None:
        self.is_needed = may_differ
        self.num_processes = num_processes
        self._is_first = True

    def correction(self, group: UpdateGroup, device: torch.device) -> float | torch.Tensor | None:
        """What the gradients of `group` are multiplied by; None is 1. Every process takes part."""
        if self.num_processes == 1:
            return group.correction(1, device) if group.is_counted else None
        if self._is_first:
            self.is_needed = any(all_gather_object(self.is_needed or group.is_counted))
            self._is_first = False
        if group.is_counted and not self.is_needed:
            raise ConfigurationError(
                "The batch_size that calculate_train_batch_loss returned differs from the samples that were "
                "asked for, or the step began to return num_items_in_batch, which other processes cannot "
                "know in mid-run. Return num_items_in_batch in every step."
            )
        return group.correction(self.num_processes, device) if self.is_needed else None


def update_groups(loader: ShardedDataLoader, gradient_accumulation_steps: int) -> Iterator[UpdateGroup]:
    """Group the batches of the epoch begun into updates: all of the same number of steps but for the last."""
    plan = loader.plan()
    if plan is None:
        yield from _groups_of_stream(loader, gradient_accumulation_steps)
        return
    steps, num_processes = _steps_of_plan(loader, plan, gradient_accumulation_steps), loader.num_processes
    for first in range(0, len(plan), gradient_accumulation_steps):
        totals, _ = zip(*plan[first : first + gradient_accumulation_steps], strict=True)
        is_alone, num_samples = len(totals) == num_processes == 1, sum(totals)
        yield UpdateGroup(
            itertools.islice(steps, len(totals)), is_alone, num_samples / num_processes, num_samples
        )


def _steps_of_plan(
    loader: ShardedDataLoader, plan: list[tuple[int, int]], steps_of_update: int
) -> Iterator[Step]:
    """All steps of the epoch begun."""
    asked_at = perf_counter()
    batches, batch = iter(loader), None
    # Starting the workers is part of waiting for the first batch.
    loader.seconds_waited += perf_counter() - asked_at
    for number, (_, size) in enumerate(plan, start=1):
        if size or batch is None:
            asked_at = perf_counter()
            batch = next(batches)
            loader.seconds_waited += perf_counter() - asked_at
        yield Step(batch, number % steps_of_update == 0 or number == len(plan), size == 0, size)


def _groups_of_stream(loader: ShardedDataLoader, gradient_accumulation_steps: int) -> Iterator[UpdateGroup]:
    """Groups of data without a length, which looks one batch ahead. Several processes agree on each step."""
    ahead = _LookAhead(loader)
    if not ahead.has_next:
        loader.check_not_empty()
    batch_size = loader.batch_size or 1
    while ahead.has_next:
        steps = _steps_of_stream(ahead, gradient_accumulation_steps)
        planned = batch_size * gradient_accumulation_steps
        is_alone = gradient_accumulation_steps == loader.num_processes == 1
        yield UpdateGroup(steps, is_alone, planned, step_size=loader.step_size)


def _steps_of_stream(ahead: _LookAhead, most: int) -> Iterator[Step]:
    for number in range(1, most + 1):
        batch, is_idle = ahead.take()
        is_last = number == most or not ahead.has_next
        yield Step(batch, is_last, is_idle, None)
        if is_last:
            return


class _LookAhead:
    """Batches of this process, and whether any process has a next one."""

    def __init__(self, loader: ShardedDataLoader) -> None:
        self.loader = loader
        asked_at = perf_counter()
        self.batches = iter(loader)
        loader.seconds_waited += perf_counter() - asked_at
        self.latest: list[Any] = []
        self.next: list[Any] = []
        self._fetch()

    def _fetch(self) -> None:
        asked_at = perf_counter()
        self.next = [batch for batch in [next(self.batches, None)] if batch is not None]
        self.loader.seconds_waited += perf_counter() - asked_at
        owners = all_gather_object(bool(self.next))
        self.has_next = any(owners)
        if self.has_next and not self.latest and not all(owners):
            # The main process has the first batch of every stream: those that get none borrow it, with weight
            # zero.
            self.latest = [
                broadcast_object((self.next or self.latest)[0] if self.next or self.latest else None)
            ]

    def take(self) -> tuple[Any, bool]:
        """The next batch, or the latest again where only other processes have one.

        And whether it is a repetition.
        """
        is_idle = not self.next
        self.latest = self.next or self.latest
        taken = self.latest[0]
        self._fetch()
        return taken, is_idle


def eval_steps(loader: ShardedDataLoader, keep_idle: bool) -> Iterator[Step]:
    """The batches of an evaluation, one a step.

    Args:
        keep_idle: give a process that has no samples in a step a batch nevertheless, marked as idle.
    """
    plan = loader.plan()
    if plan is None:
        steps: Iterator[Step] = (step for group in _groups_of_stream(loader, 1) for step in group.steps)
    else:
        steps = _steps_of_plan(loader, plan, 1)
    return steps if keep_idle or loader.num_processes == 1 else (step for step in steps if not step.is_idle)


def is_unequal(loader: ShardedDataLoader) -> bool:
    """Whether a process may be without a batch in a step of the epoch begun."""
    return loader.num_processes > 1 and (loader.sampler is None or loader.sampler.is_unequal)
