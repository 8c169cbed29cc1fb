"""Layer groups: the parts of a model, found by its structure, and whether they are frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

BN_MODULES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    nn.SyncBatchNorm,
)
"""Modules that count as batch norms."""


class LayerGroup(NamedTuple):
    """A module that is an attribute of the model, with all that is in it."""

    layer_group_idx: tuple[int, int]
    """Its index among the groups, from 0, and the same counted from the end, from -1."""
    module: nn.Module
    is_frozen: bool
    """Whether at least one of its parameters is frozen."""


class Layer(NamedTuple):
    """A module that holds parameters itself, or has no modules in it."""

    layer_group_idx: tuple[int, int]
    """The indices of the group that it belongs to."""
    module: nn.Module
    is_frozen: bool
    """Whether a parameter that it holds itself is frozen; if it holds none, whether it is in eval mode."""


def find_modules_by_group(model: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return for each layer group the module that is the attribute, and all modules of the group."""
    groups = [(child, list(child.modules())) for child in model.children()]
    if not groups:
        return [(model, [model])]
    # What the model holds directly (`cls_token`, `pos_embed`) is close to the input.
    if next(model.parameters(recurse=False), None) is not None:
        groups[0][1].insert(0, model)
    return groups


def find_layers(groups: Sequence[tuple[nn.Module, Sequence[nn.Module]]]) -> list[Layer]:
    """Return the layers of the groups that `find_modules_by_group` returns, in their order."""
    layers = []
    for index, (_, modules) in enumerate(groups):
        for module in modules:
            own_parameters = list(module.parameters(recurse=False))
            if own_parameters or not has_modules(module):
                is_frozen = any_frozen(own_parameters) if own_parameters else not module.training
                layers.append(Layer((index, index - len(groups)), module, is_frozen))
    return layers


def has_modules(module: nn.Module) -> bool:
    """Whether other modules are in it."""
    return next(module.children(), None) is not None


def parameters_in(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that the modules hold themselves, each once."""
    own = (parameter for module in modules for parameter in module.parameters(recurse=False))
    return list({id(parameter): parameter for parameter in own}.values())


def any_frozen(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether at least one parameter gets no gradient."""
    return any(not parameter.requires_grad for parameter in parameters)
