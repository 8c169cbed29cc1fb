"""Engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import Accelerator

from .sharded import has_collective_forward, has_own_backward, is_sharded
from .weights import CreateState, full_model_state, is_frozen, place_frozen


class Engine:
    """What callbacks ask about the engine that runs the steps."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.name: str = accelerator.distributed_type.value
        """For messages."""
        self.shards_parameters = is_sharded(accelerator)
        """Parameters are spread over the processes, and the engine saves and loads them itself."""
        self.steps_in_backward = has_own_backward(accelerator)
        """The parameters change inside backward."""
        self.has_collective_forward = has_collective_forward(accelerator)
        """A forward pass communicates, so every process has to make the same number of them."""

    def full_weights(self, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
        """Return the state of the whole model, as `create_state` makes it. Every process takes part."""
        return full_model_state(self.accelerator, model, create_state)


@dataclasses.dataclass
class Prepared:
    """The user's model and optimizer with what `prepare` made of them."""

    user_model: torch.nn.Module
    user_optimizer: Any
    model: torch.nn.Module
    optimizer: Any

    def __post_init__(self) -> None:
        self._remember_trainable()

    def is_of(self, model: torch.nn.Module, optimizer: Any) -> bool:
        """Whether these are the very objects that were prepared."""
        return self.user_model is model and self.user_optimizer is optimizer

    def _remember_trainable(self) -> None:
        self._parameters = list(self.model.parameters())
        self._trainable = [parameter.requires_grad for parameter in self._parameters]

    def model_to_train(self, accelerator: Accelerator) -> torch.nn.Module:
        """Return the model, wrapped anew if parameters were frozen or unfrozen. Every process takes part.

        DDP would not synchronise those that it did not know.
        """
        if accelerator.num_processes == 1 or self._trainable == [
            parameter.requires_grad for parameter in self._parameters
        ]:
            return self.model
        if not is_sharded(accelerator):
            inner = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
            accelerator._models[:] = [model for model in accelerator._models if model is not self.model]
            self.model = (
                place_frozen(accelerator, inner) if is_frozen(inner) else accelerator.prepare_model(inner)
            )
        self._remember_trainable()
        return self.model
