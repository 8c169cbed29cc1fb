"""Knows which engines there are, and alone asks Accelerate which of them runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from accelerate import Accelerator, DistributedType

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from .ddp import DDP, XLA
from .deepspeed import DeepSpeed, MegatronLM
from .engine import Engine
from .fsdp import FSDP
from .single import SingleProcess


class Layout(NamedTuple):
    """A way to lay a model over processes, and the engine that runs it."""

    runs: Callable[[Accelerator], bool]
    create_engine: Callable[[Accelerator, DataGroup], Engine]


def _is(*kinds: DistributedType) -> Callable[[Accelerator], bool]:
    return lambda accelerator: accelerator.distributed_type in kinds


LAYOUTS = [
    Layout(_is(DistributedType.NO), SingleProcess),
    Layout(_is(DistributedType.FSDP), FSDP),
    Layout(_is(DistributedType.DEEPSPEED), DeepSpeed),
    Layout(_is(DistributedType.MEGATRON_LM), MegatronLM),
    Layout(_is(DistributedType.XLA), XLA),
    # GPUs of all makers, and CPUs with gloo or MPI.
    Layout(lambda accelerator: accelerator.distributed_type.value.startswith("MULTI_"), DDP),
]
"""The first layout that runs is taken."""


def choose_engine(accelerator: Accelerator, group: DataGroup) -> Engine:
    """Return the engine of a run. Raises `ConfigurationError` for a layout that accel does not know."""
    check_accumulation(accelerator)
    for layout in LAYOUTS:
        if layout.runs(accelerator):
            return layout.create_engine(accelerator, group)
    raise ConfigurationError(
        f"The Accelerator uses {accelerator.distributed_type}, which accel does not know. Use one process, "
        "DDP, FSDP or DeepSpeed."
    )


def check_accumulation(accelerator: Accelerator) -> None:
    """Raise if the accelerator accumulates by itself, which would divide the gradients twice."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise ConfigurationError(
            f"The Accelerator has gradient_accumulation_steps={steps}, from its argument or from accelerate "
            "launch, but must have 1, since the trainer accumulates itself. Pass "
            f"gradient_accumulation_steps={steps} to train instead."
        )
