"""DeepSpeed: an engine that changes the parameters inside backward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import CheckpointError, ConfigurationError
from ..processes.group import DataGroup
from ..text import counted
from .engine import Context, StepWeight
from .fsdp import Sharded
from .trained import Trained

_NOTHING = contextlib.nullcontext()


class DeepSpeed(Sharded):
    """Runs the steps of DeepSpeed, with ZeRO of any stage."""

    name = "DEEPSPEED"
    steps_in_backward = True

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        self.may_skip_updates = True
        if not group.is_single:
            self.synchronize = self._announce_last_step

    def check(self, overridden: list[str], clip_value: Any, clip_norm: Any, has_plan: bool) -> None:
        """Refuse to override what happens in backward, unplanned weights, and two norms to clip by."""
        super().check(overridden, clip_value, clip_norm, has_plan)
        if overridden:
            raise ConfigurationError(
                f"{overridden} are overridden, but {self.name} does that inside backward. Remove them, or "
                "use DDP or FSDP2."
            )
        if not has_plan:
            raise ConfigurationError(
                "The data has no length, so it is not known what a batch weighs in its update, and "
                f"{self.name} changes the parameters inside backward. Override count_items(batch) to return "
                "the samples of a batch."
            )
        configured = self._configured_clipping()
        if clip_norm is not None and configured is not None and clip_norm != configured:
            raise ConfigurationError(
                f"gradient_clip_norm is {clip_norm}, but the configuration of DeepSpeed has "
                f"gradient_clipping={configured}. Leave one of them out."
            )

    def check_trained(self, modules: Iterable[str], optimizers: Iterable[str]) -> None:
        """Refuse parameters beside the model, and further optimizers."""
        for name in modules:
            raise ConfigurationError(
                f"trainer.{name} has parameters that the optimizer holds, but is no part of the model, and "
                f"{self.name} trains what is in the model only. Make it a part of the model, or use DDP or "
                "FSDP2."
            )
        for name in optimizers:
            raise ConfigurationError(
                f"trainer.{name} is a further optimizer, but {self.name} trains by one. Use DDP or FSDP2."
            )

    def train_beside(self, trained: Trained, step_weight: StepWeight, stepped: list[Any]) -> None:
        """Train what is in the model only: the engine has exchanged what the optimizer holds."""

    def average_beside(self) -> None:
        """Do nothing: there is nothing beside the model."""

    def check_equal_parameters(self) -> str | None:
        """Return None: each process has a part of its own."""
        return None

    def bypasses_accelerate(self, optimizer: Any) -> bool:
        """Return False."""
        return False

    def parameters_to_clip(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """Return those of the model: the engine clips itself."""
        return list(model.parameters())

    def scale_gradients(self, model: torch.nn.Module, factor: float | torch.Tensor) -> None:
        """Raise unless `factor` is 1: the parameters have changed already."""
        if not math.isclose(factor, 1.0):
            raise ConfigurationError(
                f"The items of an update differ from the plan, but {self.name} has changed the parameters "
                "inside backward already. Override count_items(batch), which counts before the forward pass."
            )

    def check_files(self, folder: Path, saved_processes: int, trust_engine_files: bool) -> None:
        """Raise for the state of another number of processes too."""
        super().check_files(folder, saved_processes, trust_engine_files)
        if saved_processes != self.group.size:
            raise CheckpointError(
                f"'{folder}' was saved by {counted(saved_processes, 'processes')}, and {self.name} continues "
                f"with that number only, not with {self.group.size}. Start as many, or begin a new run from "
                "an export."
            )

    def _announce_last_step(self, model: torch.nn.Module, is_last: bool) -> Context:
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        return _NOTHING

    @contextlib.contextmanager
    def completed_config(self, per_device_batch_size: int) -> Iterator[None]:
        """Give DeepSpeed, while it is prepared, the numbers that Accelerate would take from a loader."""
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        before = dict(config)
        sizes = ("train_micro_batch_size_per_gpu", "train_batch_size")
        if all(config.get(size, "auto") == "auto" for size in sizes):
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

    def set_clipping(self, gradient_clip_norm: float | None) -> None:
        """Let DeepSpeed clip by what `train` was told, also if it has been prepared for another run."""
        if self._configured_clipping() is None:
            engine: Any = self._parts().model
            engine._config.gradient_clipping = gradient_clip_norm or 0.0
            if hasattr(engine.optimizer, "clip_grad"):
                engine.optimizer.clip_grad = gradient_clip_norm or 0.0

    def _configured_clipping(self) -> float | None:
        """Return the norm that the user's configuration clips by, or None if it leaves that open."""
        configured = self.accelerator.deepspeed_plugin.deepspeed_config.get("gradient_clipping", "auto")
        return None if configured == "auto" else float(configured)

    def _load_shards(self, wrapper: Any, model: torch.nn.Module, state: dict[str, Any]) -> None:
        if wrapper is model:
            model.load_state_dict(state)
            return
        parameters: Iterable[Any] = model.parameters()
        for parameter in parameters:
            if hasattr(parameter, "ds_tensor"):
                # ZeRO-3 keeps small ones whole, and would load those into the copy only.
                parameter.partition()
        wrapper.load_module_state_dict({"module": state}, fetch_z3_params=True)
        if hasattr(wrapper.optimizer, "refresh_fp32_params"):
            wrapper.optimizer.refresh_fp32_params()
