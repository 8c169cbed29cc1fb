"""Parameters and buffers of a model, whatever has been wrapped around it: sharing, checking, loading."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import CheckpointError, NotFiniteError
from ..processes.collectives import all_gather_object, broadcast_tensors
from ..state import files
from ..state.checkpoint import read_optimizer_state, read_parameters_held
from ..state.plain import is_dense
from ..state.random import preserving_random_state
from ..state.read_shards import is_in_shards
from ..state.shards import SHARDS_FILE
from ..state.weight_names import plain_held, with_names_of
from ..text import with_full_stop
from .engine import LoadState
from .partial_loading import PartialLoad, parameters_held
from .parts import is_dtensor, local_shard, parts_of_optimizer
from .trained import Trained

_HAVE_EXTREMES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrap_model(
    accelerator: Accelerator, model: torch.nn.Module, keep_torch_compile: bool
) -> torch.nn.Module:
    """Return the model without what Accelerate has wrapped around it."""
    return accelerator.unwrap_model(model, keep_torch_compile=keep_torch_compile)  # type: ignore[no-any-return]


def is_frozen(model: torch.nn.Module) -> bool:
    """Whether no parameter has gradients."""
    return not any(parameter.requires_grad for parameter in model.parameters())


def move_modules(attributes: Mapping[str, Any], device: torch.device) -> None:
    """Move modules (metrics, losses) and parameters among the attributes of the trainer to `device`."""
    for name, value in attributes.items():
        if isinstance(value, torch.nn.Module) and name != "model":
            value.to(device)
        elif isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf:
            # The object stays, since an optimizer may hold it.
            value.data = value.data.to(device)


def renew_step(optimizer: Any) -> None:
    """Let a scaled optimizer call the `step` that its scheduler has wrapped since it was prepared.

    Torch warns if any other is called.
    """
    if getattr(optimizer, "scaler", None) is not None:
        optimizer.__setstate__(optimizer.__getstate__())


def share_buffers(model: torch.nn.Module) -> None:
    """Give every process the main process's buffers. Every process takes part."""
    # Of a buffer in parts each process has its own.
    broadcast_tensors(buffer for buffer in model.buffers() if not is_dtensor(buffer))


@contextlib.contextmanager
def preserving_buffers_and_rng(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Put buffers and random state back afterwards, as if no forward pass had happened."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with preserving_random_state(device):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def check_finite(model: torch.nn.Module, beside: Mapping[str, torch.nn.Module] | None = None) -> None:
    """Raise on every process if a parameter is not finite on any. Every process takes part.

    Args:
        beside: modules beside the model, by the names that begin those of their parameters.
    """
    parts = {"": model, **{f"{name}.": module for name, module in (beside or {}).items()}}
    names = (
        prefix + name
        for prefix, module in parts.items()
        for name, parameter in module.named_parameters()
        if not _is_finite(local_shard(parameter).detach())
    )
    found = next(filter(None, all_gather_object(next(names, None))), None)
    if found:
        raise NotFiniteError(
            f"The parameter {found!r} is not finite, so the state was not saved and the checkpoints before "
            "it stay. Resume from the newest of them and clip the gradients, or set a lower learning rate in "
            "on_checkpoint_loaded, since the state restores that of the run."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is nan or infinite."""
    if is_dense(tensor) and tensor.dtype in _HAVE_EXTREMES and tensor.numel():
        # Both extremes of a tensor with a nan are nan. `isfinite` makes four tensors of this size, and takes
        # twenty times as long.
        tensor = torch.stack(torch.aminmax(tensor))
    return bool(torch.isfinite(tensor).all())


FROM_AN_EXPORT = "begin a new run from an export: load_checkpoint(path, load_optimizer=False)."
"""The way out for a training state that does not fit, of which no part can be left out."""


def load_into(target: Any, path: Path, state: Any = None, is_export: bool = False) -> None:
    """Load the file `path` of a checkpoint into an optimizer, a scheduler or a scaler.

    Args:
        state: what was read from the file, if it was read already.
        is_export: `path` is an export, from which an optimizer or a scheduler can be left out.
    """
    state = files.read_object(path) if state is None else state
    groups = getattr(target, "param_groups", [])
    needed = [target.defaults.keys() & group.keys() for group in groups]
    try:
        if isinstance(target, torch.optim.Optimizer):
            state = parts_of_optimizer(target, state)
        target.load_state_dict(state)
        # Torch takes over the groups of another class of optimizer, which would fail at the first step.
        for names, group in zip(needed, getattr(target, "param_groups", []), strict=True):
            if missing := sorted(names - group.keys()):
                raise ValueError(f"it has no {missing}.")
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The {type(target).__name__} of this run cannot load its state from '{path}': "
            f"{type(error).__name__}: {with_full_stop(error)} Create it as in the run that was saved, or "
            f"{_without(target) if is_export else FROM_AN_EXPORT}"
        ) from error


def _without(target: Any) -> str:
    """Return how `load_checkpoint` leaves out the state of an optimizer or a scheduler."""
    kind = "optimizer" if isinstance(target, torch.optim.Optimizer) else "scheduler"
    return f"pass load_{kind}=False to load_checkpoint."


def load_optimizer(
    optimizer: Any, path: Path, load: LoadState, trained: Trained | None, state: Any = None
) -> None:
    """Load the file `path` into an optimizer, after `load_together` has looked at the model's state.

    Args:
        load: that of the model, which may ask for what fits only.
        trained: knows the names of what the optimizer holds.
        state: what was read from an export; None reads the file of a training state.
    """
    saved_held, is_export = None, state is not None
    if state is None:
        state = read_optimizer_state(path.parent)
        path = path.with_name(SHARDS_FILE) if is_in_shards(path.parent) else path
        saved_held = plain_held(read_parameters_held(path.parent)) if isinstance(load, PartialLoad) else None
    if isinstance(load, PartialLoad):
        state = load.optimizer_state(optimizer, parameters_held(trained, optimizer), state, saved_held)
    load_into(optimizer, path, state, is_export)


def scheduler_fits(load: LoadState) -> bool:
    """Whether the state of a scheduler has numbers for each group of the optimizer, once that is loaded."""
    return not (isinstance(load, PartialLoad) and load.has_other_groups)


@contextlib.contextmanager
def load_together(
    model: torch.nn.Module, state: dict[str, Any], source: Path, load: LoadState, optimizer: Any
) -> Iterator[None]:
    """Load the state of the unwrapped model after what is loaded within.

    An error leaves it and `optimizer` as they were.

    A state with other names or shapes comes first: if it fails, that is why the rest would not fit
    either.
    """
    if isinstance(load, PartialLoad):
        state = load.fitting(model, state)
    own = model.state_dict()
    state = with_names_of(own, state)
    before = None if optimizer is None else optimizer.state_dict()
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
            raise CheckpointError(
                f"'{source}' holds the state of another model than {type(model).__name__}: "
                f"{with_full_stop(error)}{_way_out(model)}"
            ) from error
        if is_other:
            yield
    except Exception:
        if optimizer is not None:
            optimizer.load_state_dict(before)
        raise


def _way_out(model: torch.nn.Module) -> str:
    """Return how to load a part, which engines that shard do not."""
    is_sharded = any(local_shard(parameter) is not parameter for parameter in model.parameters())
    return "" if is_sharded else " To load what fits, set trainer.load_partial_states = True."
