"""FSDP2: parameters, gradients and optimizer states are spread over the processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import AccelWarning, CheckpointError, ConfigurationError
from ..processes.group import DataGroup
from ..state.read_shards import is_in_shards
from ..state.shards import Shards, find_obstacle, named_tensors
from ..state.weight_names import with_plain_names
from .beside import TrainsBeside
from .clearing import choose_zero_grad
from .ddp import DDP
from .engine import CreateState, LoadState
from .exchanged import Exchanged
from .mixtures import compute_one_by_one
from .partial_loading import parameters_held
from .parts import check_whole, clip_norm, reshard
from .shards import load_shards
from .trained import clear_gradients, parameters_of
from .weights import share_buffers


class Sharded(DDP):
    """Base of the engines that spread a model over the processes: they write and read it themselves."""

    shards_parameters = True
    writes_in_background = False
    exports_optimizer = False
    reads_shards = False
    """Training states are read in the form in which FSDP2 writes them."""

    wraps_by_ddp = False

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        self.has_collective_forward = not group.is_single
        self._exchanged = Exchanged()

    def check(self, overridden: list[str], clip_value: Any, clip_norm: Any, has_plan: bool) -> None:
        """Refuse to clip single elements."""
        if clip_value is not None:
            raise ConfigurationError(
                f"gradient_clip_value is {clip_value}, but {self.name} clips by norm only. Pass "
                "gradient_clip_norm instead."
            )

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Refuse a model that the user has sharded; a run before may have sharded it by this engine."""
        if not getattr(model, "_is_accelerate_prepared", False):
            check_whole(model.named_parameters(), self.name)
            self._exchanged.remember(model)

    def check_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Refuse attributes with a parameter that preparing has exchanged."""
        self._exchanged.check(attributes, self.name)

    def parameters_to_clip(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """Return those of the model, as Accelerate wants; clear the gradients that no optimizer holds."""
        held = set(map(id, parameters_of(self.optimizer)))
        parameters: list[torch.Tensor] = list(model.parameters())
        clear_gradients(parameter for parameter in parameters if id(parameter) not in held)
        return parameters

    def bind(self, optimizer: Any) -> None:
        """Let an update also clear the gradients that no optimizer holds."""
        super().bind(optimizer)
        if self.prepared is not None and not self.steps_in_backward:
            self.zero_grad = choose_zero_grad(self.optimizer, list(self.prepared.model.parameters()))

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Wrap by Accelerate, also a model that has nothing to train."""
        if optimizer is None:
            return self.accelerator.prepare_model(model), None
        model, optimizer = self.accelerator.prepare(model, optimizer)
        return model, optimizer

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model: it follows what is frozen and unfrozen."""
        return self._parts().model

    def module_to_evaluate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the wrapped model: its parameters have to be gathered."""
        return model

    def full_weights(self, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
        """Gather the parameters of all processes."""
        share_buffers(model)
        # Outside of a run the model is the user's own, which DeepSpeed keeps inside of what can gather it.
        wrapper = None if self.prepared is None else self.prepared.model
        is_inside = getattr(wrapper, "module", None) is model
        return self.accelerator.get_state_dict(wrapper if is_inside else model)  # type: ignore[no-any-return]

    def load_full_weights(self, load: LoadState) -> LoadState:
        """Return a function that hands each process its part."""
        return load if self.prepared is None else partial(self._load_shards, self.prepared.model)

    def _load_shards(self, wrapper: Any, model: torch.nn.Module, state: dict[str, Any]) -> None:
        # Imported when used: the module takes long to import and changes the filters of warnings.
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))

    def main_files(self, scheduler: Any, create_state: CreateState) -> dict[str, Any]:
        """Return the files of scheduler and scaler; Accelerate writes the rest."""
        return self._small_files(scheduler)

    @property
    def write_own_files(self) -> Callable[[Path], None] | None:
        """Accelerate's `save_state`, of what this engine has prepared."""
        return self._save_shards

    def _save_shards(self, folder: Path) -> None:
        # Other trainers may share the accelerator.
        with self._parts().patches.applied():
            self.accelerator.save_state(folder)

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Let Accelerate load the shards, then load the rest."""
        self.accelerator.load_state(str(folder / "engine"))
        self._load_small_files(folder, scheduler)
        self._note_step()

    def _note_step(self) -> None:
        prepared = self._parts()
        if prepared.optimizer is not None:
            # It has stepped before. Else torch warns of a scheduler that steps first, as at the end of an
            # epoch.
            prepared.user_optimizer._opt_called = True

    def check_files(self, folder: Path, saved_processes: int, trust_engine_files: bool) -> None:
        """Raise unless an engine that shards the model has saved the state, and is trusted to unpickle it."""
        if not (folder / "engine").is_dir():
            raise CheckpointError(
                f"'{folder}' was saved without an engine that shards the model, and this run is with one "
                f"({self.name}). Resume as it was saved, or begin a new run from an export."
            )
        if is_in_shards(folder) and not self.reads_shards:
            raise CheckpointError(
                f"'{folder}' was saved by FSDP2, and this run is with {self.name}. Resume with FSDP2, DDP or "
                "one process, or begin a new run from an export."
            )
        if not trust_engine_files:
            raise ConfigurationError(
                f"'{folder}' has sharded files, which {self.name} unpickles: code in them would run. If you "
                "trust them, set trainer.trust_engine_files = True."
            )


class FSDP2(TrainsBeside, Sharded):
    """Runs the steps of several processes that hold a part of each parameter, by `fully_shard`."""

    name = "FSDP2"
    reads_shards = True
    writes_in_background = True
    _has_warned = False

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Refuse weights that two layers share, if each layer is sharded by its size."""
        super().check_model(model, optimizer)
        plugin: Any = self.accelerator.state.fsdp_plugin
        # Accelerate binds its arguments when it has prepared a first model.
        policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
        if getattr(policy, "__name__", "") != "size_based_auto_wrap_policy":
            return
        for tied in _tied_names(model):
            layers = [model.get_submodule(name) for name in {name.rpartition(".")[0] for name in tied}]
            sizes = [sum(each.numel() for each in layer.parameters()) for layer in layers]
            # What one layer holds twice is sharded once, and small layers are sharded with what is around.
            if len(layers) > 1 and max(sizes) > (plugin.min_num_params or 0):
                raise ConfigurationError(
                    f"The parameters {tied} are one tensor that several layers share, but the "
                    "auto_wrap_policy 'size_based_wrap' shards each layer by itself, which torch refuses. "
                    "Use auto_wrap_policy='transformer_based_wrap' with the class of the repeated layer, or "
                    "'no_wrap', which shard the shared tensor with the whole model."
                )

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Shard by Accelerate; what it lets backward compute again has the same dropout as in forward."""
        model, optimizer = super().prepare(model, optimizer)
        plugin: Any = self.accelerator.state.fsdp_plugin
        for part in model.modules() if plugin.activation_checkpointing else ():
            # Accelerate 1.15 lets dropout draw anew, so that the gradients would be wrong without an error.
            if "checkpoint_fn" in vars(part):
                own: Any = part
                own.checkpoint_fn = partial(own.checkpoint_fn, preserve_rng_state=True)
        return model, optimizer

    def create_shards(self) -> Shards | None:
        """Return what this process holds of model and optimizer; None, and a warning, if torch cannot."""
        model, optimizer = self._bare_parts()
        state = with_plain_names(model.state_dict())
        held = [] if optimizer is None else parameters_held(self.trained, optimizer)
        tensors, rest = named_tensors(state, None if optimizer is None else optimizer.state_dict(), held)
        obstacle = find_obstacle(tensors)
        if obstacle is None:
            return Shards(tensors, rest)
        if not self._has_warned and self.group.is_main:
            warnings.warn(
                f"Accelerate writes the training states, with pickle, because {obstacle}. To resume from "
                "them, set trainer.trust_engine_files = True.",
                AccelWarning,
                stacklevel=2,
            )
        self._has_warned = True
        return None

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Load what this process holds; states of older versions by Accelerate."""
        if not is_in_shards(folder):
            super().load_files(folder, scheduler, load)
            return
        model, optimizer = self._bare_parts()
        held = [] if optimizer is None else parameters_held(self.trained, optimizer)
        load_shards(folder, model, optimizer, held)
        compute_one_by_one(optimizer)
        self._load_small_files(folder, scheduler)
        self._note_step()

    def check_files(self, folder: Path, saved_processes: int, trust_engine_files: bool) -> None:
        """Trust what is written in shards, of which nothing is executed."""
        super().check_files(folder, saved_processes, trust_engine_files or is_in_shards(folder))

    def _bare_parts(self) -> tuple[torch.nn.Module, Any]:
        """Return model and optimizer without wrappers, the parameters in parts."""
        prepared = self._parts()
        model: torch.nn.Module = self.accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        reshard(model)
        return model, getattr(prepared.optimizer, "optimizer", prepared.optimizer)

    def bind(self, optimizer: Any) -> None:
        """Clip without Accelerate, which compares the parameters with those of all models that it knows."""
        super().bind(optimizer)
        self.clip_norm = self._clip_norm

    def _clip_norm(self, parameters: Iterable[torch.Tensor], max_norm: float) -> None:
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()
        clip_norm(parameters, max_norm)


class HSDP(FSDP2):
    """Runs the steps of groups of processes that hold a copy of the model together, in parts.

    Each process reads batches of its own, as with FSDP2.
    """

    name = "HSDP"


def _tied_names(model: torch.nn.Module) -> list[list[str]]:
    """Return the names of each tensor that has several in the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]
