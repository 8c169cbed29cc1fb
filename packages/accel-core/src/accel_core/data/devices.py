"""Batches on their way to the device: nested as they may be, pinned if they can be."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from accelerate.utils import send_to_device


def can_be_pinned(tensor: torch.Tensor) -> bool:
    """Whether torch pins `tensor`: it is on the CPU, and dense."""
    return tensor.device.type == "cpu" and tensor.layout is torch.strided


def move_to_device(batch: Any, device: torch.device, pins: bool = False) -> Any:
    """Return `batch` with its tensors on `device`; the copy runs beside the computation if they are pinned.

    Mappings, tuples, lists and dataclasses are rebuilt at any depth; whatever has a `to` of its own is asked.

    Args:
        pins: pin the tensors first, but for those that cannot be.
    """
    if isinstance(batch, torch.Tensor):
        if pins and can_be_pinned(batch):
            batch = batch.pin_memory()
        return send_to_device(batch, device, non_blocking=True)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type) and not hasattr(batch, "to"):
        # Copied, not made again: a constructor may ask for other arguments than there are fields.
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                value = move_to_device(getattr(batch, field.name), device, pins)
                # The dataclass may be frozen.
                object.__setattr__(moved, field.name, value)
        return moved
    if type(batch) in (list, tuple):
        return type(batch)(move_to_device(part, device, pins) for part in batch)
    if type(batch) is dict:
        return {name: move_to_device(part, device, pins) for name, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_to_device(part, device, pins) for part in batch))
    # Other mappings and types are the business of Accelerate, as in its own loaders.
    return send_to_device(batch, device, non_blocking=True)
