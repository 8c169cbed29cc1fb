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
from ..processes.group import DataGroup


class Step(NamedTuple):
    """One batch of an update on this process."""

    batch: Any
    is_last: bool
    """It is the last of its update, so gradients are synchronised."""
    is_padding: bool
    """This process has no samples in this step.

    It repeats a batch with weight zero, because the others need it.
    """
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
    is_counted_before_forward = False
    differs_from_plan = False
    """What was counted on this process differs from the plan."""

    def __init__(
        self,
        steps: Iterator[Step],
        needs_no_weight: bool,
        planned_items: float,
        num_samples: int = 0,
        step_size: int = 0,
    ) -> None:
        self.steps = steps
        self.num_samples = num_samples
        """Samples on all processes; 0 for data without a length, of which each step asks for `step_size`."""
        self.step_size = step_size
        self.planned_items = planned_items
        self.needs_no_weight = needs_no_weight
        """The only step of the only process."""

    def count_before_forward(
        self, count_items: Callable[[Any], int | None], num_processes: int, device: torch.device
    ) -> None:
        """Plan with what `count_items` finds in the batches, which are all held for it.

        Every process takes part.
        """
        steps = list(self.steps)
        # A single process reads data without a length step by step, and learns only now which is the last.
        steps[-1] = steps[-1]._replace(is_last=True)
        counts = [0 if step.is_padding else count_items(step.batch) for step in steps]
        numbers = [count for count in counts if count is not None]
        # Also a process that could not count takes part, so that none waits for it.
        total, num_uncounted = sum_over_processes([sum(numbers), len(counts) - len(numbers)], device)
        if not num_uncounted:
            steps = [step._replace(planned_items=count) for step, count in zip(steps, numbers, strict=True)]
            self.planned_items = total / num_processes
            self.is_counted_before_forward = True
        self.steps = iter(steps)

    def weigh(self, step: Step, output: Mapping[str, Any], num_items: Any) -> Any:
        """Count the `num_items` of `step`, which gave `output`.

        Returns:
            What the loss of the step is multiplied by; None is 1.
        """
        self.steps_completed += 1
        self.num_items = self.num_items + num_items
        if self.needs_no_weight:
            return None
        is_token_count = "num_items_in_batch" in output and not self.is_counted_before_forward
        if is_token_count or num_items != step.planned_items:
            self.differs_from_plan = True
        return num_items / self.planned_items

    @property
    def samples_read(self) -> int:
        """Samples that all processes have asked for in the steps completed."""
        return self.num_samples or self.steps_completed * self.step_size

    def gradient_scale(self, num_processes: int, device: torch.device) -> float | torch.Tensor:
        """Return what the gradients are multiplied by, since the items differ from the plan.

        Every process takes part.
        """
        num_items = torch.as_tensor(self.num_items, dtype=torch.float64, device=device).clone()
        if num_processes > 1:
            torch.distributed.all_reduce(num_items)
        # An accelerator is not waited for: there a division by zero gives a loss that the nan guard sees.
        if device.type == "cpu" and num_items <= 0:
            raise ConfigurationError(
                f"The batches of an update have {num_items:g} items together, but must have at least one, "
                "since the loss is their mean. Leave out samples without any, or return a batch_size or "
                "num_items_in_batch above 0."
            )
        return self.planned_items * num_processes / num_items


def items_of(output: Mapping[str, Any]) -> Any:
    """Return the number of items that the loss of a batch is the mean of.

    On an accelerator it may be a scalar tensor, which is not waited for.
    """
    items = output["num_items_in_batch"] if "num_items_in_batch" in output else output["batch_size"]
    if isinstance(items, torch.Tensor):
        return items.item() if items.device.type == "cpu" else items.reshape(())
    return items


class ItemTotals:
    """Decides whether the processes have to add up the items of an update, which may differ from the plan.

    They do if a collate function of the user's own may drop samples, if the data has no length, and from
    the first update on if a step counts tokens.
    """

    def __init__(self, group: DataGroup, may_differ: bool = False) -> None:
        self.num_processes = group.size
        self.is_needed = may_differ
        self._is_first = True

    def gradient_scale(self, group: UpdateGroup, device: torch.device) -> float | torch.Tensor | None:
        """Return what the gradients of `group` are multiplied by; None is 1. Every process takes part."""
        if self.num_processes == 1:
            return group.gradient_scale(1, device) if group.differs_from_plan else None
        if self._is_first:
            self.is_needed = any(all_gather_object(self.is_needed or group.differs_from_plan))
            self._is_first = False
        if group.differs_from_plan and not self.is_needed:
            raise ConfigurationError(
                "The batch_size that calculate_train_batch_loss returned differs from the samples that were "
                "asked for, or the step began to return num_items_in_batch, which other processes cannot "
                "know in mid-run. Return num_items_in_batch in every step."
            )
        return group.gradient_scale(self.num_processes, device) if self.is_needed else None


