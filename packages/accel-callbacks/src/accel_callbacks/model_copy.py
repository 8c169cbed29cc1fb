"""A copy of a model that computes with its own weights, also if `forward` was set on an object."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from accel_core import ConfigurationError

_FORWARDS = ("forward", "_original_forward")
"""What is called, and what Accelerate has wrapped for lower precision, if set on the object itself."""


def copy_model(model: nn.Module, purpose: str) -> nn.Module:
    """Return a deep copy of `model`, which computes with its own weights.

    Args:
        purpose: who needs the copy, for errors.

    Raises:
        ConfigurationError: the model cannot be copied.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = next((name for name, tensor in tensors if nn.parameter.is_lazy(tensor)), None)
    if lazy is not None:
        raise ConfigurationError(
            f"{purpose} needs a copy of the model, but {lazy!r} has no values before the first forward pass. "
            "Call the model once with a batch before training."
        )
    try:
        copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"{purpose} needs a copy of the model, but a {type(model).__name__} cannot be copied: "
            f"{error} Give it a __deepcopy__, or leave {purpose} out."
        ) from error
    for module, twin in zip(model.modules(), copied.modules(), strict=True):
        # A compiled module makes its forward again when it is copied.
        own = () if hasattr(module, "_orig_mod") else [name for name in _FORWARDS if name in vars(module)]
        for name in own:
            if not isinstance(vars(twin)[name], types.MethodType):
                vars(twin)[name] = _BorrowedForward(module, twin, vars(module)[name])
    return copied


def remove_patches(model: nn.Module) -> None:
    """Let a copy of a prepared model compute in the precision of its weights again."""
    attributes = vars(model)
    if "_original_forward" in attributes:
        original = attributes.pop("_original_forward")
        del attributes["forward"]
        if getattr(original, "__func__", None) is not type(model).forward:
            attributes["forward"] = original
    attributes.pop("_is_accelerate_prepared", None)


class _BorrowedForward:
    """Computes by the function that was set as the `forward` of another module, with a twin's weights.

    Deep copies leave functions as they are, and nobody can see what a function computes with. So the module
    has the values and the modes of its twin while the function is called.
    """

    def __init__(self, module: nn.Module, twin: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module
        self.twin = twin
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with _exchanged(self.module, self.twin):
            return self.forward(*args, **kwargs)


@contextlib.contextmanager
def _exchanged(module: nn.Module, twin: nn.Module) -> Iterator[None]:
    """Exchange values and modes of two modules; no value is copied."""
    _exchange(module, twin)
    try:
        yield
    finally:
        _exchange(module, twin)


def _exchange(module: nn.Module, twin: nn.Module) -> None:
    for part, other in zip(module.modules(), twin.modules(), strict=True):
        part.training, other.training = other.training, part.training
    tensors = zip(
        (*module.parameters(), *module.buffers()), (*twin.parameters(), *twin.buffers()), strict=True
    )
    for tensor, other_tensor in tensors:
        tensor.data, other_tensor.data = other_tensor.data, tensor.data
