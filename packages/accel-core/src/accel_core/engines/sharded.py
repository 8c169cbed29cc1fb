"""Engines that spread a model over the processes (FSDP, DeepSpeed, Megatron-LM): what they do themselves, and what they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from ..errors import CheckpointError, ConfigurationError

_OWN_BACKWARD = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


_SHARDED = (DistributedType.FSDP, *_OWN_BACKWARD)


LEFT_TO_ENGINE = ("optimizer_step", "optimizer_zero_grad", "clip_gradients")


"""Methods of the trainer that engines with a backward of their own never call."""


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the engine spreads parameters over the processes, and saves and loads them itself."""
    return accelerator.distributed_type in _SHARDED


def has_own_backward(accelerator: Accelerator) -> bool:
    """Whether the engine changes the parameters inside backward."""
    return accelerator.distributed_type in _OWN_BACKWARD


def has_collective_forward(accelerator: Accelerator) -> bool:
    """Whether a forward communicates, so that every process has to do the same number of them."""
    return accelerator.num_processes > 1 and accelerator.distributed_type in (*_SHARDED, DistributedType.XLA)


def local_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter or gradient that this process holds: all of it if it is not sharded."""
    part = getattr(tensor, "ds_tensor", tensor)  # where ZeRO-3 keeps it
    return part.to_local() if hasattr(part, "to_local") else part


def check_left_to_engine(
    accelerator: Accelerator, overridden: list[str], arguments: dict[str, Any], has_plan: bool
) -> None:
    """Raise if something was asked for that the engine does not do, or does itself.

    Args:
        overridden: those of `LEFT_TO_ENGINE` that the trainer has changed.
        has_plan: the items of an update are known before its first backward.
    """
    if not is_sharded(accelerator):
        return
    engine = accelerator.distributed_type.value
    if arguments["gradient_clip_value"] is not None:
        raise ConfigurationError(
            f"gradient_clip_value is {arguments['gradient_clip_value']}, but {engine} clips by norm only. "
            "Pass gradient_clip_norm instead."
        )
    if has_own_backward(accelerator) and overridden:
        raise ConfigurationError(
            f"{overridden} are overridden, but {engine} does that inside backward. Remove them, or use DDP "
            "or FSDP."
        )
    if has_own_backward(accelerator) and not has_plan:
        raise ConfigurationError(
            f"The data has no length, so it is not known what a batch weighs in its update, and {engine} "
            "changes the parameters inside backward. Override count_items(batch) to return the samples of a "
            "batch."
        )
    norm, configured = arguments["gradient_clip_norm"], _configured_clipping(accelerator)
    if None not in (norm, completed_config) and norm != completed_config:
        raise ConfigurationError(
            f"gradient_clip_norm is {norm}, but the configuration of DeepSpeed has "
            f"gradient_clipping={configured}. Leave one of them out."
        )


def _configured_clipping(accelerator: Accelerator) -> float | None:
    """The norm that the user's configuration of DeepSpeed clips by; None if it leaves that open."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    completed_config = accelerator.deepspeed_plugin.deepspeed_config.get("gradient_clipping", "auto")
    return None if completed_config == "auto" else float(completed_config)


def set_clipping(accelerator: Accelerator, engine: Any, gradient_clip_norm: float | None) -> None:
    """Let DeepSpeed clip by what `train` was told, also if it has been prepared for another run."""
    if (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and _configured_clipping(accelerator) is None
    ):
        engine._config.gradient_clipping = gradient_clip_norm or 0.0
        if hasattr(engine.optimizer, "clip_grad"):
            engine.optimizer.clip_grad = gradient_clip_norm or 0.0


@contextlib.contextmanager
def completed_config(accelerator: Accelerator, per_device_batch_size: int) -> Iterator[None]:
    """Give DeepSpeed, while it is prepared, the numbers that Accelerate would take from a loader."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    before = dict(config)
    if (
        config.get("train_micro_batch_size_per_gpu", "auto") == "auto"
        and config.get("train_batch_size", "auto") == "auto"
    ):
        config["train_micro_batch_size_per_gpu"] = per_device_batch_size
    if config.get("gradient_clipping", "auto") == "auto":
        # Accelerate would clip by 1.0.
        config["gradient_clipping"] = 0.0
    # Else the weights of ZeRO-3 could not be exported.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    try:
        yield
    finally:
        config.clear()
        config.update(before)


def load_full_state(
    accelerator: Accelerator, engine: Any, model: torch.nn.Module, state: dict[str, Any]
) -> None:
    """Load the whole state of the unwrapped model into a prepared one, which is sharded.

    Every process takes part.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    elif accelerator.distributed_type == DistributedType.DEEPSPEED and engine is not model:
        parameters: Iterable[Any] = model.parameters()
        for parameter in parameters:
            if hasattr(parameter, "ds_tensor"):
                parameter.partition()  # ZeRO-3 keeps small ones whole, and would load those into the copy only
        engine.load_module_state_dict({"module": state}, fetch_z3_params=True)
        if hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()
    else:
        model.load_state_dict(state)


def check_engine_files(
    folder: Path, accelerator: Accelerator, saved_processes: int, trust_engine_files: bool
) -> None:
    """Raise if the engine of this run cannot go on from a checkpoint folder, or is not trusted to read it."""
    engine, has_engine_files = accelerator.distributed_type.value, (folder / "engine").is_dir()
    if has_engine_files != is_sharded(accelerator):
        saved, now = ("with", "without") if has_engine_files else ("without", "with")
        raise CheckpointError(
            f"'{folder}' was saved {saved} an engine that shards the model, and this run is {now} one "
            f"({engine}). Resume as it was saved, or begin a new run from an export."
        )
    if has_engine_files and not trust_engine_files:
        raise ConfigurationError(
            f"'{folder}' has sharded files, which {engine} unpickles: code in them would run. If you trust "
            "them, set trainer.trust_engine_files = True."
        )
    if has_own_backward(accelerator) and saved_processes != accelerator.num_processes:
        raise CheckpointError(
            f"'{folder}' was saved by {saved_processes} processes, and {engine} goes on with that number "
            f"only, not with {accelerator.num_processes}. Start as many, or begin a new run from an export."
        )
