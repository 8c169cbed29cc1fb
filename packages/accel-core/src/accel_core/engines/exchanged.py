"""Parameters of a model that an engine exchanges for their parts, and who still holds the former ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ReferenceType, ref

import torch

from ..errors import ConfigurationError
from .trained import parameters_of


class Exchanged:
    """Knows the parameters of a model before it was prepared, without keeping them alive."""

    def __init__(self) -> None:
        self._before: dict[int, ReferenceType[torch.Tensor]] = {}

    def remember(self, model: torch.nn.Module) -> None:
        """Look at a model that is not prepared yet."""
        self._before = {id(each): ref(each) for each in model.parameters()}

    def check(self, attributes: Mapping[str, Any], engine: str) -> None:
        """Raise `ConfigurationError` if an attribute holds what is no parameter of the model any more.

        Args:
            attributes: those of the trainer, after `prepare`.
            engine: runs the steps; for the message.
        """
        model = attributes["model"]
        inside = set(map(id, model.parameters()))
        for name, value in attributes.items():
            if any(self._is_former(held) and id(held) not in inside for held in _parameters_in(value)):
                raise ConfigurationError(
                    f"trainer.{name} holds a parameter of the model, which {engine} has exchanged for one in "
                    "parts: what it holds would keep its first value, and not be trained. Let it be read "
                    "from trainer.model in each step, train it by trainer.optimizer alone (a group may have "
                    "settings of its own), or use DDP."
                )
        self._before = {}

    def _is_former(self, tensor: torch.Tensor) -> bool:
        # The number of an object is given to another one once it is gone.
        before = self._before.get(id(tensor))
        return before is not None and before() is tensor


def _parameters_in(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.nn.Module):
        return value.parameters()
    if isinstance(value, torch.optim.Optimizer):
        return parameters_of(value)
    return [value] if isinstance(value, torch.Tensor) else []
