"""What Accelerate wraps around a model and an optimizer, and where it can be left out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, ConfigurationError, NotFiniteError
from ..processes.collectives import all_gather_object, broadcast_tensors
from ..state import files
from ..state.checkpoint import model_files, read_model_state
from ..state.random import preserving_random_state
from ..text import with_full_stop
from .sharded import has_own_backward, is_sharded, local_shard

if TYPE_CHECKING:
    from .engine import Prepared

CreateState = Callable[[torch.nn.Module], dict[str, Any]]


LoadState = Callable[[torch.nn.Module, dict[str, Any]], None]


def is_frozen(model: torch.nn.Module) -> bool:
    """Whether no parameter has gradients."""
    return not any(parameter.requires_grad for parameter in model.parameters())


def place_frozen(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    """Place a model that has nothing to train.

    DDP refuses it, so what DDP does at its beginning is done here: every process gets the values of the main
    one.
    """
    placed: torch.nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    # Accelerate would never wrap a model with this mark, also when there is something to train.
    placed.__dict__.pop("_is_accelerate_prepared", None)
    broadcast_tensors([*placed.parameters(), *placed.buffers()])
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
def preserving_buffers_and_rng(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random state back afterwards, as if no forward had happened."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with preserving_random_state(device):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give the module to evaluate, without gradients; each of its modules is back in its mode afterwards.

    Under DDP it is the module inside, with the main process's buffers on every process: the wrapper would
    wait for a process that has no batch. Engines whose forward is collective keep theirs.
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


def multiply_gradients(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: Any, factor: float | torch.Tensor
) -> None:
    """Multiply all gradients by `factor`, where they are not in the parameters already.

    Also those of a loss module.
    """
    if has_own_backward(accelerator):
        if math.isclose(factor, 1.0):
            return
        raise ConfigurationError(
            f"The items of an update differ from the plan, but {accelerator.distributed_type.value} has "
            "changed the parameters inside backward already. Override count_items(batch), which counts "
            "beforehand."
        )
    parameters = {
        *model.parameters(),
        *(parameter for group in optimizer.param_groups for parameter in group["params"]),
    }
    gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor)


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers. Every process takes part."""
    broadcast_tensors(model.buffers())


def check_finite(model: torch.nn.Module) -> None:
    """Raise on every process if a parameter is not finite on any. Every process takes part."""
    bad = next(
        (
            name
            for name, parameter in model.named_parameters()
            if not torch.isfinite(local_shard(parameter)).all()
        ),
        None,
    )
    found = next((name for name in all_gather_object(bad) if name), None)
    if found:
        raise NotFiniteError(
            f"The parameter {found!r} is not finite, so the state was not saved and the checkpoints before "
            "it stay. Go on from the newest of them, with a lower learning rate or clipped gradients."
        )


def full_model_state(
    accelerator: Accelerator, model: torch.nn.Module, create_state: CreateState
) -> dict[str, Any]:
    """State of the unwrapped and uncompiled model, with the main process's buffers.

    Every process takes part.
    """
    share_buffers(model)
    if is_sharded(accelerator):
        # Outside of a run the model is the user's own, which DeepSpeed keeps inside of what can gather it.
        wrapped = next(
            (engine for engine in accelerator._models if getattr(engine, "module", None) is model), model
        )
        return accelerator.get_state_dict(wrapped)  # type: ignore[no-any-return]
    return create_state(accelerator.unwrap_model(model, keep_torch_compile=False))


def main_files(
    accelerator: Accelerator, prepared: Prepared, scheduler: Any, create_state: CreateState
) -> dict[str, Any]:
    """Contents of the files that the main process writes into a checkpoint folder, by name."""
    files: dict[str, Any] = {}
    if not is_sharded(accelerator):
        model = accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        files = model_files(create_state(model))
        if prepared.optimizer is not None:
            files["optimizer.pt"] = prepared.optimizer.state_dict()
    if scheduler is not None:
        files["scheduler.pt"] = scheduler.state_dict()
    if accelerator.scaler is not None:
        files["scaler.pt"] = accelerator.scaler.state_dict()
    return files


def load_state(
    folder: Path, accelerator: Accelerator, prepared: Prepared, scheduler: Any, load: LoadState
) -> None:
    """Load what `main_files` and the engine have written. Every process takes part."""
    optimizer, loading_model = None, cast(contextlib.AbstractContextManager[None], contextlib.nullcontext())
    if is_sharded(accelerator):
        accelerator.load_state(str(folder / "engine"))
    else:
        optimizer = getattr(prepared.optimizer, "optimizer", prepared.optimizer)
        model = accelerator.unwrap_model(prepared.model, keep_torch_compile=False)
        loading_model = loading(model, read_model_state(folder), folder, load, optimizer)
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
    state = files.read_object(path) if state is None else state
    needed = [target.defaults.keys() & group.keys() for group in getattr(target, "param_groups", [])]
    try:
        target.load_state_dict(state)
        # Torch takes over the groups of another class of optimizer, which would fail at the first step.
        for names, group in zip(needed, getattr(target, "param_groups", []), strict=True):
            if missing := sorted(names - group.keys()):
                raise ValueError(f"it has no {missing}.")
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"'{path}' does not fit the {type(target).__name__} of this run: {type(error).__name__}: "
            f"{with_full_stop(error)} Build it as in the run that was saved."
        ) from error


@contextlib.contextmanager
def loading(
    model: torch.nn.Module, state: dict[str, Any], source: Path, load: LoadState, optimizer: Any
) -> Iterator[None]:
    """Load the state of the unwrapped model after what is loaded within.

    An error leaves it and `optimizer` as they were.

    A state with other names or shapes comes first: where it is refused, that is why the rest would not fit
    either.
    """
    own, before = model.state_dict(), optimizer and optimizer.state_dict()
    shared = {name: own[name] for name in own.keys() & state.keys() if isinstance(own[name], torch.Tensor)}
    is_other = own.keys() != state.keys() or any(
        value.shape != state[name].shape for name, value in shared.items()
    )
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
            f"The Accelerator has gradient_accumulation_steps={steps}, from its argument or from accelerate "
            "launch, but must have 1, since the trainer accumulates itself. Pass "
            f"gradient_accumulation_steps={steps} to train instead."
        )


def move_modules(attributes: dict[str, Any], device: torch.device) -> None:
    """Move the modules among the attributes of the trainer (metrics, loss modules) to `device`."""
    for name, value in attributes.items():
        if isinstance(value, torch.nn.Module) and name != "model":
            value.to(device)
