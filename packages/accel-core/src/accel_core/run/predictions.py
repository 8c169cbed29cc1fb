"""Outputs of batches, joined in the order of the data."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object, pad_to


def to_cpu(output: Any) -> Any:
    """A copy of a nested structure with its tensors on the CPU, free of any graph."""
    if isinstance(output, torch.Tensor):
        return output.detach().to("cpu", copy=True)
    names, parts = _parts_of(output)
    return output if parts is None else _rebuild(output, names, [to_cpu(part) for part in parts])


def join_over_processes(
    outputs: list[Any], padding_value: float | None = None, by_process: bool = False
) -> Any:
    """Join the batches of all processes in the order in which they were dealt out. Every process takes part.

    `padding_value` fills up the other dimensions of tensors where they differ; without it they have to be
    equal.
    """
    parts = all_gather_object(outputs)
    if by_process:
        return _join([output for part in parts for output in part], padding_value)
    longest = max(map(len, parts))
    return _join([part[step] for step in range(longest) for part in parts if step < len(part)], padding_value)


def _join(batches: list[Any], padding_value: float | None) -> Any:
    first = batches[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor) and first.ndim:
        shapes = {part.shape[1:] for part in batches}
        if len(shapes) > 1 and padding_value is not None and len(set(map(len, shapes))) == 1:
            sizes = [max(column) for column in zip(*shapes, strict=True)]
            batches = [pad_to(part, [len(part), *sizes], padding_value) for part in batches]
        elif len(shapes) > 1:
            raise ConfigurationError(
                "calculate_predictions returned tensors of the shapes "
                f"{sorted({tuple(part.shape) for part in batches})}, which cannot be joined on the first "
                "dimension. Pad them to one shape, or set trainer.prediction_padding."
            )
        return torch.cat(batches)
    names, parts = _parts_of(first)
    if isinstance(first, list) and all(isinstance(item, Mapping) or not _is_nested(item) for item in first):
        # One item a sample: values, or a mapping each, as detectors give.
        return [item for batch in batches for item in batch]
    if parts is None:
        raise ConfigurationError(
            f"calculate_predictions returned {first!r}, but must return tensors with a first dimension of "
            "samples, or lists of values. Put them into dictionaries, tuples or lists as you like."
        )
    rows = [_parts_of(batch)[1] or [] for batch in batches]
    if len({len(row) for row in rows}) > 1:
        raise ConfigurationError(
            f"calculate_predictions returned a {type(first).__name__} of "
            f"{sorted({len(row) for row in rows})} parts for different batches, but it must have the same "
            "parts for each. Put what belongs to a sample into tensors."
        )
    return _rebuild(first, names, [_join(list(column), padding_value) for column in zip(*rows, strict=True)])


def _is_nested(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or _parts_of(value)[1] is not None


def _parts_of(value: Any) -> tuple[list[Any], list[Any] | None]:
    """Names and parts of a mapping, dataclass, tuple or list; None as parts of anything else."""
    if isinstance(value, Mapping):
        return list(value), list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return names, [getattr(value, name) for name in names]
    return [], list(value) if isinstance(value, (tuple, list)) else None


def _rebuild(example: Any, names: list[Any], parts: list[Any]) -> Any:
    """A structure like `example` of `parts`."""
    kind: Any = type(example)
    if dataclasses.is_dataclass(example):
        return kind(**dict(zip(names, parts, strict=True)))
    if isinstance(example, Mapping):
        return (
            dict(zip(names, parts, strict=True))
            if kind is defaultdict
            else kind(zip(names, parts, strict=True))
        )
    return kind(*parts) if hasattr(example, "_fields") else kind(parts)
