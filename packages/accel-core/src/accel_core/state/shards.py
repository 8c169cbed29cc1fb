"""Sharded states: each process writes its own parts of the tensors, by torch's distributed checkpoint.

engine/shard-*.safetensors   parts of tensors, named `model.NAME` and `optimizer.NAME.KEY`
sharded.pt                   the rest, as plain values: names, options of the optimizer, what is no tensor

Only tensors go through torch's writer: it would pickle any other value into a safetensors file. Nothing here
communicates: the plans of all processes are exchanged by the process that saves.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import files
from .digests import Written, digest_of_file
from .plain import as_plain
from .safetensors_file import DTYPES

SHARDS_FILE = "sharded.pt"
SHARDS_FOLDER = "engine"

APART = "apart"
"""The key in `attributes.pt` of what the optimizer keeps of parameters beside the model.

Shards have it among the rest of the optimizer, so it stands there only if an engine writes files of its own.
"""

TENSOR = "accel_tensor"
"""The key of what stands in `sharded.pt` for a tensor: its name in the files, and `sharded`.

That is None for a plain tensor, which all processes hold alike, else the dimensions that are spread.
"""


def find_obstacle(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return why tensors cannot be written as shards, or None if they can. The same on every process."""
    # Imported when used: the module takes long to import and changes the filters of warnings.
    from torch.distributed import checkpoint

    writer = getattr(checkpoint, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in inspect.signature(writer.__init__).parameters:
        return f"PyTorch {torch.__version__} cannot write sharded safetensors"
    return next((f"{name!r} is {flaw}" for name, value in tensors.items() if (flaw := _flaw_of(value))), None)


def _flaw_of(tensor: torch.Tensor) -> str | None:
    placements = {type(placement).__name__ for placement in getattr(tensor, "placements", ())}
    if not placements <= {"Shard", "Replicate"}:
        return f"laid out by {sorted(placements)}"
    part = part_of_process(tensor)
    if type(part) not in (torch.Tensor, torch.nn.Parameter) or part.layout is not torch.strided:
        return f"no dense tensor, but {type(part).__name__}"
    if part.is_quantized or part.is_complex() or part.dtype not in DTYPES:
        return f"of the type {part.dtype}, which a safetensors file does not hold"
    return None


def part_of_process(tensor: Any) -> torch.Tensor:
    """Return what this process holds of a tensor."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return part.detach()


def named_tensors(
    model_state: Mapping[str, Any], optimizer_state: Mapping[str, Any] | None, held: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a state by name, and the rest, which says where each of them stands.

    Args:
        optimizer_state: as its `state_dict()` returns it.
        held: name and shape of each parameter of the optimizer, by group.
    """
    tensors = {f"model.{name}": value for name, value in model_state.items() if torch.is_tensor(value)}
    rest: dict[str, Any] = {
        "names": list(model_state),
        "entries": {name: value for name, value in model_state.items() if not torch.is_tensor(value)},
        "metadata": {name: dict(value) for name, value in getattr(model_state, "_metadata", {}).items()},
        "held": held,
        "optimizer": None,
    }
    if optimizer_state is not None:
        numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
        names = [name for group in held for name, _ in group]
        # Names of parameters, since a tensor stands in the file for people too.
        of_number = dict(zip(numbers, (name or f"#{index}" for index, name in enumerate(names)), strict=True))
        state = {
            number: _without_tensors(value, f"optimizer.{of_number.get(number, number)}", tensors)
            for number, value in optimizer_state["state"].items()
        }
        others = {key: value for key, value in optimizer_state.items() if key != "state"}
        rest["optimizer"] = {"state": state, **_without_tensors(others, "optimizer_options", tensors)}
    return tensors, rest


def _without_tensors(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` with a mark in place of each tensor, which is put into `tensors`."""
    if torch.is_tensor(value):
        if name in tensors:
            raise ValueError(f"Two tensors of a state are called {name!r}.")
        tensors[name] = value
        placements = getattr(value, "placements", None)
        spread = None if placements is None else sorted({each.dim for each in placements if each.is_shard()})
        return {TENSOR: name, "sharded": spread}
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(
            _without_tensors(item, f"{name}.{index}", tensors) for index, item in enumerate(value)
        )
    return value


class Shards:
    """What one process writes of a state in parts.

    First `propose` on every process, then `settle` with what all have proposed, then `write`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
        self.rest = as_plain(dict(rest), f"The content of '{SHARDS_FILE}'")
        self.parts = _own_memory({name: part_of_process(value) for name, value in tensors.items()})
        """What this process holds of each tensor. A copy may take its place before it is written."""
        self._planner = self._create_planner()
        self._planner.set_up_planner(dict(tensors), None, is_coordinator=False)
        self._writer: Any = None
        self._plan: Any = None

    def _create_planner(self) -> Any:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        shards = self

        class PartsPlanner(DefaultSavePlanner):
            """Plans by the layout of the tensors, and writes `shards.parts`."""

            def lookup_object(self, index: Any) -> torch.Tensor:
                return shards.parts[index.fqn]

        return PartsPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)

    def propose(self) -> Any:
        """Return what this process could write."""
        return self._planner.create_local_plan()

    def settle(self, proposals: Sequence[Any], index: int, folder: Path) -> None:
        """Choose what this process writes, so that each part is written once.

        Args:
            proposals: of all processes, in their order: all of them choose the same.
            index: of this process.
            folder: of the state; the files come into a folder in it.
        """
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        # No consolidation: it fails on whole numbers, and one process would read and write everything.
        self._writer = HuggingFaceStorageWriter(str(folder / SHARDS_FOLDER), save_distributed=True)
        self._writer.set_up_storage_writer(index == 0)
        plans, _ = self._planner.create_global_plan(list(proposals))
        self._plan = self._planner.finish_plan(self._writer.prepare_global_plan(plans)[index])

    def write(self, folder: Path) -> dict[str, Written]:
        """Write the parts of this process, and read them back for sizes and digests."""
        target = folder / SHARDS_FOLDER
        with files.writing(target):
            files.make_folder(target)
            results = self._writer.write_data(self._plan, self._planner).wait()
            names = sorted({f"{SHARDS_FOLDER}/{each.storage_data.relative_path}" for each in results})
            files.sync(target)
            return read_back(folder, names)


def read_back(folder: Path, names: Sequence[str]) -> dict[str, Written]:
    """Return sizes and digests of files within a folder, once they are on the disk."""
    written = {}
    for name in names:
        files.sync(folder / name)
        written[name] = Written((folder / name).stat().st_size, digest_of_file(folder / name))
    return written


def _own_memory(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parts that lie in memory one after the other, and share it with no other part.

    Neither else goes into a safetensors file.
    """
    seen: set[int] = set()
    own = {}
    for name, part in parts.items():
        address = part.untyped_storage().data_ptr()
        own[name] = (
            part.clone(memory_format=torch.contiguous_format) if address in seen else part.contiguous()
        )
        if part.numel():
            seen.add(address)
    return own
