"""An average of a model whose parameters lie on several processes: each averages the parts that it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from accel_core.extending import broadcast_tensors, is_dtensor, join_parts, local_shard, part_of, reshard


def is_fractional(tensor: torch.Tensor) -> bool:
    """Whether tensors of this dtype can be averaged: those of floating-point and of complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


class ShardedAverage:
    """The averages of the parts that this process holds, and of the buffers.

    The model cannot be copied, so its own values give way to the averages while those are used.
    """

    def __init__(self, model: nn.Module) -> None:
        reshard(model)
        self.model = model
        self.parameters = {
            name: parameter for name, parameter in model.named_parameters() if is_fractional(parameter)
        }
        self.averages = [local_shard(each.detach()).clone() for each in self.parameters.values()]
        # Modules that hold the averages of buffers, as the model's own modules hold the buffers.
        self.buffers: list[tuple[nn.Module, nn.Module, str, bool]] = []
        self._named_buffers: dict[str, tuple[nn.Module, str]] = {}
        for prefix, module in model.named_modules():
            holder = nn.Module()
            for name, buffer in module.named_buffers(recurse=False):
                holder.register_buffer(name, buffer.detach().clone())
                is_averaged = is_fractional(buffer) and bool(torch.isfinite(local_shard(buffer)).all())
                self.buffers.append((holder, module, name, is_averaged))
                self._named_buffers[f"{prefix}.{name}".removeprefix(".")] = (holder, name)

    @staticmethod
    def is_possible(model: nn.Module) -> bool:
        """Whether the parts are tensors that know of each other: those of FSDP2 and of tensor parallelism."""
        return any(map(is_dtensor, model.parameters()))

    @property
    def values(self) -> list[torch.Tensor]:
        """What this process holds of the parameters, in the order of `averages`."""
        return [local_shard(parameter.detach()) for parameter in self.parameters.values()]

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[nn.Module]:
        """Give the model with the averages as its values, and put its own back afterwards."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        reshard(self.model)
        pairs = list(zip(self.averages, self.values, strict=True))
        pairs += [
            (local_shard(getattr(holder, name)), local_shard(getattr(module, name)))
            for holder, module, name, _ in self.buffers
        ]
        for one, other in pairs:
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    def state(self, is_main: bool) -> dict[str, Any]:
        """Return whole averages on the main process, and buffers. Every process takes part."""
        joined = {
            name: join_parts(parameter, average, is_main)
            for (name, parameter), average in zip(self.parameters.items(), self.averages, strict=True)
        }
        buffers = {
            whole_name: getattr(holder, name) for whole_name, (holder, name) in self._named_buffers.items()
        }
        return {**joined, **buffers} if is_main else buffers

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take the parts of the whole averages, of which the main process has the state.

        Every process takes part.
        """
        for (name, parameter), average in zip(self.parameters.items(), self.averages, strict=True):
            whole = torch.zeros(parameter.shape, dtype=average.dtype, device=average.device)
            if name in state:
                whole.copy_(state[name])
            broadcast_tensors([whole])
            average.copy_(local_shard(part_of(parameter.detach(), whole)))
        for whole_name, (holder, name) in self._named_buffers.items():
            if whole_name in state:
                holder.register_buffer(name, state[whole_name].to(getattr(holder, name).device).clone())
