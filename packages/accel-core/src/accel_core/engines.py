"""What Accelerate wraps around a model and an optimizer, and where it can be left out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from . import durable_files, training_state
from .checks import sentence
from .distributed import broadcast_from_main, gather_values
from .errors import CheckpointError, ConfigurationError, NotFiniteError
from .random_state import keep_random_state
from .sharded_engines import LEFT_TO_ENGINE as LEFT_TO_ENGINE
from .sharded_engines import check_engine_files as check_engine_files
from .sharded_engines import check_left_to_engine as check_left_to_engine
from .sharded_engines import configured as configured
from .sharded_engines import has_collective_forward as has_collective_forward
from .sharded_engines import has_own_backward as has_own_backward
from .sharded_engines import is_sharded as is_sharded
from .sharded_engines import load_full_state as load_full_state
from .sharded_engines import own_part
from .sharded_engines import set_clipping as set_clipping

CreateState = Callable[[torch.nn.Module], dict[str, Any]]
LoadState = Callable[[torch.nn.Module, dict[str, Any]], None]


@dataclasses.dataclass
class Prepared:
    """The user's model and optimizer with what `prepare` made of them."""

    user_model: torch.nn.Module
    user_optimizer: Any
    model: torch.nn.Module
    optimizer: Any

    def __post_init__(self) -> None:
        self._remember_trainable()

    def is_of(self, model: torch.nn.Module, optimizer: Any) -> bool:
        """Whether these are the very objects that were prepared."""
        return self.user_model is model and self.user_optimizer is optimizer

    def _remember_trainable(self) -> None:
        self._parameters = list(self.model.parameters())
        self._trainable = [parameter.requires_grad for parameter in self._parameters]

    def model_to_train(self, accelerator: Accelerator) -> torch.nn.Module:
        """Return the model, wrapped anew if parameters were frozen or unfrozen. Every process takes part.

        DDP would not synchronise those that it did not know.
        """
        if accelerator.num_processes == 1 or self._trainable == [parameter.requires_grad for parameter in self._parameters]:
            return self.model
        if not is_sharded(accelerator):
            inner = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
            accelerator._models[:] = [model for model in accelerator._models if model is not self.model]
            self.model = place_frozen(accelerator, inner) if is_frozen(inner) else accelerator.prepare_model(inner)
        self._remember_trainable()
        return self.model


def is_frozen(model: torch.nn.Module) -> bool:
    """Whether no parameter has gradients."""
    return not any(parameter.requires_grad for parameter in model.parameters())


def place_frozen(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Place a model that has nothing to train.

    DDP refuses it, so what DDP does at its beginning is done here: every process gets the values of the main one.
    """
    placed: torch.nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    # Accelerate would never wrap a model with this mark, also when there is something to train.
    placed.__dict__.pop("_is_accelerate_prepared", None)
    broadcast_from_main([*placed.parameters(), *placed.buffers()])
    return placed


def find_ddp(model: torch.nn.Module) -> DistributedDataParallel | None:
    """The wrapper that synchronises gradients, also where Accelerate has compiled it, or None."""
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None


def renew_step(optimizer: Any) -> None:
    """Let a scaled optimizer call the `step` that its scheduler has wrapped since preparing: torch warns of any other."""
    if getattr(optimizer, "scaler", None) is not None:
        optimizer.__setstate__(optimizer.__getstate__())


@contextlib.contextmanager
def without_trace(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random state back afterwards, as if no forward had happened."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with keep_random_state(device):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give the module to evaluate, without gradients; each of its modules is back in its mode afterwards.

    Under DDP it is the module inside, with the main process's buffers on every process: the wrapper would wait for a
    process that has no batch. Engines whose forward is collective keep theirs.
    """
    ddp = find_ddp(model)
    inner: torch.nn.Module = model if ddp is None else ddp.module
    share_buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            inner.eval()
            yield inner
    finally:
        for module, training in modes:
            module.training = training


def multiply_gradients(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, factor: float | torch.Tensor) -> None:
    """Multiply all gradients by `factor`, where they are not in the parameters already; also those of a loss module."""
    if has_own_backward(accelerator):
        if math.isclose(factor, 1.0):
            return
        raise ConfigurationError(
            f"The items of an update differ from the plan, but {accelerator.distributed_type.value} has changed the parameters "
            f"inside backward already. Override count_items(batch), which counts beforehand."
        )
    parameters = {*model.parameters(), *(parameter for group in optimizer.param_groups for parameter in group["params"])}
    gradients = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor)


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers. Every process takes part."""
    broadcast_from_main(model.buffers())


def check_finite(model: torch.nn.Module) -> None:
    """Raise on every process if a parameter is not finite on any. Every process takes part."""
    bad = next((name for name, parameter in model.named_parameters() if not torch.isfinite(own_part(parameter)).all()), None)
    found = next((name for name in gather_values(bad) if name), None)
    if found:
        raise NotFiniteError(
            f"The parameter {found!r} is not finite, so the state was not saved and the checkpoints before it stay. Go on from "
            f"the newest of them, with a lower learning rate or clipped gradients."
        )


def full_model_state(accelerator: Accelerator, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
    """State of the unwrapped and uncompiled model, with the main process's buffers. Every process takes part."""
    share_buffers(model)
    if is_sharded(accelerator):
        # Outside of a run the model is the user's own, which DeepSpeed keeps inside of what can gather it.
        wrapped = next((engine for engine in accelerator._models if getattr(engine, "module", None) is model), model)
        return accelerator.get_state_dict(wrapped)  # type: ignore[no-any-return]
    return create_state(accelerator.unwrap_model(model, keep_torch_compile=False))


