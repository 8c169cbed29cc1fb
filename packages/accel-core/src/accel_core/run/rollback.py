"""What a run found, to be put back if it fails before it has changed a parameter."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..engines.modes import find_in_eval_mode, set_optimizer_modes
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
    """Buffers and modes of the model, modes and settings of the optimizer, and the training run before, too.

    The next call of `train` continues with that run, as if the one that failed had not been made.
    """

    def __init__(self, run_history: RunHistory, device: torch.device, attributes: dict[str, Any]) -> None:
        """Keep what the run found.

        Args:
            attributes: those of the trainer by name, which are changed in place; nothing is prepared yet.
        """
        super().__init__(run_history, device)
        self.attributes = attributes
        self.run_before = {name: attributes[name] for name in _OF_A_TRAINING_RUN if name in attributes}
        self.model: torch.nn.Module = attributes["model"]
        self.optimizer = attributes["optimizer"]
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.optimizers_in_eval = find_in_eval_mode(attributes)
        # The buffers of lazy modules have no values before the first forward pass.
        self.buffers = {
            name: buffer.clone()
            for name, buffer in self.model.named_buffers()
            if not torch.nn.parameter.is_lazy(buffer)
        }
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        self.groups = [
            {key: copy.copy(value) for key, value in group.items() if key != "params"} for group in groups
        ]

    def restore(self) -> None:
        """Put everything back."""
        super().restore()
        if self.run_before.get("run_id") is not None:
            for name in _OF_A_TRAINING_RUN:
                self.attributes.pop(name, None)
            self.attributes.update(self.run_before)
        for module, training in self.modes:
            module.training = training
        for optimizer in self.optimizers_in_eval:
            set_optimizer_modes({"optimizer": optimizer}, training=False)
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
