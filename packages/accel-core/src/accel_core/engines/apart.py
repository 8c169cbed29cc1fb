"""What an optimizer holds beside the model, kept apart from an engine that knows the model only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..text import counted
from .trained import parameters_of


class HeldApart:
    """The part of an optimizer that holds parameters beside the model, each whole on every process.

    The engine prepares the optimizer without it. Its state stands in the shards among the rest; where
    Accelerate writes the optimizer, it is a state of its own, which the main process writes.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> None:
        """Hold the optimizer, and which of its parameters are apart, in its order."""
        self.optimizer = optimizer
        self.parameters = parameters

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """Let the optimizer be without these parameters within, and without groups of nothing else.

        What is within may exchange its groups by others in the same order, and the parameters in them.
        """
        apart = set(map(id, self.parameters))
        states = {held: self.optimizer.state.pop(held) for held in self._with_state()}
        groups = self.optimizer.param_groups
        orders = [group["params"] for group in groups]
        is_left = [any(id(held) not in apart for held in order) or not order for order in orders]
        for group, order in zip(groups, orders, strict=True):
            group["params"] = [held for held in order if id(held) not in apart]
        self.optimizer.param_groups = [group for group, left in zip(groups, is_left, strict=True) if left]
        try:
            yield
        finally:
            others = iter(self.optimizer.param_groups)
            self.optimizer.param_groups = [
                next(others) if left else group for group, left in zip(groups, is_left, strict=True)
            ]
            for group, order in zip(self.optimizer.param_groups, orders, strict=True):
                rest = iter(group["params"])
                group["params"] = [held if id(held) in apart else next(rest) for held in order]
            self.optimizer.state.update(states)

    def _with_state(self) -> list[torch.Tensor]:
        return [held for held in self.parameters if held in self.optimizer.state]

    def _own_groups(self) -> list[dict[str, Any]]:
        apart = set(map(id, self.parameters))
        return [
            group
            for group in self.optimizer.param_groups
            if group["params"] and all(id(held) in apart for held in group["params"])
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state by place among the parameters, and the settings of groups of nothing else."""
        return {
            "shapes": [list(held.shape) for held in self.parameters],
            "state": {
                place: dict(self.optimizer.state[held])
                for place, held in enumerate(self.parameters)
                if held in self.optimizer.state
            },
            "groups": [
                {name: value for name, value in group.items() if name != "params"}
                for group in self._own_groups()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raises `ValueError` if it is of other parameters."""
        own, groups = self.state_dict(), self._own_groups()
        if state["shapes"] != own["shapes"] or len(state["groups"]) != len(groups):
            raise ValueError(
                f"beside the model it holds parameters of the shapes {own['shapes']} in "
                f"{counted(len(groups), 'groups')} of their own, and the state has {state['shapes']} in "
                f"{len(state['groups'])}."
            )
        for held in self._with_state():
            del self.optimizer.state[held]
        group_of = {id(held): group for group in self.optimizer.param_groups for held in group["params"]}
        for place, values in state["state"].items():
            held = self.parameters[place]
            own_group = group_of[id(held)]
            self.optimizer.state[held] = {
                name: _placed(name, value, held, own_group) for name, value in values.items()
            }
        for group, settings in zip(groups, state["groups"], strict=True):
            group.update(settings)


def held_apart(optimizer: Any, model: torch.nn.Module) -> HeldApart | None:
    """Return what an optimizer, wrapped or not, holds beside `model`; None if there is nothing."""
    inside = set(map(id, model.parameters()))
    beside = [held for held in parameters_of(optimizer) if id(held) not in inside]
    return HeldApart(getattr(optimizer, "optimizer", optimizer), beside) if beside else None


def _placed(name: str, value: Any, parameter: torch.Tensor, group: dict[str, Any]) -> Any:
    """Return a value of a state where the optimizer keeps it: numbers of steps by default on the CPU."""
    if not isinstance(value, torch.Tensor):
        return value
    stays = name == "step" and not (group.get("capturable") or group.get("fused"))
    return value.detach().to(value.device if stays else parameter.device, copy=True)
