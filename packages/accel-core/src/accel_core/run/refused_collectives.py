"""Refuses what a script asks of its `Accelerator` inside a step where a process would never answer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import ConfigurationError
from ..processes.collectives import all_gather_object
from .run import Phase, Run

NEED_EQUAL_SHAPES = ("gather", "reduce")
COLLECTIVES = (
    *NEED_EQUAL_SHAPES,
    "gather_for_metrics",
    "pad_across_processes",
    "wait_for_everyone",
    "check_trigger",
)
"""Methods of an `Accelerator` in which every process has to take part."""


@contextlib.contextmanager
def refusing_collectives(accelerator: Accelerator, run: Run) -> Iterator[None]:
    """Let the collectives of `accelerator` be checked as `Trainer.gather` is, while `run` goes on."""
    if run.engine.group.is_single:
        yield
        return
    attributes = vars(accelerator)
    # Another run may have put its own checks there, if two trainers share the accelerator.
    before = {name: attributes[name] for name in COLLECTIVES if name in attributes}
    for name in COLLECTIVES:
        attributes[name] = functools.partial(_checked, run, name, getattr(accelerator, name))
    try:
        yield
    finally:
        for name in COLLECTIVES:
            del attributes[name]
        attributes.update(before)


def _checked(run: Run, name: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    call = f"trainer.accelerator.{name}"
    run.check_collective(call)
    if name in NEED_EQUAL_SHAPES and run.phase in (Phase.EVALUATING, Phase.IN_STEPS):
        _check_shapes(call, shapes_in((*args, *kwargs.values())))
    return collective(*args, **kwargs)


def _check_shapes(call: str, own: list[tuple[int, ...]]) -> None:
    """Raise on every process if their tensors differ in shape: gloo would end the job without an error.

    Scalars cost no message. Every process takes part.
    """
    if not any(own):
        return
    shapes = all_gather_object(own)
    if any(each != own for each in shapes):
        raise ConfigurationError(
            f"{call} was called inside a step with the shapes {shapes} on the {len(shapes)} processes, but "
            "needs equal ones. Call trainer.gather(tensor), which takes any number of rows."
        )


def shapes_in(data: Any) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors in `data`, however deep."""
    if isinstance(data, torch.Tensor):
        return [tuple(data.shape)]
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, (tuple, list)) else ()
    return [shape for part in parts for shape in shapes_in(part)]
