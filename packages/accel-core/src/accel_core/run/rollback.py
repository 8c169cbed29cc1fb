"""What a run found, to be put back if it fails before it has changed a parameter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


class TrainingRollback(Rollback):
    """Buffers and modes of the model, and modes and settings of the optimizer, too."""

    def __init__(self, attributes: Mapping[str, Any], run_history: RunHistory, device: torch.device) -> None:
        """Keep what the run found.

        Args:
            attributes: those of the trainer, before its model and optimizer are prepared.
        """
        super().__init__(run_history, device)
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
