"""What a run trains: the parameters of its optimizers, wherever they live.

A parameter belongs to the optimizer that holds it. Most live in the model; a loss module, a learnt
temperature or a second network may live beside it, among the attributes of the trainer. So do further
optimizers and their schedulers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.parallel import DistributedDataParallel


class Parameters(torch.nn.Module):
    """Parameters that are no module's, such as a temperature that is itself an attribute of the trainer."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            if isinstance(parameter, torch.nn.Parameter):
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, parameter)


class Trained:
    """The modules, optimizers and schedulers among the attributes of a trainer that its runs train, by name.

    What the user's own `prepare` has wrapped is the user's: an optimizer of Accelerate is not among them, and
    gradients of a wrapped module are averaged by its wrapper.
    """

    def __init__(self, attributes: Mapping[str, Any], model: torch.nn.Module, optimizer: Any) -> None:
        """Look at what there is now; `refresh` looks again.

        Args:
            attributes: all of the trainer, by name; kept, not copied.
            model: that of the trainer, wrapped or not.
            optimizer: that of the trainer as the user made it, or None.
        """
        self.attributes = attributes
        self.model = model
        self.optimizer = optimizer
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        """The further ones."""
        self.modules: dict[str, torch.nn.Module] = {}
        """Those beside the model of which an optimizer holds a parameter, without their wrappers."""
        self.apart: dict[str, Any] = {}
        """Parts of the optimizer that its engine leaves out of its own files; by name, with a state each."""
        self.cleared: list[torch.Tensor] = []
        """Parameters that are cleared after an update though the trainer's optimizer does not hold them."""
        self.has_warned_of_rounding = False
        """The processes have been found to differ in last digits, and the user was warned."""
        self.refresh()

    def refresh(self) -> bool:
        """Look again, as attributes may be exchanged, and return whether anything has changed."""
        before = (self.optimizers, self.modules)
        self.optimizers = {
            name: value
            for name, value in _without_repetitions(self.attributes, torch.optim.Optimizer)
            if not isinstance(value, AcceleratedOptimizer)
            and value is not self.optimizer
            and name != "optimizer"
        }
        inside = set(map(id, self.model.parameters()))
        beside = {id(held): held for held in self._held_by_all() if id(held) not in inside}
        self.modules = dict(self._modules_with(beside))
        self.cleared[:] = self._not_held(inside)
        return before != (self.optimizers, self.modules)

    def _held_by_all(self) -> Iterator[torch.Tensor]:
        for optimizer in (self.optimizer, *self.optimizers.values()):
            yield from parameters_of(optimizer)

    def _modules_with(self, beside: dict[int, torch.Tensor]) -> Iterator[tuple[str, torch.nn.Module]]:
        reached: set[int] = set()
        for name, value in _without_repetitions(self.attributes, torch.nn.Module):
            own = set(map(id, value.parameters()))
            if name != "model" and own & beside.keys():
                reached |= own
                yield name, without_wrappers(value)
        for name, value in _without_repetitions(self.attributes, torch.Tensor):
            if id(value) in beside.keys() - reached:
                reached.add(id(value))
                yield name, Parameters({"value": value})
        # What a function or a closure computes with has no name but its place in the optimizer.
        for name, optimizer in {"optimizer": self.optimizer, **self.optimizers}.items():
            places: dict[str, torch.Tensor] = {
                str(place): held
                for place, held in enumerate(parameters_of(optimizer))
                if id(held) in beside.keys() - reached
            }
            if places:
                yield f"{name}.param_groups", Parameters(places)

    def _not_held(self, inside: set[int]) -> list[torch.Tensor]:
        """Return the parameters of model and attributes without those of the optimizer or the user."""
        left_alone = set(map(id, parameters_of(self.optimizer)))
        for _, value in _without_repetitions(self.attributes, AcceleratedOptimizer):
            if value.optimizer is not self.optimizer:
                left_alone |= set(map(id, parameters_of(value)))
        found: dict[int, torch.Tensor] = {id(each): each for each in self.model.parameters()}
        for _, module in _without_repetitions(self.attributes, torch.nn.Module):
            found |= {id(each): each for each in module.parameters() if each.requires_grad}
        for optimizer in self.optimizers.values():
            found |= {id(held): held for held in parameters_of(optimizer)}
        return [parameter for key, parameter in found.items() if key not in left_alone]

    def beside(self, optimizer: Any) -> list[torch.Tensor]:
        """Return the parameters of `optimizer` that no wrapper averages: those outside the model."""
        averaged = set(map(id, self.model.parameters()))
        for _, module in _without_repetitions(self.attributes, torch.nn.Module):
            for part in module.modules():
                if isinstance(part, DistributedDataParallel):
                    averaged |= set(map(id, part.parameters()))
        return [held for held in parameters_of(optimizer) if id(held) not in averaged]

    def name_of(self, optimizer: Any) -> str | None:
        """Return the name of a further optimizer, or None if it is none."""
        return next((name for name, value in self.optimizers.items() if value is optimizer), None)

    @property
    def schedulers(self) -> dict[str, Any]:
        """Schedulers among the attributes of an optimizer of the trainer, without `trainer.scheduler`."""
        optimizers = [self.optimizer, *self.optimizers.values()]
        used = self.attributes.get("scheduler")
        return {
            name: value
            for name, value in self.attributes.items()
            if is_scheduler(value)
            and value is not used
            and any(value.optimizer is optimizer for optimizer in optimizers)
        }

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what the optimizers hold, by its name in the model, or in the module of an attribute."""
        held = set(map(id, self._held_by_all()))
        modules = {"": without_wrappers(self.model), **self.modules}
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                if id(parameter) in held:
                    held.remove(id(parameter))
                    yield f"{prefix}.{name}".removeprefix("."), parameter

    def all_parameters(self) -> dict[torch.Tensor, None]:
        """Return the parameters of the model and what else the optimizers hold, each once."""
        return dict.fromkeys([*self.model.parameters(), *self._held_by_all()])


def parameters_of(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield what an optimizer holds; None holds nothing."""
    for group in () if optimizer is None else optimizer.param_groups:
        yield from group["params"]


def is_scheduler(value: Any) -> bool:
    """Whether `value` steps something over an optimizer and has a state."""
    return all(
        hasattr(value, name) for name in ("optimizer", "step", "state_dict", "load_state_dict")
    ) and not isinstance(value, (torch.optim.Optimizer, torch.nn.Module))


def without_wrappers(module: torch.nn.Module) -> torch.nn.Module:
    """Return the user's own module inside of what compiles it and averages its gradients."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, DistributedDataParallel):
            inner = module.module
        if inner is None:
            return module
        module = inner


def clear_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Let go of the gradients."""
    for parameter in parameters:
        parameter.grad = None


def _without_repetitions(attributes: Mapping[str, Any], kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a kind; an object with two names has the first."""
    seen: set[int] = set()
    for name, value in list(attributes.items()):
        if isinstance(value, kind) and id(value) not in seen:
            seen.add(id(value))
            yield name, value
