"""Train mode and eval mode: of the modules of a model, and of optimizers that have modes too.

A schedule-free optimizer keeps two sets of weights, and its `train()` and `eval()` put one of them into the
parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..text import counted
from .engine import Engine
from .parts import local_shard, reshard
from .weights import share_buffers

_STAYS_IN_EVAL = "stays_in_eval_mode"
"""The attribute of a module that training leaves in eval mode; copies of the module have it too."""


def keep_in_eval_mode(modules: Iterable[torch.nn.Module]) -> None:
    """Put each of `modules` in eval mode, and let training leave it there until `allow_train_mode`.

    Only the modules themselves are meant, not those within.
    """
    for module in modules:
        module.training = False
        setattr(module, _STAYS_IN_EVAL, True)


def allow_train_mode(modules: Iterable[torch.nn.Module]) -> None:
    """Put each of `modules` in train mode, as if `keep_in_eval_mode` had never been called."""
    for module in modules:
        module.training = True
        vars(module).pop(_STAYS_IN_EVAL, None)


def stays_in_eval_mode(module: torch.nn.Module) -> bool:
    """Whether `keep_in_eval_mode` was told so."""
    return _STAYS_IN_EVAL in vars(module)


class TrainingModes:
    """Which modules of a model stay in eval mode while it is trained.

    They are those that were in eval mode when the model was in train mode last, and those of
    `keep_in_eval_mode`.
    """

    def __init__(self) -> None:
        self.in_eval: list[torch.nn.Module] = []

    def restore(self, model: torch.nn.Module, own_model: torch.nn.Module) -> None:
        """Put `model` in train mode, but for the modules that stay in eval mode.

        Args:
            model: with all that is wrapped around it.
            own_model: without. Only its mode is the user's choice: wrappers are made in train mode.
        """
        # A callback may have put all of the model in eval mode since, which says nothing about its modules.
        modules = list(own_model.modules())
        if own_model.training:
            self.in_eval = [module for module in modules if not module.training]
        model.train()
        stay = [module for module in modules if _STAYS_IN_EVAL in vars(module)]
        for module in (*self.in_eval, *stay):
            module.training = False

    def describe(self, own_model: torch.nn.Module) -> str | None:
        """Return a sentence about what stays in eval mode though nobody asked for it by name, or None."""
        unasked = {id(module) for module in self.in_eval if not stays_in_eval_mode(module)}
        names = [name for name, module in own_model.named_modules() if id(module) in unasked]
        # Those within another that stays are not told again.
        outermost = [
            name
            for name in names
            if not any(name.startswith(f"{other}.") for other in names if other != name)
        ]
        if not outermost:
            return None
        shown = ", ".join(map(repr, outermost[:5])) + (", …" if len(outermost) > 5 else "")
        are, stay = ("is", "stays") if len(outermost) == 1 else ("are", "stay")
        return (
            f"{counted(len(outermost), 'modules')} of the model {are} in eval mode and {stay} in it during "
            f"training: {shown}. To train them in train mode, call model.train() before."
        )


# ---------------------------------------------------------------- optimizers


def optimizers_with_modes(attributes: Mapping[str, Any]) -> list[Any]:
    """Return the optimizers among the trainer's attributes that have `train()` and `eval()`, unwrapped."""
    found: dict[int, Any] = {}
    for value in attributes.values():
        # Modules come first, since they take long to say what they do not have.
        if not isinstance(value, torch.nn.Module) and hasattr(value, "param_groups"):
            # Accelerate's wrapper has both methods, whatever is inside.
            inner = value
            while hasattr(getattr(inner, "optimizer", None), "param_groups"):
                inner = inner.optimizer
            if callable(getattr(inner, "train", None)) and callable(getattr(inner, "eval", None)):
                found[id(inner)] = inner
    return list(found.values())


def set_optimizer_modes(attributes: Mapping[str, Any], training: bool) -> None:
    """Put the optimizers among the trainer's attributes that have modes into train or eval mode."""
    for optimizer in optimizers_with_modes(attributes):
        _set_mode(optimizer, training)


def switch_optimizers(attributes: Mapping[str, Any], training: bool) -> Callable[[], None]:
    """Put the optimizers with modes among the trainer's attributes into a mode, and return what undoes it.

    The parameters have the very same bits afterwards: rounding on the way there and back would change the
    training. So each that was in the other mode costs a copy of its parameters meanwhile.
    """
    switched = []
    for optimizer in optimizers_with_modes(attributes):
        settings = _settings_of(optimizer)
        before = [(parameter, parameter.detach().clone()) for parameter in _parameters_of(optimizer)]
        _set_mode(optimizer, training)
        if settings != _settings_of(optimizer) or _has_changed(before):
            switched.append((optimizer, before))

    def switch_back() -> None:
        for optimizer, before in switched:
            _set_mode(optimizer, not training)
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)

    return switch_back


@contextlib.contextmanager
def optimizers_in_mode(attributes: Mapping[str, Any], training: bool) -> Iterator[None]:
    """Switch as `switch_optimizers` does, and back afterwards."""
    switch_back = switch_optimizers(attributes, training)
    try:
        yield
    finally:
        switch_back()


def find_in_eval_mode(attributes: Mapping[str, Any]) -> list[Any]:
    """Return those of the optimizers with modes that are in eval mode now, and leave them so."""
    found = []
    for optimizer in optimizers_with_modes(attributes):
        settings = _settings_of(optimizer)
        before = [(parameter, parameter.detach().clone()) for parameter in _parameters_of(optimizer)]
        with optimizers_in_mode({"optimizer": optimizer}, training=True):
            if settings != _settings_of(optimizer) or _has_changed(before):
                found.append(optimizer)
    return found


def _settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return what may say in which mode an optimizer is: there is no common way to ask for it.

    Weights alone do not say it, since those of both modes are equal at first.
    """
    plain = (bool, int, float, str, type(None))
    holders = [vars(optimizer), *optimizer.param_groups]
    return [{name: value for name, value in holder.items() if isinstance(value, plain)} for holder in holders]


def _has_changed(before: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return any(not torch.equal(local_shard(parameter), local_shard(value)) for parameter, value in before)


def _set_mode(optimizer: Any, training: bool) -> None:
    if training:
        optimizer.train()
    else:
        optimizer.eval()


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    # Lazy ones have no values before the first forward pass.
    return [parameter for parameter in parameters if not torch.nn.parameter.is_lazy(parameter)]


# ---------------------------------------------------------------- evaluation


@contextlib.contextmanager
def evaluation_mode(
    engine: Engine, model: torch.nn.Module, attributes: Mapping[str, Any]
) -> Iterator[torch.nn.Module]:
    """Give the module to evaluate, in eval mode and without gradients. Every process takes part.

    It has the main process's buffers on every process. Each of its modules is back in its own mode
    afterwards, and optimizers that have modes are in the mode of the model that they train.

    Args:
        attributes: those of the trainer, among which are its optimizers.
    """
    module = engine.module_to_evaluate(model)
    share_buffers(model)
    modes = [(part, part.training) for part in model.modules()]
    trained = model if engine.prepared is None else engine.prepared.user_model
    switching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if optimizers := optimizers_with_modes(attributes):
        with_modes = {str(number): each for number, each in enumerate(optimizers)}
        set_optimizer_modes(with_modes, getattr(trained, "_orig_mod", trained).training)
        switching = optimizers_in_mode(with_modes, training=False)
    try:
        with switching, torch.no_grad():
            module.eval()
            yield module
    finally:
        if engine.shards_parameters:
            reshard(module)
        for part, training in modes:
            part.training = training
