"""What a run found, to be put back if it fails before it has changed a parameter."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..state.random import capture_random_state, restore_random_state
from .run_history import RunHistory


class Rollback:
    """Random state and run history: all that an evaluation changes."""

    def __init__(self, run_history: RunHistory, device: torch.device) -> None:
        self.run_history = run_history
        self.device = device
        self.history = run_history.snapshot()
        self.random = capture_random_state(device)

    def restore(self) -> None:
        """Put everything back."""
        restore_random_state(self.random, self.device)
        self.run_history.restore(self.history)


_OF_A_TRAINING_RUN = (
    "_training_run",
    "data_seed",
    "last_checkpoint",
    "run_config",
    "run_id",
    "run_progress",
    "scheduler",
    "train_dataloader",
    "train_loss",
)
"""Attributes of a trainer that say where its latest training run stands."""


class TrainingRollback(Rollback):
    """Buffers and modes of the model, settings of the optimizer, and the training run before, too.

    The next call of `train` goes on with that run, as if the one that failed had not been made.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        run_history: RunHistory,
        device: torch.device,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(run_history, device)
        self.attributes = attributes
        """Those of the trainer by name, which are changed in place."""
        self.run_before = {name: attributes[name] for name in _OF_A_TRAINING_RUN if name in attributes}
        self.model = model
        self.optimizer = optimizer
        self.modes = [(module, module.training) for module in model.modules()]
        self.buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        groups = [] if optimizer is None else optimizer.param_groups
        self.groups = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"} for group in groups
        ]

    def restore(self) -> None:
        """Put everything back."""
        super().restore()
        for name in _OF_A_TRAINING_RUN:
            self.attributes.pop(name, None)
        self.attributes.update(self.run_before)
        for module, training in self.modes:
            module.training = training
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                if name in self.buffers:
                    buffer.copy_(self.buffers[name])
        # Preparing an optimizer may have exchanged its groups, so they are found by their number.
        for number, before in enumerate(self.groups):
            group = self.optimizer.param_groups[number]
            parameters = group["params"]
            group.clear()
            group.update(before, params=parameters)
