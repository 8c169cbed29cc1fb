"""Checks the parts of a trainer, and when its methods may be called."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import AccelWarning, ConfigurationError
from ..text import counted, preview
from .values import check_callable, plain


def check_parts(model: Any, loss_func: Any, optimizer: Any, accelerator: Any) -> None:
    """Raise unless a trainer can be made of these."""
    check_model(model)
    check_loss_func(loss_func)
    check_optimizer(optimizer)
    check_instance("accelerator", accelerator, Accelerator, Accelerator)


def check_model(model: Any) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(
            f"model is {preview(model)}, but must be an instance of torch.nn.Module. Create it first: model "
            "= Net()."
        )


def check_loss_func(loss_func: Any) -> None:
    """Raise unless `loss_func` is None or a function of outputs and targets."""
    # A class can be called, so it would pass the check below and fail in the first step.
    if isinstance(loss_func, type):
        name = loss_func.__name__
        raise ConfigurationError(
            f"loss_func is the class {name}, but must be an instance or a function. Create it: {name}()."
        )
    check_callable(
        "loss_func", loss_func, "Pass a function such as torch.nn.functional.cross_entropy, or a module."
    )


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is None or like a `torch.optim.Optimizer`."""
    if isinstance(optimizer, type):
        raise ConfigurationError(
            f"optimizer is the class {optimizer.__name__}, but must be an instance. Create it with the "
            f"model's parameters: {optimizer.__name__}(model.parameters())."
        )
    # By attributes: optimizers of other libraries need not derive from torch's class.
    if optimizer is not None and not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
        raise ConfigurationError(
            f"optimizer is {preview(optimizer)}, but must be an instance of torch.optim.Optimizer. Create "
            "one, for example: torch.optim.SGD(model.parameters(), lr=0.1)."
        )


def check_instance(name: str, value: Any, kind: type, example: type) -> None:
    """Raise unless `value` is None or of the class `kind`.

    Args:
        example: a class of this kind that can be made without arguments, for the error.
    """
    if value is not None and not isinstance(value, kind):
        # The class itself was passed, and not what it makes.
        example = value if isinstance(value, type) and issubclass(value, kind) else example
        raise ConfigurationError(
            f"{name} is {preview(value)}, but must be an instance of {kind.__name__}. Pass "
            f"{name}={example.__name__}(), or leave it out."
        )


def check_seed(seed: Any) -> int | None:
    """Return `seed` as an `int`. Raises unless it is one that torch accepts, or None."""
    if seed is None:
        return None
    number = plain(seed)
    is_number = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not (is_number and 0 <= int(number) < 2**63):
        raise ConfigurationError(
            f"seed is {preview(seed)}, but must be a whole number from 0 to 2^63 - 1. Use None to seed "
            "nothing."
        )
    return int(number)


def check_trainable(model: torch.nn.Module, optimizer: Any, attributes: Mapping[str, Any]) -> None:
    """Raise unless the optimizer can change the model.

    Warn if it holds what neither model nor trainer `attributes` have.
    """
    if optimizer is None:
        raise ConfigurationError(
            "optimizer is None, but train needs one. Pass an optimizer to the Trainer, or call evaluate."
        )
    # By identity, since `==` between tensors compares their elements.
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # A module of the loss may be trained beside the model.
    modules = [model, *(value for value in attributes.values() if isinstance(value, torch.nn.Module))]
    trained = {id(each) for module in modules for each in module.parameters() if each.requires_grad} & held
    # So may a single parameter that is an attribute, such as a temperature.
    trained |= {id(value) for value in attributes.values() if getattr(value, "requires_grad", False)} & held
    if not own and not trained:
        raise ConfigurationError(
            "The model has no parameter with requires_grad=True, so there is nothing to train. Unfreeze "
            "some of it: parameter.requires_grad_(True)."
        )
    if not trained:
        raise ConfigurationError(
            "The optimizer holds none of the model's trainable parameters, so training would change "
            "nothing. Replace layers, copy and move the model first, and create the optimizer from its "
            "parameters afterwards."
        )
    known = {id(parameter) for module in modules for parameter in module.parameters()}
    known |= set(map(id, attributes.values()))
    if held - known:
        warnings.warn(
            f"The optimizer holds {counted(len(held - known), 'parameters')} that the model does not have, "
            "as happens if layers are replaced after the optimizer was created. Create it after the last "
            "change of the model. If another module has these parameters, make it an attribute of the "
            "trainer.",
            AccelWarning,
            # The warning names the line that calls `train`.
            stacklevel=5,
        )


def check_attributes(attributes: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Raise if the model is an attribute of the trainer under a second name too."""
    for name, value in attributes.items():
        if value is model and name != "model":
            raise ConfigurationError(
                f"trainer.{name} is the model itself, but must not be: calling it would bypass the wrapper "
                f"that synchronises several processes. Call trainer.model, and remove trainer.{name}."
            )


def check_can_run(method: str, is_running: bool, needs_loss: str | None) -> None:
    """Raise inside another run, or if the loss function is needed by the method `needs_loss` and missing."""
    if is_running:
        raise ConfigurationError(
            f"{method} was called inside a run of the same trainer, but one run must end before the next. "
            f"Call {method} afterwards. To evaluate in the middle of training, call "
            "run_eval_epoch(dataset, metric_prefix='other', is_intermediate=True)."
        )
    if needs_loss is not None:
        raise ConfigurationError(
            f"loss_func is None, but {needs_loss} needs it. Pass a loss function, or override {needs_loss}."
        )