def main_files(accelerator: Accelerator, prepared: Prepared, scheduler: Any, create_state: CreateState) -> dict[str, Any]:
    """Contents of the files that the main process writes into a checkpoint folder, by name."""
    files: dict[str, Any] = {}
    if not is_sharded(accelerator):
        model = accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        files = training_state.model_files(create_state(model))
        if prepared.optimizer is not None:
            files["optimizer.pt"] = prepared.optimizer.state_dict()
    if scheduler is not None:
        files["scheduler.pt"] = scheduler.state_dict()
    if accelerator.scaler is not None:
        files["scaler.pt"] = accelerator.scaler.state_dict()
    return files


def load_state(folder: Path, accelerator: Accelerator, prepared: Prepared, scheduler: Any, load: LoadState) -> None:
    """Load what `main_files` and the engine have written. Every process takes part."""
    optimizer, loading_model = None, cast(contextlib.AbstractContextManager[None], contextlib.nullcontext())
    if is_sharded(accelerator):
        accelerator.load_state(str(folder / "engine"))
    else:
        optimizer = getattr(prepared.optimizer, "optimizer", prepared.optimizer)
        model = accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        loading_model = loading(model, training_state.read_model_state(folder), folder, load, optimizer)
    with loading_model:
        if optimizer is not None:
            load_into(optimizer, folder / "optimizer.pt")
        if scheduler is not None:
            load_into(scheduler, folder / "scheduler.pt")
        if accelerator.scaler is not None and (folder / "scaler.pt").exists():
            load_into(accelerator.scaler, folder / "scaler.pt")
    if prepared.optimizer is not None:
        # It has stepped before. Else torch warns of a scheduler that steps first, as at the end of an epoch.
        prepared.user_optimizer._opt_called = True


def load_into(target: Any, path: Path, state: Any = None) -> None:
    """Load the file of a checkpoint, or `state` that was read from it, into an optimizer, scheduler or scaler."""
    state = durable_files.read_object(path) if state is None else state
    needed = [target.defaults.keys() & group.keys() for group in getattr(target, "param_groups", [])]
    try:
        target.load_state_dict(state)
        # Torch takes over the groups of another class of optimizer, which would fail at the first step.
        for names, group in zip(needed, getattr(target, "param_groups", []), strict=True):
            if missing := sorted(names - group.keys()):
                raise ValueError(f"it has no {missing}.")
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' does not fit the {type(target).__name__} of this run: {type(error).__name__}: {sentence(error)} Build it "
            f"as in the run that was saved."
        ) from error


@contextlib.contextmanager
def loading(model: torch.nn.Module, state: dict[str, Any], source: Path, load: LoadState, optimizer: Any) -> Iterator[None]:
    """Load the state of the unwrapped model after what is loaded within. An error leaves it and `optimizer` as they were.

    A state with other names or shapes comes first: where it is refused, that is why the rest would not fit either.
    """
    own, before = model.state_dict(), optimizer and optimizer.state_dict()
    shared = {name: own[name] for name in own.keys() & state.keys() if isinstance(own[name], torch.Tensor)}
    is_other = own.keys() != state.keys() or any(value.shape != state[name].shape for name, value in shared.items())
    try:
        if not is_other:
            yield
        kept = {name: value.clone() for name, value in shared.items()} if is_other else {}
        try:
            load(model, state)
        except (RuntimeError, KeyError) as error:
            for name, value in kept.items():
                shared[name].copy_(value)  # Torch loads what fits before it raises.
            told = f"'{source}' holds the state of another model than {type(model).__name__}: {error}"
            raise CheckpointError(told) from error
        if is_other:
            yield
    except Exception:
        if optimizer is not None:
            optimizer.load_state_dict(before)
        raise


def check_accelerator(accelerator: Accelerator) -> None:
    """Raise if the accelerator accumulates by itself, which would divide the gradients twice."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise ConfigurationError(
            f"The Accelerator has gradient_accumulation_steps={steps}, from its argument or from accelerate launch, but must "
            f"have 1, since the trainer accumulates itself. Pass gradient_accumulation_steps={steps} to train instead."
        )


@contextlib.contextmanager
def noted(error: BaseException) -> Iterator[None]:
    """Let what fails within be a note of `error`, which is on its way already."""
    try:
        yield
    except Exception as another:
        error.add_note(f"While closing, a callback failed too: {another!r}")


def move_modules(attributes: dict[str, Any], device: torch.device) -> None:
    """Move the modules among the attributes of the trainer (metrics, loss modules) to `device`."""
    for name, value in attributes.items():
        if isinstance(value, torch.nn.Module) and name != "model":
            value.to(device)
