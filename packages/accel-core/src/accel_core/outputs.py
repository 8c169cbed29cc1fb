"""Outputs of batches, joined in the order of the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from .distributed import gather_values
from .errors import ConfigurationError


def to_cpu(output: Any) -> Any:
    """A copy of a nested structure with its tensors on the CPU, free of any graph."""
    if isinstance(output, torch.Tensor):
        return output.detach().to("cpu", copy=True)
    if isinstance(output, Mapping):
        return _like(output, {key: to_cpu(value) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return _like(output, [to_cpu(value) for value in output])
    return output


def join_over_processes(outputs: list[Any]) -> Any:
    """Join the batches of all processes in the order in which they were dealt out. Every process takes part."""
    by_process = gather_values(outputs)
    longest = max(map(len, by_process))
    in_order = [part[step] for step in range(longest) for part in by_process if step < len(part)]
    if not in_order:
        raise ConfigurationError("dataset gives no batch, so there is nothing to predict. Pass data with at least one sample.")
    return _join(in_order)


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return _like(first, {key: _join([part[key] for part in parts]) for key in first})
    if isinstance(first, list) and not any(isinstance(item, (torch.Tensor, Mapping, tuple, list)) for item in first):
        return [item for part in parts for item in part]
    if isinstance(first, (tuple, list)):
        return _like(first, [_join(list(group)) for group in zip(*parts, strict=True)])
    if first is None:
        return None
    raise ConfigurationError(
        f"calculate_predictions returned {first!r}, but must return tensors with a first dimension of samples, or lists of "
        f"values, in any nesting of dictionaries, tuples and lists."
    )


def _like(example: Any, values: Any) -> Any:
    """`values` in the type of `example`."""
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*values)
    if dataclasses.is_dataclass(example):  # such as the outputs of transformers, which are mappings too
        return example.__class__(**values)
    return type(example)(values)
