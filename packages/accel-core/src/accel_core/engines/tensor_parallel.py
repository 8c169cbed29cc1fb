"""Tensor parallelism: all processes hold one copy of the model together, and read the same batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from .averaging import check_equal_parameters
from .engine import CreateState, LoadState
from .mixtures import check_mixtures, compute_one_by_one
from .parts import clip_norm, clip_value, is_dtensor, parts_of_model, whole
from .single import SingleProcess
from .trained import parameters_of


class TensorParallel(SingleProcess):
    """Runs the steps of processes that hold one copy of the model together.

    The user lays out the model, by `parallelize_module` or by loading it with a plan; its layers communicate
    in forward and backward. Each process reads the same batches and computes the same loss, so nothing is
    averaged. States and exports hold whole tensors, like those of one process.
    """

    name = "tensor parallelism"
    shards_parameters = True
    gathers_files = True
    writes_in_background = False
    exports_optimizer = True

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        self.has_collective_forward = True
        if accelerator.scaler is not None:
            raise ConfigurationError(
                "mixed_precision is 'fp16' and the ParallelismConfig has "
                f"tp_size={group.processes_per_copy}, but a scaler would look at the gradients of each "
                "process by itself. Use mixed_precision='bf16' or 'no'."
            )

    # ---------------------------------------------------------------- before a run

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Refuse a model that is not laid out over the processes of a copy before the optimizer is made."""
        size = self.group.processes_per_copy
        parts = {name: each for name, each in model.named_parameters() if is_dtensor(each)}
        if not parts:
            raise ConfigurationError(
                f"The ParallelismConfig has tp_size={size}, but no parameter of {type(model).__name__} is a "
                "DTensor: each process has the whole model. Lay it out before you make the trainer, by "
                "torch's parallelize_module(model, accelerator.torch_device_mesh['tp'], plan) or by "
                "from_pretrained with a tensor-parallel plan. Make the optimizer after that."
            )
        for name, parameter in parts.items():
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            if mesh.size() != size:
                raise ConfigurationError(
                    f"The parameter {name!r} lies on {mesh.size()} processes, but the ParallelismConfig has "
                    f"tp_size={size}. Use the mesh accelerator.torch_device_mesh['tp'] for all of the model."
                )
        trainable = [each for each in parts.values() if each.requires_grad]
        if optimizer is not None and trainable and not any(map(is_dtensor, parameters_of(optimizer))):
            raise ConfigurationError(
                f"The {type(optimizer).__name__} holds none of the DTensors of {type(model).__name__}, whose "
                "parameters were exchanged when it was laid out. Make the optimizer after "
                "parallelize_module or from_pretrained."
            )
        check_mixtures(optimizer)

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Place the model, and let it compute in the precision that is asked for; nothing is wrapped."""
        prepared: torch.nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        # Accelerate would not prepare a model with this mark again.
        prepared.__dict__.pop("_is_accelerate_prepared", None)
        return prepared, optimizer and self.accelerator.prepare_optimizer(optimizer)

    def bind(self, optimizer: Any) -> None:
        """Clip parts and plain tensors together."""
        super().bind(optimizer)
        self.clip_norm = clip_norm
        compute_one_by_one(self.optimizer)

    # ---------------------------------------------------------------- in the loop

    def clip_gradients(
        self, model: torch.nn.Module, largest_value: float | None, largest_norm: float | None
    ) -> None:
        """Clip by value and then by norm."""
        parameters = self.parameters_to_clip(model)
        if largest_value is not None:
            clip_value(parameters, largest_value)
        if largest_norm is not None:
            self.clip_norm(parameters, largest_norm)

    def check_equal_parameters(self) -> str | None:
        """Compare the parameters that all processes hold whole, by one small reduction."""
        if self.trained is None:
            return None
        return check_equal_parameters(
            (name, parameter)
            for name, parameter in self.trained.named_parameters()
            if not is_dtensor(parameter)
        )

    # ---------------------------------------------------------------- weights and files

    def full_weights(self, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
        """Gather the parts of all processes."""
        return self.whole_state(super().full_weights(model, create_state))

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state that has whole tensors on the main process."""
        return whole(state, self.group.is_main)  # type: ignore[no-any-return]

    def main_files(self, scheduler: Any, create_state: CreateState) -> dict[str, Any]:
        """Return the files of one process, with whole tensors."""
        return self.whole_state(super().main_files(scheduler, create_state))

    def load_full_weights(self, load: LoadState) -> LoadState:
        """Return a function that hands each process its part."""
        return partial(_load_parts, load)

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Load the files of one process, of which this one takes its part."""
        super().load_files(folder, scheduler, partial(_load_parts, load))
        compute_one_by_one(self.optimizer)


def _load_parts(load: LoadState, model: torch.nn.Module, state: dict[str, Any]) -> None:
    load(model, parts_of_model(model.state_dict(), state))
