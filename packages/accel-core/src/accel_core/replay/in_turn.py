"""Lets one process do what several did: it takes their batches in turn, and adds their gradients in order.

Every process had its own random state, and the buffers of the main one at the first step of each update, as
DDP shares them. So each batch meets the same numbers as in the run. The mean of two gradients is the same to
the bit; three and more were added in the order of the network's algorithm, so the last bits may differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ..data.loader import ShardedDataLoader
from ..data.map_style import MapStyleSource
from ..errors import ConfigurationError
from ..processes.group import DataGroup
from ..run.run import Phase
from ..run.update_groups import WEIGHS_NOTHING, UpdateGroup, update_groups
from ..state import files
from ..state.checkpoint import process_file
from ..state.random import capture_random_state, restore_random_state, seed_process
from ..state.resume import ProcessState, read_resume_point
from .starting import ReplayStart


@dataclasses.dataclass
class OtherProcess:
    """Holds what a process other than the main one had for itself."""

    loader: ShardedDataLoader
    random: dict[str, Any]
    groups: Iterator[UpdateGroup] | None = None
    """The updates of the current epoch; None before its first."""


class TotalsInTurn:
    """Compares items with the plan, as `ItemTotals`, for groups that one process has gone through."""

    def __init__(self, is_needed: bool) -> None:
        self.is_needed = is_needed
        self.groups: list[UpdateGroup] = []

    def gradient_scale(self, group: UpdateGroup, device: torch.device) -> float | torch.Tensor | None:
        """Return what the averaged gradients are multiplied by, or `WEIGHS_NOTHING`; None is 1."""
        self.is_needed |= any(each.differs_from_plan for each in self.groups)
        if not self.is_needed:
            return None
        num_items = torch.zeros((), dtype=torch.float64, device=device)
        for each in self.groups:
            num_items += torch.as_tensor(each.num_items, dtype=torch.float64, device=device)
        if num_items <= 0:
            return WEIGHS_NOTHING
        scale = group.planned_items * len(self.groups) / num_items
        return None if scale == 1 else scale


class InTurn:
    """Is mixed into the copy of a trainer that replays what several processes did."""

    def run_training(self: Any) -> None:
        """Get ready to stand for the other processes too."""
        run, start = self._run, self.replaying.start
        _check(self, run)
        run.item_totals = TotalsInTurn(run.item_totals.is_needed)
        size = start.launch["num_processes"]
        if run.resume_point is not None:
            saved = start.state["launched"]["num_processes"]
            # The losses of all processes are counted here.
            sums = read_resume_point(start.folder, DataGroup(), saved).process_state
            own = run.resume_point.process_state
            own.update(train_loss=sums["train_loss"], train_logs=sums["train_logs"])
        self.replaying.others = [
            OtherProcess(
                _loader_of(self, run.train_loader, DataGroup(size, index)),
                _random_state_of(self, start, index),
            )
            for index in range(1, size)
        ]
        run.eval_steps = functools.partial(_eval_steps, self, run.eval_steps)
        super().run_training()  # type: ignore[misc]

    def run_train_epoch(self: Any) -> None:
        """Begin the epoch for the others too, once they have their first update."""
        for other in self.replaying.others:
            other.groups = None
        super().run_train_epoch()  # type: ignore[misc]

    def run_train_step(self: Any, step: Any, group: UpdateGroup) -> None:
        """Keep the buffers from before the first step of the main process, which all processes begin with."""
        if group.steps_completed == 0:
            self.replaying.buffers = _clone_buffers(self.model)
        super().run_train_step(step, group)  # type: ignore[misc]

    def run_update(self: Any, group: UpdateGroup) -> None:
        """Make the steps of the other processes, average all gradients, and make the update."""
        run, replaying = self._run, self.replaying
        own_random, own_buffers = capture_random_state(self.device), _clone_buffers(self.model)
        own_callbacks, first_buffers = self.callbacks, replaying.buffers
        parameters = list(run.engine.trained.all_parameters())
        gradients, groups = [_take_gradients(parameters)], [group]
        # Callbacks have their state of the main process, so they see its steps; watchers see those of all.
        self.callbacks, run.phase = replaying.watchers, Phase.IN_STEPS
        for other in replaying.others:
            restore_random_state(other.random, self.device)
            _load_buffers(self.model, first_buffers)
            groups.append(_next_group(self, other))
            for step in groups[-1].steps:
                super().run_train_step(step, groups[-1])  # type: ignore[misc]
            other.random = capture_random_state(self.device)
            gradients.append(_take_gradients(parameters))
        self.callbacks, run.phase = own_callbacks, Phase.IN_UPDATE
        restore_random_state(own_random, self.device)
        _load_buffers(self.model, own_buffers)
        _set_means(parameters, gradients)
        run.item_totals.groups = groups
        super().run_update(group)  # type: ignore[misc]


def _check(trainer: Any, run: Any) -> None:
    """Raise for what cannot be done in turn."""
    cannot = None
    if not isinstance(run.loader_to_train.source, MapStyleSource) or run.loader_to_train.data_is_sharded:
        cannot = "the data is not read by index, so only its process knows what it has read"
    elif any(isinstance(module, torch.nn.SyncBatchNorm) for module in trainer.model.modules()):
        cannot = "SyncBatchNorm takes its mean over the batches of all processes at once"
    elif run.engine.trained is not None and run.engine.trained.optimizers:
        cannot = "further optimizers may step inside a step, with gradients of all processes at once"
    if cannot:
        raise ConfigurationError(
            f"{run.engine.group.size} processes made this update, and one process cannot take their batches "
            f"in turn: {cannot}. Resume the run on as many processes from the state before the update, with "
            "max_num_train_steps."
        )


def _loader_of(trainer: Any, loader: ShardedDataLoader, group: DataGroup) -> ShardedDataLoader:
    """Return the loader that a process of `group` had."""
    seeds_samples = trainer._run.arguments.seed_each_sample
    twin = ShardedDataLoader(loader.loader, trainer.data_seed, trainer.device, group, seeds_samples)
    twin.repeat_first_epoch = loader.repeat_first_epoch
    twin.max_steps, twin.max_intermediate_steps = loader.max_steps, loader.max_intermediate_steps
    trainer._run.loaders.append(twin)
    return twin


def _eval_steps(
    trainer: Any, own_steps: Any, loader: ShardedDataLoader, is_intermediate: bool = False
) -> Iterator[Any]:
    """Yield the steps of an evaluation on all processes, each read and made with its own random state.

    As in the run, an evaluation leaves the random states as they were.
    """
    yield from own_steps(loader, is_intermediate)
    own_random = capture_random_state(trainer.device)
    for index, other in enumerate(trainer.replaying.others, start=1):
        restore_random_state(other.random, trainer.device)
        group = DataGroup(loader.group.size, index)
        yield from own_steps(_loader_of(trainer, loader, group), is_intermediate)
    restore_random_state(own_random, trainer.device)


def _random_state_of(trainer: Any, start: ReplayStart, index: int) -> dict[str, Any]:
    """Return the random state with which another process began."""
    if start.folder is not None and start.state["launched"]["num_processes"] == start.launch["num_processes"]:
        state: dict[str, Any] = files.read_object(start.folder / process_file(index), ProcessState)["random"]
        return state
    if trainer.seed is None:
        raise ConfigurationError(
            "seed is None, so nothing says with which random states the other processes began. Replay an "
            "update after the first state that they have saved, or pass seed to the Trainer in later runs."
        )
    before = capture_random_state(trainer.device)
    try:
        seed_process(trainer.seed, index)
        return capture_random_state(trainer.device)
    finally:
        restore_random_state(before, trainer.device)


def _next_group(trainer: Any, other: OtherProcess) -> UpdateGroup:
    """Return the steps of the other process in the current update."""
    if other.groups is None:
        progress, loader = trainer.run_progress, other.loader
        loader.begin_epoch(progress.order_epoch, progress.samples_completed_in_epoch, loader.max_steps)
        other.groups = update_groups(loader, trainer.run_config, lambda: False)
    return next(other.groups)


def _clone_buffers(model: torch.nn.Module) -> list[torch.Tensor]:
    return [buffer.detach().clone() for buffer in model.buffers()]


def _load_buffers(model: torch.nn.Module, values: list[torch.Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)


def _take_gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients, and leave none: the next process begins with its own."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients


def _set_means(parameters: list[torch.Tensor], gradients: list[list[torch.Tensor | None]]) -> None:
    """Let each gradient be the mean over the processes, added in their order; a missing one is zero."""
    for number, parameter in enumerate(parameters):
        # DDP divides before it adds.
        parts: list[torch.Tensor] = [each[number] for each in gradients if each[number] is not None]  # type: ignore[misc]
        if parts:
            total = parts[0] / len(gradients)
            for part in parts[1:]:
                total = total + part / len(gradients)
            parameter.grad = total
