"""Knows which layouts of processes are right and which raise an error, and alone asks Accelerate which runs.

What raises an error would train, and be wrong without an error: processes of one copy of the model would read
different batches, or the model would not be laid out as its user believes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from accelerate import Accelerator, DistributedType

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from .ddp import DDP
from .deepspeed import DeepSpeed
from .engine import Engine
from .fsdp import FSDP2, HSDP
from .single import SingleProcess
from .tensor_parallel import TensorParallel


class Layout(NamedTuple):
    """A way to lay a model over processes, and the engine that runs it."""

    runs: Callable[[Accelerator], bool]
    create_engine: Callable[[Accelerator, DataGroup], Engine]


def _is(*kinds: DistributedType) -> Callable[[Accelerator], bool]:
    return lambda accelerator: accelerator.distributed_type in kinds


def _is_tensor_parallel(accelerator: Accelerator) -> bool:
    return sizes_of(accelerator)["tp_size"] > 1


def _is_fsdp2(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.FSDP and bool(
        getattr(accelerator, "is_fsdp2", False)
    )


def _is_fsdp1(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type is DistributedType.FSDP and not _is_fsdp2(accelerator)


def _is_hsdp(accelerator: Accelerator) -> bool:
    return _is_fsdp2(accelerator) and sizes_of(accelerator)["dp_replicate_size"] > 1


LAYOUTS = [
    Layout(_is_tensor_parallel, TensorParallel),
    Layout(_is(DistributedType.NO), SingleProcess),
    Layout(_is_hsdp, HSDP),
    Layout(_is_fsdp2, FSDP2),
    Layout(_is(DistributedType.DEEPSPEED), DeepSpeed),
    # GPUs of all makers, and CPUs with gloo or MPI.
    Layout(lambda accelerator: accelerator.distributed_type.value.startswith("MULTI_"), DDP),
]
"""The layouts that accel runs. The first one that runs is taken.

Before that, `REFUSED` is asked. Tests compare all of them with one process.
"""


class Refused(NamedTuple):
    """A layout that accel does not run."""

    is_asked: Callable[[Accelerator], bool]
    message: str
    """May name the sizes of the user's `ParallelismConfig`, such as `{tp_size}`."""


_SIZES = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")


def sizes_of(accelerator: Accelerator) -> dict[str, int]:
    """Return the sizes in the `ParallelismConfig` of the accelerator: 1 for what it does not ask for."""
    # Versions of Accelerate differ in what they know.
    config = getattr(accelerator.state, "parallelism_config", None)
    return {name: getattr(config, name, 1) or 1 for name in _SIZES}


def _asks_for(*names: str) -> Callable[[Accelerator], bool]:
    return lambda accelerator: all(sizes_of(accelerator)[name] > 1 for name in names)


def _is_dropped(plugin: str, kind: DistributedType) -> Callable[[Accelerator], bool]:
    """Whether several processes run without an engine that was asked for."""

    def is_dropped(accelerator: Accelerator) -> bool:
        # Accelerate keeps no trace but this variable, which it sets itself for a plugin that is passed.
        is_asked = os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true"
        return is_asked and accelerator.distributed_type is not kind and accelerator.num_processes > 1

    return is_dropped


def _shards_by_nothing(accelerator: Accelerator) -> bool:
    has_engine = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return sizes_of(accelerator)["dp_shard_size"] > 1 and not has_engine


def _has_more(accelerator: Accelerator) -> bool:
    """Whether a copy of the model takes several processes by another way than tensor parallelism."""
    config = getattr(accelerator.state, "parallelism_config", None)
    return (getattr(config, "non_data_parallel_size", 1) or 1) > sizes_of(accelerator)["tp_size"]


_DROPPED = (
    "The Accelerator was given {what}, but Accelerate has dropped it without an error and runs {runs}, which "
    "it does on a CPU (ACCELERATE_USE_CPU or cpu=True). {way_out}"
)

_UNTESTED = (
    "The Accelerator runs {what}. accel does not run it: no test can compare it with one process, since it "
    "{reason}. {way_out}"
)

_is_megatron = _is(DistributedType.MEGATRON_LM)
_has_lost_megatron = _is_dropped("MEGATRON_LM", DistributedType.MEGATRON_LM)

