"""One process: nothing to share. The other engines begin here, and differ in what they override."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import CheckpointError
from ..processes.collectives import broadcast_tensors
from ..processes.group import DataGroup
from ..state.checkpoint import model_files, read_model_state
from ..state.read_shards import is_in_shards
from ..state.shards import Shards
from ..state.weight_names import with_plain_names
from .carried_word import CarriedWord
from .clearing import call_both, choose_zero_grad
from .engine import Context, CreateState, LoadState, Prepared, StepWeight
from .further_optimizers import FurtherOptimizers
from .partial_loading import parameters_held
from .parts import check_whole, local_shard
from .second_order import needs_second_order, second_order_backward
from .trained import Trained, parameters_of
from .weights import (
    is_frozen,
    load_into,
    load_optimizer,
    load_together,
    scheduler_fits,
    share_buffers,
)

_NOTHING = contextlib.nullcontext()


class SingleProcess:
    """Runs the steps of a single process, and is the base of the engines for several."""

    name = "a single process"
    shards_parameters = False
    gathers_files = False
    writes_in_background = True
    exports_optimizer = True
    steps_in_backward = False

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        self.accelerator = accelerator
        self.group = group
        self.has_collective_forward = False
        self.may_skip_updates = accelerator.scaler is not None
        self.prepared: Prepared | None = None
        self.limits_of_exactness: list[str] = []
        self.trained: Trained | None = None
        self.further: FurtherOptimizers | None = None
        self.word: CarriedWord | None = None
        self.optimizer: Any = None
        self.backward: Callable[[torch.Tensor], None] = torch.Tensor.backward
        self.zero_grad: Callable[[], None] = _do_nothing
        self.clip_norm: Callable[..., Any] = torch.nn.utils.clip_grad_norm_
        self.synchronize: Callable[[torch.nn.Module, bool], Context] = _no_context

    # ---------------------------------------------------------------- before a run

    def check(self, overridden: list[str], clip_value: Any, clip_norm: Any, has_plan: bool) -> None:
        """Refuse nothing."""

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Refuse a model that the user has sharded."""
        check_whole(model.named_parameters(), self.name)

    def completed_config(self, per_device_batch_size: int) -> Context:
        """Return a context that does nothing."""
        return _NOTHING

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Place and wrap by Accelerate; a model that has nothing to train is only placed."""
        if is_frozen(model):
            return self._place_frozen(model), optimizer and self.accelerator.prepare_optimizer(optimizer)
        if optimizer is None:
            return self.accelerator.prepare_model(model), None
        model, optimizer = self.accelerator.prepare(model, optimizer)
        return model, optimizer

    def _place_frozen(self, model: torch.nn.Module) -> torch.nn.Module:
        """Place a model without trainable parameters.

        DDP refuses such a model, so what DDP does at its beginning is done here: every process gets the
        values of the main one.
        """
        placed: torch.nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        # Accelerate would never wrap a model with this mark, also when there is something to train.
        placed.__dict__.pop("_is_accelerate_prepared", None)
        broadcast_tensors([*placed.parameters(), *placed.buffers()])
        return placed

    def keep(self, prepared: Prepared) -> None:
        """Keep what the trainer's `prepare` has made."""
        self.prepared = prepared

    def bind(self, optimizer: Any) -> None:
        """Let steps call torch itself where Accelerate has nothing to add, else call through Accelerate."""
        bypasses = self.bypasses_accelerate(optimizer)
        self.optimizer = getattr(optimizer, "optimizer", optimizer) if bypasses else optimizer
        self.backward = torch.Tensor.backward if bypasses else self.accelerator.backward
        if needs_second_order(optimizer):
            self.backward = functools.partial(second_order_backward, self.backward)
        self.zero_grad = choose_zero_grad(
            self.optimizer, [] if self.trained is None else self.trained.cleared
        )
        if self.accelerator.scaler is not None and self.trained is not None and self.trained.optimizers:
            self.zero_grad = functools.partial(call_both, self.zero_grad, self._further().back_off)
        clips_whole_tensors = bypasses and not self.shards_parameters
        self.clip_norm = (
            torch.nn.utils.clip_grad_norm_ if clips_whole_tensors else self.accelerator.clip_grad_norm_
        )

    def check_trained(self, modules: Iterable[str], optimizers: Iterable[str]) -> None:
        """Refuse nothing."""

    def check_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Refuse nothing: the parameters are the user's own."""

    def train_beside(self, trained: Trained, step_weight: StepWeight, stepped: list[Any]) -> None:
        """Keep what is beside the model, and listen to the steps of further optimizers."""
        if self.further is not None:
            self.further.release()
        self.trained = trained
        self.further = FurtherOptimizers(
            trained, self.accelerator.scaler, self.group.is_single, step_weight, stepped
        )
        self.further.listen()

    def bypasses_accelerate(self, optimizer: Any) -> bool:
        """Whether Accelerate has nothing to add to `backward`, `step` and `zero_grad`.

        The weights are the same.

        Its wrapper looks for a package on the disk at every step and for a signature at every `zero_grad`,
        and its `backward` divides by 1. A scaler, and the optimizers of LOMO, which step in backward, need
        Accelerate.
        """
        is_lomo = type(getattr(optimizer, "optimizer", optimizer)).__name__ in ("Lomo", "AdaLomo")
        return self.accelerator.scaler is None and not is_lomo

    def set_clipping(self, gradient_clip_norm: float | None) -> None:
        """Do nothing: the trainer clips."""

    # ---------------------------------------------------------------- in the loop

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model."""
        return self._parts().model

    def module_to_evaluate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return `model` itself."""
        return model

    def average_beside(self) -> None:
        """Do nothing: there is one process."""

    def scale_gradients(self, model: torch.nn.Module, factor: float | torch.Tensor) -> None:
        """Multiply the gradients of the model and of what else the optimizers hold, as a loss module."""
        held = parameters_of(self._parts().optimizer)
        beside = () if self.trained is None else self.trained.all_parameters()
        parameters = dict.fromkeys([*model.parameters(), *held, *beside])
        gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def clip_gradients(
        self, model: torch.nn.Module, clip_value: float | None, clip_norm: float | None
    ) -> None:
        """Clip by value and then by norm."""
        parameters = self.parameters_to_clip(model)
        if clip_value is not None:
            self.accelerator.clip_grad_value_(parameters, clip_value)
        if clip_norm is not None:
            self.clip_norm(parameters, clip_norm)

    def parameters_to_clip(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """Return the parameters that the optimizer holds, in the model and beside it."""
        return list(parameters_of(self.optimizer))

    def check_equal_parameters(self) -> str | None:
        """Return None: there is nothing to compare."""
        return None

    # ---------------------------------------------------------------- weights and files

    def full_weights(self, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
        """Return the state of the unwrapped and uncompiled model."""
        share_buffers(model)
        return create_state(self.accelerator.unwrap_model(model, keep_torch_compile=False))

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return `state`."""
        return state

    def load_full_weights(self, load: LoadState) -> LoadState:
        """Return `load`."""
        return load

    def main_files(self, scheduler: Any, create_state: CreateState) -> dict[str, Any]:
        """Return the files of model, optimizer, scheduler and scaler."""
        prepared = self._parts()
        model = self.accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        files = model_files(with_plain_names(create_state(model)))
        if prepared.optimizer is not None:
            files["optimizer.pt"] = prepared.optimizer.state_dict()
            files["model_extra.pt"]["held"] = parameters_held(self.trained, prepared.optimizer)
        return {**files, **self._small_files(scheduler)}

    def _small_files(self, scheduler: Any) -> dict[str, Any]:
        files = {}
        if scheduler is not None:
            files["scheduler.pt"] = scheduler.state_dict()
        if self.accelerator.scaler is not None:
            files["scaler.pt"] = self.accelerator.scaler.state_dict()
        return files

    def create_shards(self) -> Shards | None:
        """Return None: the main process writes everything."""
        return None

    @property
    def write_own_files(self) -> Callable[[Path], None] | None:
        """None: the main process writes everything."""
        return None

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Load model, optimizer, scheduler and scaler, all of them or none."""
        prepared = self._parts()
        optimizer = getattr(prepared.optimizer, "optimizer", prepared.optimizer)
        model = self.accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        with load_together(model, read_model_state(folder), folder, load, optimizer):
            if optimizer is not None:
                load_optimizer(optimizer, folder / "optimizer.pt", load, self.trained)
            self._load_small_files(folder, scheduler if scheduler_fits(load) else None)
        if optimizer is not None:
            # It has stepped before. Else torch warns of a scheduler that steps first, as at the end of an
            # epoch.
            prepared.user_optimizer._opt_called = True

    def _load_small_files(self, folder: Path, scheduler: Any) -> None:
        if scheduler is not None:
            load_into(scheduler, folder / "scheduler.pt")
        if self.accelerator.scaler is not None and (folder / "scaler.pt").exists():
            load_into(self.accelerator.scaler, folder / "scaler.pt")

    def check_files(self, folder: Path, saved_processes: int, trust_engine_files: bool) -> None:
        """Raise for what an engine has pickled; of shards this process reads the whole tensors."""
        if (folder / "engine").is_dir() and not is_in_shards(folder):
            raise CheckpointError(
                f"'{folder}' was saved with an engine that shards the model, and this run is without one "
                f"({self.name}). Resume as it was saved, or begin a new run from an export."
            )

    def _further(self) -> FurtherOptimizers:
        if self.further is None:
            raise RuntimeError(
                "The engine was asked for further optimizers before it was told what is trained."
            )
        return self.further

    def _parts(self) -> Prepared:
        if self.prepared is None:
            raise RuntimeError("The engine was asked for the prepared model before prepare.")
        return self.prepared


def _no_context(model: torch.nn.Module, is_last: bool) -> Context:
    return _NOTHING


def _do_nothing() -> None:
    pass
