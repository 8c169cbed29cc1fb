"""Gathers rows of all processes with gradients, for losses that compare samples of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError
from .collectives import all_gather_object, pad_to
from .group import DataGroup


def gather_with_grad(
    tensor: torch.Tensor, group: DataGroup, check: Callable[[str], None] | None = None
) -> torch.Tensor:
    """Join the tensors of all processes that share the data, with gradients to each of them.

    The gradient that this process's part gets is the sum of those that all processes compute for it. Every
    process takes part, forward and backward.

    Args:
        tensor: of shape `(rows, ...)`; processes may differ in their rows, and in nothing else. A scalar
            counts as shape `(1,)`.
        group: the processes that share the data.
        check: raises for a call, by its name, that other processes might never answer.

    Raises:
        ConfigurationError: `check` refuses it, or the processes differ beyond their rows.
    """
    if check is not None:
        check("gather_with_grad")
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if group.is_single:
        return tensor
    shapes = all_gather_object(tuple(tensor.shape))
    if len({shape[1:] for shape in shapes}) > 1:
        raise ConfigurationError(
            f"gather_with_grad was called with the shapes {shapes} on the {len(shapes)} processes, which "
            "differ beyond the first dimension. Pad the shorter ones before."
        )
    # All parts have to be equal. What fills them up is cut off again, so its gradient is zero.
    most = max(shape[0] for shape in shapes)
    own = pad_to(tensor, [most, *tensor.shape[1:]], 0)
    parts: torch.Tensor = _Gather.apply(own, group.index)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])


# That of torch.distributed.nn is deprecated, and what is to replace it has no gradient on every backend.
class _Gather(torch.autograd.Function):
    """Stacks equal tensors of all processes. Its backward adds their gradients, and keeps its own part."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    # A second derivative would be without what the others compute; torch raises instead.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Reducing and scattering at once would halve the traffic, but not every backend can.
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.index], None