REFUSED = [
    Refused(
        _is(DistributedType.XLA),
        _UNTESTED.format(
            what="XLA, as on a TPU",
            reason="needs torch_xla, whose newest release is for torch 2.9",
            way_out="Use GPUs or CPUs, without torch_xla in the environment.",
        ),
    ),
    Refused(
        lambda accelerator: _is_megatron(accelerator) or _has_lost_megatron(accelerator),
        _UNTESTED.format(
            what="or was asked for Megatron-LM",
            reason="needs GPUs and a model of its own",
            way_out="Remove the plugin, and use FSDP2, DeepSpeed or tp_size of a ParallelismConfig for a "
            "model that does not fit on one GPU.",
        ),
    ),
    Refused(
        _is_fsdp1,
        "The Accelerator runs version 1 of FSDP. accel does not run it: Accelerate loads no state of its "
        "optimizer from sharded states, so a resumed run would differ without an error. Pass "
        "fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2) to the Accelerator, or write "
        "fsdp_version: 2 into the configuration of accelerate launch. FSDP2 can resume the sharded training "
        "states that version 1 has saved.",
    ),
    Refused(
        _asks_for("cp_size"),
        "The ParallelismConfig has cp_size={cp_size}: context parallelism, in which several processes share "
        "the sequences of one batch. accel does not run it: each process would read a batch of its own. "
        "Remove cp_size, and use FSDP2 with activation checkpointing for long sequences.",
    ),
    Refused(
        _asks_for("sp_size"),
        "The ParallelismConfig has sp_size={sp_size}: sequence parallelism, in which several processes share "
        "the sequences of one batch. accel does not run it: each process would read a batch of its own. "
        "Remove sp_size, and use DeepSpeed or FSDP2 with activation checkpointing for long sequences.",
    ),
    Refused(
        lambda accelerator: (
            sizes_of(accelerator)["tp_size"] > 1
            and (
                sizes_of(accelerator)["dp_shard_size"] > 1
                or accelerator.distributed_type is DistributedType.FSDP
            )
        ),
        "The ParallelismConfig has tp_size={tp_size} and dp_shard_size={dp_shard_size}: tensor parallelism "
        "with FSDP2. Accelerate 1.15 prepares it by a name that transformers 5.24 no longer has, so it "
        "cannot be tested, and accel does not run it. Use tp_size on all processes, or FSDP2 alone.",
    ),
    Refused(
        _asks_for("tp_size", "dp_replicate_size"),
        "The ParallelismConfig has tp_size={tp_size} and dp_replicate_size={dp_replicate_size}: tensor "
        "parallelism with several copies of the model, which Accelerate itself refuses beside plain data "
        "parallelism. Use tp_size on all processes, or FSDP2, or DDP without tp_size.",
    ),
    Refused(
        _has_more,
        "The ParallelismConfig lays one copy of the model over several processes in a way that accel does "
        "not know, and each of them would read a batch of its own. Use tp_size on all processes, FSDP2 or "
        "DDP.",
    ),
    Refused(
        _shards_by_nothing,
        "The ParallelismConfig has dp_shard_size={dp_shard_size}, but the Accelerator runs {runs}, which "
        "does not shard. Pass fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2) to the Accelerator, "
        "or remove dp_shard_size.",
    ),
    Refused(
        _is_dropped("DEEPSPEED", DistributedType.DEEPSPEED),
        _DROPPED.format(
            what="DeepSpeed",
            runs="{runs}",
            way_out="Unset ACCELERATE_USE_CPU and set DS_ACCELERATOR=cpu, or remove the plugin.",
        ),
    ),
    Refused(
        _is_dropped("FSDP", DistributedType.FSDP),
        _DROPPED.format(
            what="FSDP", runs="{runs}", way_out="Use GPUs, or remove the plugin to train by DDP."
        ),
    ),
]
"""The first layout that is asked for is named."""


def check_layout(accelerator: Accelerator) -> None:
    """Raise `ConfigurationError` for a layout that accel refuses. No communication."""
    for layout in REFUSED:
        if layout.is_asked(accelerator):
            runs = accelerator.distributed_type.value
            raise ConfigurationError(layout.message.format(runs=runs, **sizes_of(accelerator)))


def choose_engine(accelerator: Accelerator, group: DataGroup) -> Engine:
    """Return the engine of a run. Raises `ConfigurationError` for a layout that accel does not know."""
    check_accumulation(accelerator)
    check_layout(accelerator)
    for layout in LAYOUTS:
        if layout.runs(accelerator):
            return layout.create_engine(accelerator, group)
    raise ConfigurationError(
        f"The Accelerator uses {accelerator.distributed_type}, which accel does not know. Use one process, "
        "DDP, FSDP2 or DeepSpeed."
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
