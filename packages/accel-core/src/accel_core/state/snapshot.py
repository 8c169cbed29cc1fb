"""Copies of what a save holds, so that training may change the originals while a thread writes the copies."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from typing import Any

import torch

from .plain import is_dense

_COLLECTIONS: set[type] = {dict, OrderedDict, Counter, list, tuple, set}
_NEVER_CHANGE: set[type] = {type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype}

Key = tuple[Any, ...]


class Snapshots:
    """Copies values, with their tensors in memory of the CPU that is kept and used again.

    Tensors come from a GPU by copies into pinned memory that nobody waits for: what the GPU does next comes
    after them on its stream, so that the next update may begin. `wait` waits for them.
    """

    def __init__(self) -> None:
        self._kept: dict[Key, torch.Tensor] = {}
        self._used: dict[Key, torch.Tensor] = {}
        self._copied: dict[int, tuple[Any, Any]] = {}
        self._gpus: set[torch.device] = set()
        self._events: list[Any] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that is kept."""
        return sum(buffer.nbytes for buffer in self._kept.values())

    def take(self, value: Any) -> Any:
        """Return a copy of a plain value (see `as_plain`). It takes the memory of the copy before."""
        self._used, self._copied, self._gpus = {}, {}, set()
        taken = self._copy(value, ())
        # What this copy has no use for is not kept.
        self._kept, self._used, self._copied = self._used, {}, {}
        self._events = [torch.cuda.current_stream(device).record_event() for device in self._gpus]
        return taken

    def wait(self) -> None:
        """Wait until what was copied from a GPU is there."""
        for event in self._events:
            event.synchronize()

    def _copy(self, value: Any, key: Key) -> Any:
        kind = type(value)
        if kind in _NEVER_CHANGE:
            return value
        if isinstance(value, torch.Tensor):
            # A tensor that stands in two places is copied once, as it is written once.
            if id(value) not in self._copied:
                self._copied[id(value)] = (value, self._copy_tensor(value, key))
            return self._copied[id(value)][1]
        if kind not in _COLLECTIONS:
            return copy.deepcopy(value)
        if isinstance(value, dict):
            return kind({name: self._copy(item, (*key, name)) for name, item in value.items()})
        # States of random generators are 625 numbers each.
        if _NEVER_CHANGE.issuperset(map(type, value)):
            return kind(value)
        return kind(self._copy(item, (*key, index)) for index, item in enumerate(value))

    def _copy_tensor(self, tensor: torch.Tensor, key: Key) -> torch.Tensor:
        source = tensor.detach()
        if not is_dense(tensor) or source.is_quantized:
            return source.to("cpu", copy=True)
        is_on_gpu = source.device.type == "cuda"
        buffer = self._kept.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty_like(source, device="cpu", pin_memory=is_on_gpu)
        buffer.copy_(source, non_blocking=is_on_gpu)
        self._used[key] = buffer
        if is_on_gpu:
            self._gpus.add(source.device)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(buffer, requires_grad=tensor.requires_grad)
        return buffer
