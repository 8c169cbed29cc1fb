"""Gives DDP the buckets of gradients that it keeps, before the first update instead of after it.

DDP sums gradients in buckets, and lays these out again after its first backward pass. On three processes and
more a ring adds in an order that depends on an element's place in its bucket. So the first update after each
start would be rounded otherwise than the same update of a run that was not stopped. One sum of zeros, made
with the wrapper and thrown away, lets every update find the layout that lasts.

It uses names of DDP that are not public, and leaves DDP as it is if one of them is missing. Remove it once
DDP can lay out its buckets for good when it is made.
"""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from .carried_word import CarriedWord
from .trained import clear_gradients


def settle_buckets(wrapper: DistributedDataParallel) -> str | None:
    """Let DDP lay out its buckets as it will keep them. Every process takes part.

    Returns:
        Why the first update after a start may be rounded otherwise than in a run that was not stopped, or
        None.
    """
    if wrapper.find_unused_parameters and not wrapper.static_graph:
        # DDP keeps the first layout then.
        return None
    reason = _why_not(wrapper)
    if reason is not None:
        return reason
    parameters = [
        parameter
        for name, parameter in wrapper.module.named_parameters()
        if parameter.requires_grad and name not in wrapper.parameters_to_ignore
    ]
    if not parameters:
        return None
    gradients = [parameter.grad for parameter in parameters]
    clear_gradients(parameters)
    try:
        _sum_zeros(wrapper, parameters)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    return None


def _why_not(wrapper: DistributedDataParallel) -> str | None:
    """Return why buckets cannot be settled, the same on every process, or None."""
    reducer = getattr(wrapper, "reducer", None)
    names = ("prepare_for_forward", "prepare_for_backward", "_rebuild_buckets")
    if not all(hasattr(reducer, name) for name in names) or not hasattr(wrapper, "parameters_to_ignore"):
        return "this version of PyTorch lays out the buckets of DDP in another way"
    if wrapper.static_graph:
        return "DDP runs with static_graph=True"
    if getattr(wrapper, "_use_python_reducer", False):
        return "DDP is compiled with its reducer"
    if getattr(wrapper, "_comm_hooks", None):
        # A hook may count, or divide by the norm of what it sums.
        return "DDP has a communication hook"
    if any(getattr(module, "sparse", False) is True for module in wrapper.module.modules()):
        return "an embedding has sparse gradients"
    # They would act on zeros, as an optimizer that steps in backward does.
    if any(each._backward_hooks or _acts_in_backward(each) for each in wrapper.module.parameters()):
        return "parameters have hooks that act in backward"
    return None


def _acts_in_backward(parameter: torch.Tensor) -> bool:
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    is_foreign = any(not isinstance(hook, CarriedWord) for hook in hooks.values())
    return is_foreign or hasattr(parameter, "_in_backward_optimizers")


def _sum_zeros(wrapper: DistributedDataParallel, parameters: list[torch.nn.Parameter]) -> None:
    """Make the backward pass after which DDP lays out its buckets: from the last parameter to the first."""
    with torch.enable_grad(), torch.autocast(parameters[0].device.type, enabled=False):
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for parameter in parameters:
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            # What was added last has its gradient first. Sums of the values may overflow, and times zero be
            # nan.
            total = total + (real * 0.0).sum().double()
        wrapper.reducer.prepare_for_forward()
        wrapper.reducer.prepare_for_backward([])
        torch.autograd.backward(total)
        wrapper.reducer._rebuild_buckets()
