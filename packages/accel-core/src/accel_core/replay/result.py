"""What a replay hands out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass
class ReplayResult:
    """Holds one update with all that it had in hand just before the parameters changed.

    If the update has several steps, on one process or several, `batch` and `model_outputs` are lists with one
    entry a step: first all steps of the first process, then those of the next. `indices` and the lists of
    `layers` are in the same order.
    """

    update: int
    """Number of the update, counted from 1."""
    folder: Path | None
    """The training state that the replay began with; None if it began with the trainer's own weights."""
    batch: Any
    indices: list[Any] | None
    """Of the samples in the data set; None if the data has no index, or gives another order each time."""
    model_outputs: Any
    """Without their graph."""
    loss: float
    """The mean over all items of the update."""
    gradients: dict[str, torch.Tensor | None]
    """By the names of the parameters: averaged over the processes, and not clipped."""
    model: torch.nn.Module
    """A copy of the model with the weights before the update, and the gradients in `grad`."""
    learning_rates: list[float]
    """Of each group of parameters of the optimizer, before the update."""
    layers: dict[str, list[Any]]
    """Outputs of each layer by its name, in the order of their first call; empty unless asked for."""
    messages: list[str]
    """What may keep the replay from being bit-identical, in sentences; empty if nothing is known."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters before the update, by name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
