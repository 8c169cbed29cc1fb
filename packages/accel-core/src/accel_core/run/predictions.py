"""Joins the outputs of batches in the order of the data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..data.loader import ShardedDataLoader
from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object, pad_to
from ..processes.group import DataGroup
from .run import Run


def to_cpu(output: Any) -> Any:
    """Return a copy of a nested structure with its tensors on the CPU, free of any graph."""
    if isinstance(output, torch.Tensor):
        # A copy also of what is on the CPU: a model may write its next outputs into the same memory.
        return output.detach().to("cpu", copy=True)
    names, parts = _parts_of(output)
    return output if parts is None else _rebuild(output, names, [to_cpu(part) for part in parts])


def collect_predictions(
    calculate: Callable[[Any], Any], run: Run, loader: ShardedDataLoader
) -> list[list[Any]]:
    """Return what `calculate` gives for the batch of each step, on the CPU: a list of one, or an empty one.

    It is empty for a batch that is left out, which keeps its place so that those of all processes stay in
    order. A padding step has none; its batch, if there is one, is only there for engines whose forward is
    collective.
    """
    loader.check_order()
    outputs = []
    for step in run.eval_steps(loader):
        output = [] if step.batch is None else [to_cpu(calculate(step.batch))]
        if not step.is_padding:
            outputs.append(output)
        elif step.is_left_out:
            outputs.append([])
    return outputs


def join_over_processes(
    outputs: list[list[Any]],
    group: DataGroup,
    padding_value: float | None = None,
    own_shares: bool = False,
) -> Any:
    """Join the batches of all processes in the order in which they were assigned. Every process takes part.

    Args:
        outputs: a list for each step of this process: of the one batch, or empty if the batch was left out.
        group: the processes that share the data.
        padding_value: fills up the other dimensions of tensors where they differ; without it they have to be
            equal.
        own_shares: each process has brought its own data; that of the first comes first.

    Raises:
        ConfigurationError: outputs cannot be joined, or all batches were left out.
    """
    # Processes that read the same batches have the same outputs.
    by_share = [outputs] if group.is_single else group.one_of_each_copy(all_gather_object(outputs))
    return join(by_share, padding_value, own_shares)


def join(by_process: list[list[list[Any]]], padding_value: float | None, own_shares: bool) -> Any:
    """Join the batches of all processes that were gathered, as `join_over_processes` does."""
    # A process may have fewer batches than others, or none.
    longest = max(map(len, by_process))
    steps = [part[step] for step in range(longest) for part in by_process if step < len(part)]
    if own_shares:
        steps = list(itertools.chain.from_iterable(by_process))
    batches = list(itertools.chain.from_iterable(steps))
    if not batches:
        raise ConfigurationError(
            f"All {len(steps)} batches of the data are None, so there is nothing to predict. Check why the "
            "collate function returns None for each of them."
        )
    return _join(batches, padding_value)


def _join(batches: list[Any], padding_value: float | None) -> Any:
    first = batches[0]
    # A model may leave out an optional part of its outputs.
    if first is None:
        return None
    if isinstance(first, torch.Tensor) and first.ndim:
        shapes = {part.shape[1:] for part in batches}
        # Shapes without the first dimension, which counts samples and may always differ.
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
    """Return names and parts of a mapping, dataclass, tuple or list; None as parts of anything else."""
    if isinstance(value, Mapping):
        return list(value), list(value.values())
    # `is_dataclass` holds for the class as well.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return names, [getattr(value, name) for name in names]
    return [], list(value) if isinstance(value, (tuple, list)) else None


def _rebuild(example: Any, names: list[Any], parts: list[Any]) -> Any:
    """Return a structure like `example`, made of `parts`."""
    kind: Any = type(example)
    if dataclasses.is_dataclass(example) and not isinstance(example, Mapping):
        # Copied, not made again: a constructor may ask for other arguments than there are fields.
        rebuilt = copy.copy(example)
        for name, part in zip(names, parts, strict=True):
            # The dataclass may be frozen.
            object.__setattr__(rebuilt, name, part)
        return rebuilt
    if isinstance(example, Mapping):
        if dataclasses.is_dataclass(example):
            return kind(**dict(zip(names, parts, strict=True)))
        return (
            # A defaultdict takes its factory first, which nobody needs in a result.
            dict(zip(names, parts, strict=True))
            if kind is defaultdict
            else kind(zip(names, parts, strict=True))
        )
    # A named tuple takes its parts one by one.
    return kind(*parts) if hasattr(example, "_fields") else kind(parts)
