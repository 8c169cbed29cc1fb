"""What a step and an update call, chosen once a run: the objects themselves where Accelerate has nothing to add."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType

from .sharded import has_own_backward, is_sharded

Context = contextlib.AbstractContextManager[Any]


_NOTHING = contextlib.nullcontext()


class StepCalls(NamedTuple):
    """How this run computes gradients and changes parameters.

    Both ways give the same weights, to the last bit.
    """

    backward: Callable[[torch.Tensor], None]
    optimizer: Any
    """The object whose `step` is called; looked up at each update, since schedulers replace it."""
    zero_grad: Callable[[], None]
    clip_norm: Callable[..., Any]
    """From parameters and the largest norm."""
    gradient_sync: Callable[[torch.nn.Module, bool], Context]
    """From the model, and whether a step is the last of its update, to the context of that step."""
    may_skip: bool
    """An update whose float16 gradients are not finite changes nothing."""


def bypasses_accelerate(accelerator: Accelerator, optimizer: Any) -> bool:
    """Whether Accelerate has nothing to add to `backward`, `step` and `zero_grad`.

    Its wrapper looks for a package on the disk at every step and for a signature at every `zero_grad`, and
    its `backward` divides by 1. A scaler, XLA, engines with a backward of their own, and LOMO go the long
    way.
    """
    lomo = type(getattr(optimizer, "optimizer", optimizer)).__name__ in ("Lomo", "AdaLomo")
    own = has_own_backward(accelerator) or accelerator.distributed_type == DistributedType.XLA
    return accelerator.scaler is None and not own and not lomo


def choose_step_calls(accelerator: Accelerator, optimizer: Any) -> StepCalls:
    """Return what the run calls; `optimizer` is the prepared one, or None where nothing is trained."""
    direct = bypasses_accelerate(accelerator, optimizer)
    chosen = getattr(optimizer, "optimizer", optimizer) if direct else optimizer
    return StepCalls(
        backward=torch.Tensor.backward if direct else accelerator.backward,
        optimizer=chosen,
        zero_grad=_choose_zero_grad(chosen),
        clip_norm=torch.nn.utils.clip_grad_norm_
        if direct and not is_sharded(accelerator)
        else accelerator.clip_grad_norm_,
        gradient_sync=_choose_gradient_sync(accelerator),
        may_skip=accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED,
    )


def _choose_zero_grad(optimizer: Any) -> Callable[[], None]:
    """The optimizer's own, unless that is torch's for all optimizers.

    Torch's opens a record of the profiler and looks for hooks first, which takes ten times as long as the
    clearing.
    """
    own: Any = getattr(optimizer, "zero_grad", None)
    is_torchs = getattr(own, "__func__", None) is torch.optim.Optimizer.zero_grad
    return functools.partial(_clear_gradients, optimizer) if is_torchs else own


def _clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _alone(model: torch.nn.Module, is_last: bool) -> Context:
    return _NOTHING


def _choose_gradient_sync(accelerator: Accelerator) -> Callable[[torch.nn.Module, bool], Context]:
    """Gradients are synchronised in the last step of an update only."""

    def tell_engine(model: torch.nn.Module, is_last: bool) -> Context:
        accelerator.gradient_state._set_sync_gradients(is_last)
        return _NOTHING

    def hold_back(model: torch.nn.Module, is_last: bool) -> Context:
        return _NOTHING if is_last else accelerator.no_sync(model)

    if accelerator.num_processes == 1:
        return _alone
    return tell_engine if has_own_backward(accelerator) else hold_back
