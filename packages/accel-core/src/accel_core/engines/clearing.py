"""Clears the gradients of an update, also those that no optimizer of the trainer holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .trained import clear_gradients


def choose_zero_grad(optimizer: Any, others: list[torch.Tensor]) -> Callable[[], None]:
    """Return the optimizer's own `zero_grad`, or a quicker one if that is torch's for all optimizers.

    Torch's opens a record of the profiler and looks for hooks first, which takes ten times as long as the
    clearing.

    Args:
        others: what has its gradient cleared too, though the optimizer does not hold it. Else gradients would
            add up over updates, be seen by an optimizer that is given the parameter later, and be missing
            after resuming.
    """
    own: Any = getattr(optimizer, "zero_grad", _do_nothing)
    is_torchs = getattr(own, "__func__", None) is torch.optim.Optimizer.zero_grad
    if is_torchs:
        return functools.partial(_clear_all_gradients, optimizer, others)
    return functools.partial(call_both, own, functools.partial(clear_gradients, others)) if others else own


def _clear_all_gradients(optimizer: torch.optim.Optimizer, others: list[torch.Tensor]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    for parameter in others:
        parameter.grad = None


def call_both(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    """Call the one, then the other."""
    first()
    second()


def _do_nothing() -> None:
    pass
