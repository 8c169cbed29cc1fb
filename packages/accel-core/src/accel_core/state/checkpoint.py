"""What a checkpoint folder holds, and which folders are complete.

    trainer_state.json     what a person wants to know; written last, with the sizes of the other files
    model.safetensors      the parameters and buffers; model_extra.pt: what else the model's state has
    optimizer.pt  scheduler.pt  scaler.pt  extra.pt
    attributes.pt          modules, optimizers and schedulers among the attributes of the trainer that are trained
    process_00000.pt ...   of each process: random state, loss so far, callbacks, position of iterable data
    engine/                sharded states, written by Accelerate

`<name>.<letters>.incomplete` is being written, `<name>.incomplete` removed; neither is ever read.
`<name>.replaced` was complete when a newer state took its name, and goes once that one stands.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import accelerate
import torch

from ..__about__ import __version__
from ..errors import CheckpointError
from . import files

FORMAT_VERSION = 1

STATE_FILE = "trainer_state.json"
ATTRIBUTES_FILE = "attributes.pt"

_OWN_NAMES = re.compile(
    r"trainer_state\.json|model\.safetensors|(model_extra|optimizer|scheduler|scaler|attributes|extra|process_\d{5,})\.pt|engine"
    r"|\.(tmp|nfs)\w+"  # what safetensors leaves when it is killed, and a network disk for an open file
)

_ORDER: tuple[Any, ...] = (
    "updates_completed",
    "stage",
    "epochs_completed",
    "train_epoch_completed",
    "eval_epoch_completed",
    "run_completed",
)

_logger = logging.getLogger("accel_core")


class RunState(TypedDict):
    """What the trainer tells about a run."""

    run_id: str
    run_progress: ProgressState
    run_history: dict[str, Any]
    seed: int
    order_version: int  # of the function from seed and epoch to the order of the samples
    num_samples: (
        int | None
    )  # of the training data, None where unknown; to notice other data, as `launched` is to compare
    launched: Launched
    callbacks: list[str]
    attributes: list | None  # type: ignore[type-arg]  # names of those whose states attributes.pt holds; None in states that are older than it


class ProgressState(TypedDict):
    """The fields of `RunProgress`."""

    epochs_completed: int
    updates_completed: int
    updates_skipped: int
    updates_completed_in_epoch: int
    steps_completed_in_epoch: int
    samples_completed_in_epoch: int
    train_epoch_completed: bool
    eval_epoch_completed: bool
    epoch_cut_by_limit: bool
    run_completed: bool
    stage: int
    stage_skipped: bool
    epochs_before_stage: int
    updates_before_stage: int
    order_epoch: int


class Launched(TypedDict):
    """How the run was started."""

    num_processes: int
    per_device_batch_size: int | None
    gradient_accumulation_steps: int
    num_update_steps: int | None
    versions: dict[str, str]


class TrainerState(RunState):
    """The content of trainer_state.json."""

    format_version: int
    files: dict[str, int]  # path within the folder and size in bytes of every other file


def library_versions() -> dict[str, str]:
    """The versions that decide whether a run can be repeated to the bit."""
    versions = {"accel": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}
    return {**versions, "python": platform.python_version()}


def process_file(process_index: int) -> str:
    """The name of the file of one process."""
    return f"process_{process_index:05d}.pt"


def model_files(state: Mapping[str, Any]) -> dict[str, Any]:
    """Files for a module's `state_dict()`: dense tensors, and apart what safetensors cannot hold."""
    metadata = {name: dict(value) for name, value in getattr(state, "_metadata", {}).items()}
    tensors = {name: value for name, value in state.items() if _is_dense(value)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return {"model.safetensors": tensors, "model_extra.pt": {"entries": rest, "metadata": metadata}}


def _is_dense(value: Any) -> bool:
    is_plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and value.layout is torch.strided and not (value.is_quantized or value.is_complex())


def read_model_state(folder: Path) -> dict[str, Any]:
    """Return the `state_dict()` that was given to `model_files`, on the CPU."""
    extra = files.read_object(folder / "model_extra.pt", {"entries": dict, "metadata": dict})
    state = OrderedDict({**files.read_tensors(folder / "model.safetensors"), **extra["entries"]})
    state._metadata = extra["metadata"]  # type: ignore[attr-defined]
    return state


def remove_checkpoint(path: Path) -> None:
    """Remove a folder so that no half of it ever looks complete.

    What the disk refuses is left to the next save.
    """
    staging = path if path.name.endswith(".incomplete") else sibling(path, ".incomplete")
    try:
        if staging.exists():
            files.remove_folder(staging)
        if path.exists():
            files.rename(path, staging)
            files.remove_folder(staging)
    except OSError as error:
        _logger.warning("'%s' could not be removed: %s", path, error)


def complete_checkpoints(folder: str | Path) -> dict[Path, TrainerState]:
    """Return the complete states directly inside `folder`, oldest first; logs what it passes over."""
    found = {}
    for path in filter(Path.is_dir, Path(folder).glob("*")):
        state = examine(path)
        if not isinstance(state, str):
            found[path] = state
        elif path.name.endswith(".incomplete") or any(
            map(os.path.isfile, (path / STATE_FILE, path / process_file(0)))
        ):
            _logger.warning("'%s' is passed over: it %s.", path, state)

    def age(path: Path) -> tuple[object, ...]:
        return (
            *(dict(found[path]["run_progress"])[key] for key in _ORDER),
            not path.name.endswith(".replaced"),
            path.name,
        )

    return {path: found[path] for path in sorted(found, key=age)}


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete state directly inside `folder`; None if there is none or no folder."""
    if isinstance(examine(Path(folder)), dict):
        _logger.warning("'%s' is itself a training state: give it to resume_from as it is.", folder)
    return next(reversed(complete_checkpoints(folder)), None)


def open_training_state(path: str | Path) -> TrainerState:
    """Return what trainer_state.json says.

    Raises `CheckpointError` if `path` is no complete state: what it is instead.
    """
    path = Path(path)
    state = examine(path)
    if not isinstance(state, str):
        return state
    newest = latest_checkpoint(path) or latest_checkpoint(path.parent)
    way_out = (
        f"Did you mean '{newest}'?"
        if newest
        else "Pass the folder of a complete training state, or None to start afresh."
    )
    raise CheckpointError(f"'{path}' {state}. {way_out}")


def is_same_state(path: str | Path, run_id: str, run_progress: Mapping[str, Any]) -> bool:
    """Whether a complete state of this run with the same progress stands at `path`."""
    state = examine(Path(path))
    if isinstance(state, str) or state["run_id"] != run_id:
        return False
    return all(dict(state["run_progress"])[key] == run_progress[key] for key in _ORDER)


def check_folder_of_run(save_dir: str | Path, run_id: str, updates_completed: int | None = None) -> None:
    """Raise `CheckpointError` if `save_dir` holds states of another run, or later ones of this run."""
    for path, state in complete_checkpoints(save_dir).items():
        refuse_other_run(path, run_id)
        updates = state["run_progress"]["updates_completed"]
        if updates_completed is not None and updates > updates_completed:
            raise CheckpointError(
                f"'{path}' holds {updates} updates of this run, which has gone on from {updates_completed}: "
                "latest_checkpoint would choose what was given up. Remove it, or save to another folder."
            )


def refuse_other_run(path: Path, run_id: str) -> None:
    """Raise `CheckpointError` if `path` holds a state of another run, complete or not."""
    found = _read(path).get("run_id", run_id)
    if found != run_id:
        raise CheckpointError(
            f"'{path}' is a state of the run {found!r}, but this is the run {run_id!r}. Choose another "
            f"folder, or go on with that run by resume_from='{path}', or by reset_run_history=False in a "
            "second call of train."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = files.read_json(path / STATE_FILE)
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def examine(path: Path) -> TrainerState | str:
    """Return what trainer_state.json says, or why `path` is no complete state."""
    if not path.is_dir():
        is_file = "is a file, but a training state is a folder; load_checkpoint reads an export"
        return is_file if path.exists() else "does not exist"
    if path.name.endswith(".incomplete"):
        return "was not written to its end, or is half removed"
    if not os.path.isfile(path / STATE_FILE):  # False too for what this user may not look into.
        entries = sorted(entry.name for entry in path.glob("*"))
        return f"has no {STATE_FILE}, but {entries[:5]}" if entries else f"has no {STATE_FILE}"
    # States of the first versions do not name the order of the data: there was one only. Nor have they attributes.
    state = {"order_version": 1, "attributes": None, **_read(path)}
    _add_stage(state)
    if state.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        found = state["format_version"]
        return f"has the format {found}, not {FORMAT_VERSION}; use the version of accel that wrote it"
    if flaw := files.find_flaw(state, TrainerState):
        return f"has a damaged {STATE_FILE}: {flaw}"
    for name, size in state["files"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return f"is damaged: {name} is missing or has another size"
    return cast(TrainerState, state)


def _add_stage(state: dict[str, Any]) -> None:
    """Add what states of the first versions lack: every call of `train` was a run, and began at the first order."""
    progress = state.get("run_progress")
    counters = {"stage": 1, "stage_skipped": False, "epochs_before_stage": 0, "updates_before_stage": 0}
    # A state that has some of them is a later one that was damaged.
    if isinstance(progress, dict) and not progress.keys() & {*counters, "order_epoch"}:
        state["run_progress"] = {**progress, **counters, "order_epoch": progress.get("epochs_completed")}


def has_only_own_files(path: Path) -> bool:
    """Whether `path` is a folder without anything that a checkpoint does not have."""
    return path.is_dir() and all(_OWN_NAMES.fullmatch(entry.name) for entry in path.glob("*"))


def remove_leftovers(folder: Path) -> None:
    """Remove what crashes left in `folder`: incomplete states, and replaced ones whose successor stands."""
    for path in [*folder.glob("*.incomplete"), *folder.glob("*.replaced")]:
        successor = path.with_name(path.name.removesuffix(".replaced"))
        is_own = has_only_own_files(path) or isinstance(examine(path), dict)
        if is_own and (successor == path or isinstance(examine(successor), dict)):
            remove_checkpoint(path)


def sibling(path: Path, ending: str) -> Path:
    """The folder of the same name with `ending` behind it."""
    return path.with_name(path.name + ending)
