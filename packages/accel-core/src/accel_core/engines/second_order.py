"""Optimizers that use second derivatives, such as AdaHessian: their step needs the graph of the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import ConfigurationError
from ..processes.group import DataGroup


def needs_second_order(optimizer: Any) -> bool:
    """Whether the optimizer has `is_second_order`, the name that timm and others use."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return bool(getattr(inner, "is_second_order", False))


def check_second_order(
    optimizer: Any, accelerator: Accelerator, group: DataGroup, steps_in_backward: bool
) -> None:
    """Raise if second derivatives would be wrong: those of each process alone, or scaled.

    Args:
        steps_in_backward: the engine keeps no graph.
    """
    if not needs_second_order(optimizer):
        return
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if not group.is_only_process or steps_in_backward:
        raise ConfigurationError(
            f"The optimizer {name} uses second derivatives, which no engine averages over "
            f"{group.num_processes} processes: each would train a model of its own. Train on one process, or "
            "use another optimizer."
        )
    if accelerator.scaler is not None:
        raise ConfigurationError(
            f"The optimizer {name} uses second derivatives, which mixed_precision='fp16' would scale. "
            "Use 'bf16' or 'no'."
        )


def second_order_backward(backward: Callable[..., Any], loss: torch.Tensor) -> None:
    """Compute gradients that can be differentiated again."""
    with warnings.catch_warnings():
        # Torch warns of a circle of parameter and gradient. Clearing the gradients after the update breaks
        # it.
        warnings.filterwarnings("ignore", message="Using backward.. with create_graph=True")
        backward(loss, create_graph=True)
