"""Adds, gathers and broadcasts values over several processes.

Every process has to call what communicates here, since the others wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object

from ..errors import ConfigurationError
from .group import DataGroup


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Add each of `values` over all processes, in float64 where the device has it."""
    if not is_distributed():
        return list(values)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def is_distributed() -> bool:
    """Whether this process is one of several that know of each other."""
    # Some builds of PyTorch come without torch.distributed.
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the `value` of the process `source`, by default the main one, on every process.

    It is pickled on the way.
    """
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def all_gather_object(value: Any) -> list[Any]:
    """Return the `value` of every process, in the order of the processes; they are pickled on the way."""
    # Accelerate joins lists, so each process gives a list of one.
    return gather_object([value]) if is_distributed() else [value]


def gather_on_main(value: Any) -> list[Any]:
    """Return the `value` of every process on the main one, and nothing of worth on the others.

    They are pickled on the way. Tensors among them have to be on the CPU.
    """
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None, dst=0)
    return gathered


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the main process's values. Every process takes part."""
    if is_distributed():
        # Parameters that require a gradient may not be changed in place otherwise.
        with torch.no_grad():
            for tensor in tensors:
                # Collectives need contiguous memory, which a transposed weight does not have.
                values = tensor.contiguous()
                dist.broadcast(values, src=0)
                if values is not tensor:
                    tensor.copy_(values)


def gather_tensor(
    tensor: torch.Tensor, padding_value: float | None = None, group: DataGroup | None = None
) -> torch.Tensor:
    """Join the tensors of all processes on the first dimension, which may differ between processes.

    Args:
        tensor: of the same number of dimensions and dtype on every process; a scalar counts as shape `(1,)`.
        padding_value: fills up the other dimensions where they differ; without it they have to be equal.
        group: the processes that share the data; None is all.
    """
    tensor = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not is_distributed() or (group is not None and group.is_single):
        return tensor
    # Shapes first: a collective of tensors of different sizes would fail or hang.
    shapes = all_gather_object(tuple(tensor.shape))
    if padding_value is None and len({shape[1:] for shape in shapes}) > 1:
        raise ConfigurationError(
            f"gather was called with the shapes {shapes} on the {len(shapes)} processes, which differ beyond "
            "the first dimension. Pass padding_value to fill the shorter ones up."
        )
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    # What fills up the first dimension is cut off again below.
    own = pad_to(tensor, largest, padding_value or 0)
    gathered = [torch.empty_like(own) for _ in shapes]
    dist.all_gather(gathered, own)
    parts = [part[: shape[0]] for part, shape in zip(gathered, shapes, strict=True)]
    return torch.cat(parts if group is None else group.one_of_each_copy(parts))


def pad_to(tensor: torch.Tensor, sizes: Sequence[int], value: float) -> torch.Tensor:
    """Return a tensor of `sizes` that begins with `tensor` in every dimension and is padded with `value`."""
    result = tensor.new_full(sizes, value)
    result[tuple(map(slice, tensor.shape))] = tensor
    return result


def run_on_main(action: Callable[[], Any], is_main: bool) -> Any:
    """Act on the main process and return its result on every process.

    What it raises is raised on all of them.
    """
    outcome, failure = None, None
    try:
        outcome = action() if is_main else None
    # The main process must reach the broadcast even so: the others wait there.
    except Exception as error:
        failure = error
    outcome, failure = broadcast_object((outcome, failure))
    if failure is not None:
        raise failure
    return outcome
