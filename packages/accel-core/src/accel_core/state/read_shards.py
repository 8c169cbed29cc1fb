"""Reads sharded states: what a process holds of each tensor, or whole tensors, by any number of processes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from . import files
from .shards import SHARDS_FILE, SHARDS_FOLDER, TENSOR

CreateTarget = Callable[[torch.Size, torch.dtype, "list[int] | None"], torch.Tensor]
"""From the whole shape, the type and the spread dimensions of a saved tensor to what is filled with it."""


def is_in_shards(folder: Path) -> bool:
    """Whether the tensors of a state are in parts that each process may read, without unpickling anything."""
    return (folder / SHARDS_FILE).is_file()


def read_rest(folder: Path) -> dict[str, Any]:
    """Return what a sharded state holds beside tensors."""
    form = {"names": list, "entries": dict, "metadata": dict, "held": object, "optimizer": object}
    return files.read_object(folder / SHARDS_FILE, form)  # type: ignore[no-any-return]


class ShardReader:
    """Reads tensors of one sharded state by name. No communication: each process reads what it needs.

    Raises:
        CheckpointError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        # Imported when used: the module takes long to import and changes the filters of warnings.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self.folder = folder
        with files.reading(folder / SHARDS_FOLDER):
            self._reader = HuggingFaceStorageReader(str(folder / SHARDS_FOLDER))
            self._metadata: Any = self._reader.read_metadata()

    def shape_of(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Return the shape and the type of a whole tensor."""
        found = self._metadata.state_dict_metadata.get(name)
        if found is None:
            raise CheckpointError(
                f"'{self.folder}' has no tensor {name!r} in its files; use another checkpoint."
            )
        return found.size, found.properties.dtype

    def fill(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Read what each of `targets` holds of the saved tensor with its name, in place."""
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with files.reading(self.folder / SHARDS_FOLDER), torch.no_grad():
            planner.set_up_planner(dict(targets), self._metadata, is_coordinator=False)
            self._reader.set_up_storage_reader(self._metadata, False)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(planner.finish_plan(plan), planner).wait()


def optimizer_targets(
    reader: ShardReader, state: Mapping[str, Any], create: Callable[[int | None], CreateTarget]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the state of an optimizer with tensors in place of their marks, and these by name, to be filled.

    Args:
        create: from the number of a parameter in the state, or None for options, to what makes its tensors.
    """
    targets: dict[str, torch.Tensor] = {}

    def with_tensors(value: Any, create_target: CreateTarget) -> Any:
        if isinstance(value, dict) and TENSOR in value:
            name = value[TENSOR]
            targets[name] = create_target(*reader.shape_of(name), value["sharded"])
            return targets[name]
        if isinstance(value, dict):
            return {key: with_tensors(item, create_target) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(with_tensors(item, create_target) for item in value)
        return value

    filled = {key: with_tensors(value, create(None)) for key, value in state.items() if key != "state"}
    filled["state"] = {
        number: with_tensors(value, create(number)) for number, value in state["state"].items()
    }
    return filled, targets


def model_state_of(rest: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a model, in its order, of the rest of a sharded state and its tensors by name."""
    names = rest["names"]
    state = OrderedDict(
        (name, rest["entries"][name] if name in rest["entries"] else tensors[name]) for name in names
    )
    state._metadata = rest["metadata"]  # type: ignore[attr-defined]
    return state


def read_whole_model(folder: Path) -> dict[str, Any]:
    """Return the state of the whole model, on the CPU."""
    rest, reader = read_rest(folder), ShardReader(folder)
    names = [name for name in rest["names"] if name not in rest["entries"]]
    targets = {f"model.{name}": _whole(*reader.shape_of(f"model.{name}")) for name in names}
    reader.fill(targets)
    return model_state_of(rest, {name: targets[f"model.{name}"] for name in names})


def read_whole_optimizer(folder: Path) -> Any:
    """Return the state of the optimizer with whole tensors, on the CPU; None if there was none."""
    rest = read_rest(folder)
    if rest["optimizer"] is None:
        return None
    reader = ShardReader(folder)
    state, targets = optimizer_targets(reader, rest["optimizer"], lambda number: _whole)
    reader.fill(targets)
    return state


def _whole(shape: torch.Size, dtype: torch.dtype, spread: list[int] | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)