def update_groups(
    loader: ShardedDataLoader, gradient_accumulation_steps: int, is_over: Callable[[], bool]
) -> Iterator[UpdateGroup]:
    """Group the batches of the epoch begun into updates: all of the same number of steps but for the last.

    `is_over` tells whether the loop makes no further update, so that nothing more is read.
    """
    plan = loader.plan()
    if plan is None:
        yield from _groups_without_plan(loader, gradient_accumulation_steps, is_over)
        loader.waiting.look(perf_counter(), loader.seconds_waited, loader.log)
        return
    num_processes = loader.group.size
    steps = _planned_steps(loader, plan, gradient_accumulation_steps)
    for first in range(0, len(plan), gradient_accumulation_steps):
        totals = [total for total, _ in plan[first : first + gradient_accumulation_steps]]
        num_samples = sum(totals)
        needs_no_weight = len(totals) == num_processes == 1
        group_steps = itertools.islice(steps, len(totals))
        yield UpdateGroup(group_steps, needs_no_weight, num_samples / num_processes, num_samples)
    loader.waiting.look(perf_counter(), loader.seconds_waited, loader.log)


def _planned_steps(
    loader: ShardedDataLoader, plan: list[tuple[int, int]], steps_of_update: int
) -> Iterator[Step]:
    """Yield all steps of the epoch begun."""
    waiting = loader.waiting
    asked_at = perf_counter()
    waiting.begin(asked_at, loader.seconds_waited)
    batches = iter(loader)
    batch = None
    # Starting the workers is part of waiting for the first batch.
    loader.seconds_waited += perf_counter() - asked_at
    for number, (_, size) in enumerate(plan, start=1):
        if size or batch is None:
            asked_at = perf_counter()
            batch = next(batches)
            read_at = perf_counter()
            loader.seconds_waited += read_at - asked_at
            if read_at > waiting.due_at:
                waiting.look(read_at, loader.seconds_waited, loader.log)
        is_last = number % steps_of_update == 0 or number == len(plan)
        yield Step(batch, is_last, size == 0, size)


def _groups_without_plan(
    loader: ShardedDataLoader, gradient_accumulation_steps: int, is_over: Callable[[], bool]
) -> Iterator[UpdateGroup]:
    """Group data whose end is not known. Each batch is read when it is due; several processes agree on it."""
    ahead = _LookAhead(loader)
    planned_items = (loader.batch_size or 1) * gradient_accumulation_steps
    needs_no_weight = gradient_accumulation_steps == loader.group.size == 1
    steps_completed = loader.steps_before
    is_first = True
    while True:
        if is_over():
            # Without a length nobody knows whether this was the end, and reading on to see it may be costly.
            if steps_completed != loader.num_steps:
                yield UpdateGroup(iter(()), needs_no_weight, planned_items)
            return
        # Read after the update before: the data may be drawn from the model itself.
        if not ahead.fetch():
            break
        group = UpdateGroup(iter(()), needs_no_weight, planned_items, step_size=loader.step_size)
        group.steps = _steps_without_plan(ahead, gradient_accumulation_steps, group)
        yield group
        steps_completed += group.steps_completed
        is_first = False
    if is_first:
        loader.check_not_empty()


def _steps_without_plan(ahead: _LookAhead, most: int, group: UpdateGroup) -> Iterator[Step]:
    for number in range(1, most + 1):
        batch, is_padding = ahead.take()
        group.num_samples += ahead.loader.take_size() or 0
        is_last = number == most
        # Several processes synchronise their gradients in the last step, so they have to know which it is.
        if not is_last and not ahead.loader.group.is_single:
            is_last = not ahead.fetch()
        yield Step(batch, is_last, is_padding, None)
        if is_last or (ahead.loader.group.is_single and not ahead.fetch()):
            return


class _LookAhead:
    """Batches of this process, and whether any process has a next one."""

    def __init__(self, loader: ShardedDataLoader) -> None:
        self.loader = loader
        asked_at = perf_counter()
        loader.waiting.begin(asked_at, loader.seconds_waited)
        self.batches = iter(loader)
        loader.seconds_waited += perf_counter() - asked_at
        self.latest: list[Any] = []
        """The batch taken last, if there was one."""
        self.next: list[Any] = []
        """The batch that comes next, if there is one."""

    def fetch(self) -> bool:
        """Read the next batch, and return whether any process has one. Every process takes part."""
        asked_at = perf_counter()
        self.next = list(itertools.islice(self.batches, 1))
        read_at = perf_counter()
        loader, waiting = self.loader, self.loader.waiting
        loader.seconds_waited += read_at - asked_at
        if read_at > waiting.due_at:
            waiting.look(read_at, loader.seconds_waited, loader.log)
        owners = all_gather_object(bool(self.next))
        has_next = any(owners)
        if has_next and not self.latest and not all(owners):
            # Those that get no batch borrow the first one that there is, with weight zero: that of the main
            # process, unless the processes bring data of their own.
            self.latest = [broadcast_object(self.next[0] if self.next else None, owners.index(True))]
        return has_next

    def take(self) -> tuple[Any, bool]:
        """Return the batch that was fetched, or the latest again as padding, and whether it is padding."""
        is_padding = not self.next
        self.latest = self.next or self.latest
        return self.latest[0], is_padding


def eval_steps(loader: ShardedDataLoader, keep_padding: bool) -> Iterator[Step]:
    """Yield the batches of an evaluation, one a step.

    Args:
        keep_padding: give a process that has no samples in a step a batch nevertheless, marked as padding.
    """
    plan = loader.plan()
    if plan is None:
        groups = _groups_without_plan(loader, 1, lambda: False)
        steps: Iterator[Step] = (step for group in groups for step in group.steps)
    else:
        steps = _planned_steps(loader, plan, 1)
    if keep_padding or loader.group.is_single:
        return steps
    return (step for step in steps if not step.is_padding)
