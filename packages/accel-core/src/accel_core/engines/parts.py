"""Tensors that lie on several processes in parts, torch's `DTensor`: their norm, clipping, saving, loading.

A model may have them beside plain tensors, which torch's own functions refuse to mix. Here each process works
on its part, and the processes add up what they have to know together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import ConfigurationError


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is one part of a whole that lies on several processes, as torch's `DTensor`."""
    # Its attribute tells without an import that takes long, and that not all builds of PyTorch have.
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "device_mesh")


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a parameter or gradient that this process holds: all of it if it is not sharded."""
    part = getattr(tensor, "ds_tensor", tensor)  # where ZeRO-3 keeps it
    return part.to_local() if hasattr(part, "to_local") else part


def settle_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Add up gradients that are still sums in parts, so that each process has the part of its parameter.

    Every process takes part.
    """
    for parameter in parameters:
        gradient: Any = parameter.grad
        if is_dtensor(gradient) and any(placement.is_partial() for placement in gradient.placements):
            own: Any = parameter
            parameter.grad = gradient.redistribute(placements=own.placements)


def total_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of all gradients together, those in parts and plain ones. Every process takes part.

    Args:
        gradients: settled; a plain one is equal on all processes.
    """
    plain: list[torch.Tensor] = []
    by_mesh: dict[Any, list[Any]] = {}
    for gradient in gradients:
        mesh = getattr(gradient, "device_mesh", None)
        (plain if mesh is None else by_mesh.setdefault(mesh, [])).append(gradient)
    squares = [torch.stack(_squares(plain)).sum()] if plain else []
    for mesh, parts in by_mesh.items():
        own = _squares([part.to_local() for part in parts])
        # What several processes hold alike counts once.
        copies = [_num_copies(part) for part in parts]
        square = torch.stack([each / count for each, count in zip(own, copies, strict=True)]).sum()
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    device = squares[0].device if squares else None
    return torch.stack([square.to(device) for square in squares]).sum().sqrt() if squares else torch.zeros(())


def _squares(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    # Squares of half precision would overflow.
    dtypes = {torch.float64 if gradient.dtype is torch.float64 else torch.float32 for gradient in gradients}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    dense = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in gradients]
    return [norm.to(dtype).square() for norm in torch._foreach_norm([each.detach() for each in dense])]


def _num_copies(tensor: Any) -> int:
    count = 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            count *= tensor.device_mesh.size(dimension)
    return count


def clip_norm(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip by the L2 norm of all gradients together, and return what it was. Every process takes part."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    settle_gradients(held)
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    norm = total_norm(gradients)
    # As `torch.nn.utils.clip_grad_norm_` does, without asking the device whether there is anything to clip.
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        local = local_shard(gradient)
        local.mul_(factor.to(local.device, local.dtype))
    return norm


def clip_value(parameters: Iterable[torch.Tensor], largest: float) -> None:
    """Clip each element of the gradients. Every process takes part."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    settle_gradients(held)
    for parameter in held:
        if parameter.grad is not None:
            local_shard(parameter.grad).clamp_(-largest, largest)


def reshard(module: torch.nn.Module) -> None:
    """Let FSDP2 give whole parameters back, which it keeps after a forward pass that no backward follows.

    Till then the model has other parameters than its optimizer, and would not see a change of the latter.
    """
    for part in module.modules():
        give_back = getattr(part, "reshard", None)
        if callable(give_back) and callable(getattr(part, "unshard", None)):
            give_back()


def whole(value: Any, is_kept: bool) -> Any:
    """Return a state with whole tensors in place of those in parts. Every process takes part.

    Args:
        is_kept: whether this process needs them. They are moved to its CPU, one after the other, since the
            device may have no room for all. Else it gets its parts back.
    """
    if is_dtensor(value):
        gathered = value.detach().full_tensor()
        return gathered.cpu() if is_kept else value
    if isinstance(value, Mapping):
        return {key: whole(item, is_kept) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(whole(item, is_kept) for item in value)
    return value


def join_parts(like: Any, part: torch.Tensor, is_kept: bool) -> Any:
    """Return the whole of which each process holds a `part`, laid out as `like`. Every process takes part.

    Args:
        is_kept: whether this process needs it, as for `whole`.
    """
    if not is_dtensor(like):
        return part.detach().cpu() if is_kept else part
    from torch.distributed.tensor import DTensor

    laid_out = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return whole(laid_out, is_kept)


def part_of(own: Any, value: Any) -> Any:
    """Return what this process holds of the whole tensor `value`, laid out as `own`. No communication."""
    if not is_dtensor(own) or not isinstance(value, torch.Tensor) or is_dtensor(value):
        return value
    if own.shape != value.shape:
        return value
    # Imported when used, since it takes long.
    from torch.distributed.tensor import distribute_tensor

    moved = value.to(own.to_local().device)
    return distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)


def parts_of_model(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what this process holds of the whole `state` of a model, laid out as its `own` state."""
    return {name: part_of(own.get(name), value) for name, value in state.items()}


def parts_of_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return what this process holds of the whole `state` of an optimizer, laid out as its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [number for group in state.get("param_groups", ()) for number in group["params"]]
    if len(saved) != len(parameters) or not any(map(is_dtensor, parameters)):
        return state
    laid_out = dict(state["state"])
    for number, parameter in zip(saved, parameters, strict=True):
        if isinstance(laid_out.get(number), dict):
            laid_out[number] = {name: part_of(parameter, value) for name, value in laid_out[number].items()}
    return {**state, "state": laid_out}


def check_whole(named: Iterable[tuple[str, Any]], engine: str) -> None:
    """Raise `ConfigurationError` for a `DTensor` that the engine has not made. No communication.

    Args:
        named: parameters, by their names.
        engine: runs the steps; for the message.
    """
    for name, parameter in named:
        if is_dtensor(parameter):
            raise ConfigurationError(
                f"The parameter {name!r} is a DTensor: you have sharded the model yourself, as by "
                f"fully_shard or parallelize_module, but the Accelerator runs {engine}, which would treat "
                "each part as a whole. For FSDP2, pass the whole model and an Accelerator with "
                "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), which shards it. For tensor "
                "parallelism, pass Accelerator(parallelism_config=ParallelismConfig(tp_size=...))."
            )
