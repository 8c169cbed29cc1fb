"""Keeps the mean loss of an epoch on the device."""

from __future__ import annotations

from typing import Any, TypedDict

import torch

from ..foreign_names.answers import ForeignName
from ..processes.collectives import all_gather_object, sum_over_processes
from .evaluation_kind import EvaluationKind
from .run_history import RunHistory


class LossTrackerState(TypedDict):
    """Holds the sums of one process; those of several processes may be added."""

    total: float
    count: float


class LossTracker:
    """Keeps the mean of the batch losses, each weighted by the number of items that it is the mean of.

    Sums are kept in float64 on the device (float32 where the device has no float64), so that following the
    loss never waits for the device; `average` does. On a CPU, where there is nothing to wait for, they are
    plain numbers.
    """

    total_loss = ForeignName("Use total.")
    running_count = ForeignName("Use count.")
    loss_value = ForeignName("Use average, or the loss that the step returned.")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_on_cpu = device.type == "cpu"
        # In float32 the losses of a long epoch would lose digits to the size of their sum.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.total: Any = 0.0 if self.is_on_cpu else torch.zeros((), dtype=self.dtype, device=self.device)
        self.count: float | torch.Tensor = 0

    def update(self, loss: torch.Tensor, num_items: float | torch.Tensor) -> None:
        """Add the mean `loss` (a scalar) of `num_items` items."""
        if self.is_on_cpu:
            num_items = num_items.item() if isinstance(num_items, torch.Tensor) else num_items
            self.total += loss.item() * num_items
        elif isinstance(num_items, torch.Tensor):
            # With its graph, every batch of the epoch would stay in memory.
            self.total.add_(loss.detach() * num_items)
        else:
            # One kernel, where a product and a sum are two.
            self.total.add_(loss.detach(), alpha=num_items)
        self.count = self.count + num_items

    @property
    def average(self) -> float:
        """Return the mean so far on this process; nan before the first batch. Waits for the device."""
        return float(self.total) / float(self.count) if self.count else float("nan")

    def reduce(self) -> float:
        """Return the mean over all processes, each of which has to call this."""
        total, count = sum_over_processes([float(self.total), float(self.count)], self.device)
        return total / count if count else float("nan")

    def state_dict(self) -> LossTrackerState:
        """Return the sums of this process."""
        return {"total": float(self.total), "count": float(self.count)}

    def load_state_dict(self, state: LossTrackerState) -> None:
        """Continue from `state`."""
        self.reset()
        # In place, so that the sum stays on the device.
        self.total += state["total"]
        self.count = state["count"]


class MeanTrackers:
    """Keeps a `LossTracker` for each name that a step logs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trackers: dict[str, LossTracker] = {}

    def update(self, log: dict[str, Any], num_items: float | torch.Tensor) -> None:
        """Add the scalars of a batch, each the mean of `num_items` items."""
        for name, value in log.items():
            if name not in self.trackers:
                self.trackers[name] = LossTracker(self.device)
            value = (
                # A tensor of one element may have dimensions, which a sum would keep.
                value.reshape(())
                if isinstance(value, torch.Tensor)
                else torch.tensor(float(value), device=self.device)
            )
            self.trackers[name].update(value, num_items)

    def reduce(self) -> dict[str, float]:
        """Return the mean of each name over all processes, each of which has to call this.

        They may know different names.
        """
        # Gathered as objects: a process without batches knows no names, so tensors would not match.
        sums: dict[str, list[float]] = {}
        for state in all_gather_object(self.state_dict()):
            for name, part in state.items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = [total + part["total"], count + part["count"]]
        return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}

    def state_dict(self) -> dict[str, LossTrackerState]:
        """Return the sums of this process by name."""
        return {name: tracker.state_dict() for name, tracker in self.trackers.items()}

    def load_state_dict(self, state: dict[str, LossTrackerState]) -> None:
        """Continue from `state`."""
        self.trackers = {name: LossTracker(self.device) for name in state}
        for name, tracker in self.trackers.items():
            tracker.load_state_dict(state[name])


def record_losses(
    run_history: RunHistory, kind: EvaluationKind, loss: LossTracker, logs: MeanTrackers
) -> None:
    """Record the mean loss and the means of what was logged. Every process takes part."""
    run_history.update_metric(f"{kind.full_prefix}_loss{kind.suffix}", loss.reduce())
    for name, value in logs.reduce().items():
        run_history.update_metric(f"{kind.full_prefix}_{name}{kind.suffix}", value)
