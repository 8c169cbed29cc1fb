"""All that a training state holds of what training changes, by name: to compare two states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import files
from .checkpoint import (
    ATTRIBUTES_FILE,
    TrainerState,
    read_model_state,
    read_optimizer_state,
    read_parameters_held,
)
from .read_shards import is_in_shards
from .weight_names import plain_name

OPTIMIZER_FILE = "optimizer.pt"
FILES_OF_TRAINED = ("model.safetensors", OPTIMIZER_FILE, ATTRIBUTES_FILE)
ENGINE_FILES = "engine/"
"""Begins the names of files that an engine wrote: parts of tensors, or pickles that are not read here."""


class TrainedValues(NamedTuple):
    """Holds the values of a state by name."""

    weights: dict[str, Any]
    """Parameters and buffers of the model."""
    beside: dict[str, Any]
    """Those of optimizers, such as `optimizer.exp_avg of 0.weight`, and of modules beside the model."""


def read_trained_values(folder: Path, state: TrainerState) -> TrainedValues:
    """Return what the state in `folder` holds, on the CPU. Raises `CheckpointError` if it is damaged."""
    beside: dict[str, Any] = {}
    if OPTIMIZER_FILE in state["files"] or is_in_shards(folder):
        content = read_optimizer_state(folder)
        names = _names_of_parameters(read_parameters_held(folder))
        beside.update(_values_of_optimizer("optimizer", content, names))
    if ATTRIBUTES_FILE in state["files"]:
        content = files.read_object(folder / ATTRIBUTES_FILE, dict)
        for name, module in content.get("modules", {}).items():
            beside.update({f"{name}.{key}": value for key, value in module.items()})
        for name, optimizer in content.get("optimizers", {}).items():
            beside.update(_values_of_optimizer(name, optimizer, []))
    return TrainedValues(read_model_state(folder), beside)


def _names_of_parameters(held: Any) -> list[str]:
    """Return the names of the parameters by their number in the optimizer. Older states have none."""
    return [] if held is None else [plain_name(name) for group in held for name, _ in group]


def _values_of_optimizer(label: str, content: Any, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield what an optimizer keeps of each parameter and group. One of the user's may keep it otherwise."""
    if not (isinstance(content, Mapping) and isinstance(content.get("state"), Mapping)):
        yield label, content
        return
    for number, values in content["state"].items():
        is_known = isinstance(number, int) and number < len(names) and names[number]
        name = names[number] if is_known else f"parameter {number}"
        inner = values if isinstance(values, Mapping) else {"state": values}
        for key, value in inner.items():
            yield f"{label}.{key} of {name}", value
    for number, group in enumerate(content.get("param_groups", [])):
        for key, value in group.items():
            if key != "params":
                yield f"{label}.{key} of group {number}", value
