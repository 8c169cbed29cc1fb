"""Values that come from a device without a wait for the work that was launched last."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch


class Arrivals:
    """Gives small tensors on the CPU, `distance` additions later than they were added.

    Reading a tensor of an accelerator waits for everything launched before. Its copy is read when the device
    has long made it instead, at a fixed distance, so that all processes read the same one. On a CPU there is
    nothing to wait for, and each is given at once.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self._on_their_way: deque[tuple[torch.Tensor, torch.Event, Any]] = deque()

    def add(self, value: torch.Tensor, label: Any = None) -> tuple[torch.Tensor, Any] | None:
        """Begin to copy `value`, and return the one that is due with its label, or None."""
        if value.is_cpu:
            return value, label
        # Only a copy into pinned memory runs beside the computation.
        copy = torch.empty_like(value, device="cpu", pin_memory=True)
        copy.copy_(value, non_blocking=True)
        copied = torch.Event(value.device)
        copied.record()
        self._on_their_way.append((copy, copied, label))
        return self._take() if len(self._on_their_way) > self.distance else None

    def drain(self) -> list[tuple[torch.Tensor, Any]]:
        """Return all that is on its way, the oldest first; waits for the device."""
        return [self._take() for _ in range(len(self._on_their_way))]

    def _take(self) -> tuple[torch.Tensor, Any]:
        copy, copied, label = self._on_their_way.popleft()
        copied.synchronize()
        return copy, label
