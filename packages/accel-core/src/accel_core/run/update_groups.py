"""The batches of one update, and what each of them weighs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch

from ..data.loader import ShardedDataLoader
from ..engines.carried_word import CarriedWord
from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object, sum_over_processes
from ..processes.group import DataGroup
from .batch_output import UnclearBatchSize
from .run_config import TrainerRunConfig
from .steps import LookAhead, Step, planned_steps, report_left_out, steps_without_plan

WEIGHS_NOTHING = 0.0
"""What the gradients of an update are multiplied by if it has no items on any process: it is skipped."""


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
    has_weight = False
    """A step of this process weighs something, as far as is known without waiting for an accelerator."""

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
        self, count_items: Callable[[Any], float | None], num_processes: int, device: torch.device
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
        if isinstance(num_items, torch.Tensor) or num_items > 0:
            self.has_weight = True
        else:
            self.needs_no_weight = False
        if self.needs_no_weight:
            return None
        is_token_count = "num_items_in_batch" in output and not self.is_counted_before_forward
        if is_token_count or num_items != step.planned_items:
            self.differs_from_plan = True
        return num_items / self.planned_items

    def count_padding(self, step: Step) -> None:
        """Count a step that has weight zero; one that was left out has fewer samples than planned."""
        self.steps_completed += 1
        self.needs_no_weight = False
        if step.is_left_out:
            self.differs_from_plan = True

    @property
    def samples_read(self) -> int:
        """Samples that all processes have asked for in the steps completed."""
        return self.num_samples or self.steps_completed * self.step_size

    def gradient_scale(self, num_processes: int, device: torch.device) -> float | torch.Tensor:
        """Return what the gradients are multiplied by if items differ from the plan, or `WEIGHS_NOTHING`.

        Every process takes part.
        """
        num_items = torch.as_tensor(self.num_items, dtype=torch.float64, device=device).clone()
        if num_processes > 1:
            torch.distributed.all_reduce(num_items)
        # An accelerator is not waited for, except by a process that knows of no items of its own. All of them
        # know of none if there are none, so all of them agree.
        if (device.type == "cpu" or not self.has_weight) and num_items <= 0:
            return WEIGHS_NOTHING
        scale = self.planned_items * num_processes / num_items
        return scale if device.type == "cpu" else scale.where(num_items > 0, 0.0)


def check_epoch(loader: ShardedDataLoader, has_weight: bool, unchecked_steps: Collection[str]) -> None:
    """Log what was left out of an epoch of training. Every process takes part.

    Args:
        has_weight: some update of the run was not `WEIGHS_NOTHING`.
        unchecked_steps: methods that this process has not called yet in the run.

    Raises:
        ConfigurationError: there were batches, but no items in them, so that nothing was trained.
    """
    report_left_out(loader)
    if has_weight:
        return
    num_trained = sum_over_processes(["calculate_train_batch_loss" not in unchecked_steps], loader.device)[0]
    if num_trained:
        raise ConfigurationError(
            "All batches of an epoch together have 0 items, but must have at least one: the loss is the mean "
            "over them. Leave out samples without items, or return a batch_size or num_items_in_batch above "
            "0."
        )


def items_of(output: Mapping[str, Any]) -> Any:
    """Return the number of items that the loss of a batch is the mean of.

    On an accelerator it may be a scalar tensor, which is not waited for.

    Raises:
        ConfigurationError: the default step could not tell, and nobody replaced its `batch_size`.
    """
    if "num_items_in_batch" not in output and type(output["batch_size"]) is int:
        return output["batch_size"]
    if type(output.get("batch_size")) is UnclearBatchSize:
        output["batch_size"].refuse()
    items = output["num_items_in_batch"] if "num_items_in_batch" in output else output["batch_size"]
    if isinstance(items, torch.Tensor):
        return items.item() if items.device.type == "cpu" else items.reshape(())
    return items


class ItemTotals:
    """Decides whether the processes have to add up the items of an update, which may differ from the plan.

    The word that travels with the gradients tells, where there is one. Elsewhere they do if a collate
    function of the user's own may drop samples, if the data has no length, if the loss counts targets, and
    from the first update on if a step counts tokens.
    """

    def __init__(self, group: DataGroup, may_differ: bool = False, word: CarriedWord | None = None) -> None:
        self.num_processes = group.size
        self.word = word
        self.is_needed = may_differ
        self._is_first = True

    def gradient_scale(self, group: UpdateGroup, device: torch.device) -> float | torch.Tensor | None:
        """Return what the gradients of `group` are multiplied by, or `WEIGHS_NOTHING`; None is 1.

        Every process takes part.
        """
        if self.num_processes == 1:
            differs = group.differs_from_plan or not group.has_weight
            return group.gradient_scale(1, device) if differs else None
        any_differs = None if self.word is None else self.word.any_differs()
        if any_differs is not None:
            return group.gradient_scale(self.num_processes, device) if any_differs else None
        if self._is_first:
            self.is_needed = any(all_gather_object(self.is_needed or group.differs_from_plan))
            self._is_first = False
        if group.differs_from_plan and not self.is_needed:
            raise ConfigurationError(
                "The batch_size that calculate_train_batch_loss returned differs from the samples that were "
                "asked for, or the step began to return num_items_in_batch. The other processes "
                "cannot learn of it in the middle of a run. Return num_items_in_batch in every step."
            )
        if not self.is_needed:
            return None
        scale = group.gradient_scale(self.num_processes, device)
        # Where the value can be seen without waiting, multiplying by 1 is left out.
        return None if device.type == "cpu" and scale == 1 else scale


def update_groups(
    loader: ShardedDataLoader, config: TrainerRunConfig, is_over: Callable[[], bool]
) -> Iterator[UpdateGroup]:
    """Group the batches of the epoch begun into updates: all of the same number of steps but for the last.

    `is_over` tells whether the loop makes no further update, so that nothing more is read.
    """
    gradient_accumulation_steps = config.gradient_accumulation_steps
    plan = loader.plan()
    if plan is None:
        yield from _groups_without_plan(loader, gradient_accumulation_steps, is_over)
        loader.waiting.look(perf_counter(), loader.seconds_waited, loader.log)
        return
    num_processes = loader.group.size
    steps = planned_steps(loader, plan, gradient_accumulation_steps)
    sizes = iter(plan)
    while totals := [total for total, _ in itertools.islice(sizes, gradient_accumulation_steps)]:
        num_samples = sum(totals)
        needs_no_weight = len(totals) == num_processes == 1
        group_steps = itertools.islice(steps, len(totals))
        yield UpdateGroup(group_steps, needs_no_weight, num_samples / num_processes, num_samples)
    loader.waiting.look(perf_counter(), loader.seconds_waited, loader.log)


def _groups_without_plan(
    loader: ShardedDataLoader, gradient_accumulation_steps: int, is_over: Callable[[], bool]
) -> Iterator[UpdateGroup]:
    """Group data whose end is not known. Each batch is read when it is due; several processes agree on it."""
    ahead = LookAhead(loader)
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
        group.steps = steps_without_plan(ahead, gradient_accumulation_steps, group)
        yield group
        steps_completed += group.steps_completed
        is_first = False
    if is_first:
        loader.check_not_empty()


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
        steps = planned_steps(loader, plan, 1, keep_padding)
    if keep_padding or loader.group.is_single:
        return steps
    return (step for step in steps if step.is_left_out or not step.is_padding)
