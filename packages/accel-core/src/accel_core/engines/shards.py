"""What a process holds of a sharded model and its optimizer: collected to be written, and loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..state.read_shards import ShardReader, model_state_of, optimizer_targets, read_rest
from ..state.shards import SHARDS_FILE
from ..state.weight_names import plain_held, plain_name, with_names_of
from ..text import counted
from .parts import is_dtensor
from .weights import FROM_AN_EXPORT, load_into


def load_shards(folder: Path, model: torch.nn.Module, optimizer: Any, held: Any) -> None:
    """Load what this process holds of model and optimizer, whatever number of processes has saved it.

    Args:
        optimizer: without wrappers, or None.
        held: name and shape of each of its parameters, by group.

    Raises:
        CheckpointError: the state is of another model or optimizer; nothing has changed then.
    """
    rest, reader = read_rest(folder), ShardReader(folder)
    own = model.state_dict()
    tensors = {f"model.{plain_name(name)}": value for name, value in own.items() if torch.is_tensor(value)}
    _check_fit(folder, model, reader, rest, {plain_name(name) for name in own}, tensors)
    state: Any = None
    targets: dict[str, torch.Tensor] = {}
    if optimizer is not None:
        if rest["optimizer"] is None or plain_held(rest["held"]) != held:
            raise CheckpointError(
                f"The {type(optimizer).__name__} of this run cannot load its state from "
                f"'{folder / SHARDS_FILE}', which is for {_told(rest['held'])}, while this one holds "
                f"{_told(held)}. Create it as in the run that was saved, or {FROM_AN_EXPORT}"
            )
        numbers = [number for group in rest["optimizer"]["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        of_number = dict(zip(numbers, parameters, strict=True))
        state, targets = optimizer_targets(
            reader, rest["optimizer"], lambda number: partial(_target, of_number.get(number))
        )
    reader.fill({**tensors, **targets})
    loaded = {name.removeprefix("model."): value for name, value in tensors.items()}
    # What is a parameter is filled already; this runs the hooks of modules, and sets what is no tensor.
    model.load_state_dict(with_names_of(own, model_state_of(rest, loaded)))
    if optimizer is not None:
        load_into(optimizer, folder / SHARDS_FILE, state)


def _check_fit(
    folder: Path,
    model: torch.nn.Module,
    reader: ShardReader,
    rest: dict[str, Any],
    names: set[str],
    tensors: dict[str, torch.Tensor],
) -> None:
    saved = set(rest["names"])
    differing = {
        "it has no": sorted(names - saved),
        "the model has no": sorted(saved - names),
        "other shapes": [
            name.removeprefix("model.")
            for name, value in tensors.items()
            if names == saved and reader.shape_of(name)[0] != value.shape
        ],
    }
    # `fully_shard` gives the model a class of its own.
    kind = type(model).__name__.removeprefix("FSDP")
    if told := "; ".join(f"{what}: {found[:5]}" for what, found in differing.items() if found):
        raise CheckpointError(
            f"'{folder}' holds the state of another model than {kind}: {told}. Build the model as in the run "
            "that was saved."
        )


def _told(held: Any) -> str:
    names = [name for group in held or [] for name, _ in group]
    return f"{counted(len(names), 'parameters')} in {counted(len(held or []), 'groups')}, {names[:5]}"


def _target(parameter: Any, shape: torch.Size, dtype: torch.dtype, spread: list[int] | None) -> torch.Tensor:
    """Return what is filled with a saved tensor of a parameter: spread as that is, or whole."""
    if spread is None or not is_dtensor(parameter):
        return torch.empty(shape, dtype=dtype)
    if shape == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import empty as empty_dtensor

    # Such as one factor of a matrix: what is not spread on its own dimension is whole on every process.
    placements = [
        Shard(spread[0]) if placement.is_shard() and spread else Replicate()
        for placement in parameter.placements
    ]
    return empty_dtensor(*shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
