"""What the folder of a training state holds, and whether it is one.

trainer_state.json     what a person wants to know; written last, with sizes and digests of all files
history.jsonl          the records of the run history, one a line
model.safetensors      the parameters and buffers; model_extra.pt: what else the model's state has, and the
                       names and shapes of what the optimizer holds (`held`)
optimizer.pt  scheduler.pt  scaler.pt  extra.pt
attributes.pt          modules, optimizers and schedulers among the attributes of the trainer that are trained
process_00000.pt ...   of each process: random state, loss so far, callbacks, position of iterable data
engine/                sharded states: safetensors (the rest in sharded.pt), or what Accelerate writes
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import platform
import stat
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import accelerate
import torch

from ..__about__ import __version__
from . import files
from .digests import digest_of_file
from .former_states import complete_progress
from .plain import is_dense
from .read_shards import is_in_shards, read_rest, read_whole_model, read_whole_optimizer
from .safetensors_file import DTYPES
from .state_values import find_wrong_value

# States of version 1 have no digests, and the records of the history in their JSON. Those of version 3 have
# `sharded.pt`. All others are still written as 2, so that older versions of accel read them.
FORMAT_VERSION, WHOLE_FORMAT_VERSION = 3, 2
STATE_FILE = "trainer_state.json"
ATTRIBUTES_FILE = "attributes.pt"
HISTORY_FILE = "history.jsonl"


class SinceVersion2(TypedDict, total=False):
    """What states of version 1 do not have."""

    metrics: dict[str, float]  # recorded at this very update, by name
    digests: dict[str, str]  # SHA-256 of every other file, by its path within the folder
    beginning: dict[str, Any]  # what the run began with, as `run/launches.py` makes it
    launches: list[dict[str, Any]]  # how each call of `train` of this run has read the data


class RunState(SinceVersion2):
    """What the trainer tells about a run."""

    run_id: str
    run_progress: ProgressState
    run_history: dict[str, Any]
    seed: int
    order_version: int  # of the function from seed and epoch to the order of the samples
    num_samples: int | None  # of the training data, None if unknown; to notice other data, like `launched`
    launched: Launched
    callbacks: list[str]
    attributes: list | None  # type: ignore[type-arg]  # names of those in attributes.pt; None in states that are older


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
    eval_sets_completed: int
    evaluation_told: bool
    evaluation_step_due: bool
    start_evaluated: bool
    scheduler_values_used: int
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


class Kind(enum.Enum):
    """What a folder is that is no state to continue from."""

    FOREIGN = enum.auto()
    """Nothing of accel, or not there."""
    UNFINISHED = enum.auto()
    """Not written to its end, or half removed."""
    DAMAGED = enum.auto()
    """It was a state once."""
    UNKNOWN_FORMAT = enum.auto()
    """Of another version of accel."""


@dataclasses.dataclass(frozen=True)
class NoState:
    """Why a path is no complete state."""

    kind: Kind
    reason: str
    """Follows the path in a sentence: "is damaged: ..."."""


def library_versions() -> dict[str, str]:
    """The versions that decide whether a run can be repeated bit-identically."""
    versions = {"accel": __version__, "torch": str(torch.__version__), "accelerate": accelerate.__version__}
    return {**versions, "python": platform.python_version()}


def process_file(process_index: int) -> str:
    """The name of the file of one process."""
    return f"process_{process_index:05d}.pt"


def model_files(state: Mapping[str, Any]) -> dict[str, Any]:
    """Files for a module's `state_dict()`: dense tensors, and apart what safetensors cannot hold."""
    metadata = {name: dict(value) for name, value in getattr(state, "_metadata", {}).items()}
    tensors = {name: value for name, value in state.items() if _fits_safetensors(value)}
    rest = {name: value for name, value in state.items() if name not in tensors}
    return {"model.safetensors": tensors, "model_extra.pt": {"entries": rest, "metadata": metadata}}


def _fits_safetensors(value: Any) -> bool:
    return is_dense(value) and value.dtype in DTYPES and not (value.is_quantized or value.is_complex())


def read_model_state(folder: Path) -> dict[str, Any]:
    """Return the `state_dict()` that was given to `model_files`, on the CPU; of shards the whole tensors."""
    if is_in_shards(folder):
        return read_whole_model(folder)
    extra = files.read_object(folder / "model_extra.pt", {"entries": dict, "metadata": dict})
    state = OrderedDict({**files.read_tensors(folder / "model.safetensors"), **extra["entries"]})
    state._metadata = extra["metadata"]  # type: ignore[attr-defined]
    return state


def read_parameters_held(folder: Path) -> Any:
    """Return names and shapes of what the optimizer held, by group; None in states of older versions."""
    if is_in_shards(folder):
        return read_rest(folder)["held"]
    return files.read_object(folder / "model_extra.pt", dict).get("held")


def read_optimizer_state(folder: Path) -> Any:
    """Return the `state_dict()` of the optimizer, on the CPU, with whole tensors."""
    is_spread = is_in_shards(folder)
    return read_whole_optimizer(folder) if is_spread else files.read_object(folder / "optimizer.pt")


def examine(path: Path) -> TrainerState | NoState:
    """Return what trainer_state.json says, or why `path` is no complete state.

    Reads that file and the sizes of the others.
    """
    if not path.is_dir():
        is_file = "is a file, but a training state is a folder; load_checkpoint reads an export"
        return NoState(Kind.FOREIGN, is_file if path.exists() else "does not exist")
    if path.name.endswith(".incomplete"):
        return NoState(Kind.UNFINISHED, "is incomplete: writing or removing it was interrupted")
    was_state = os.path.isfile(path / process_file(0))
    if not os.path.isfile(path / STATE_FILE):  # False too for what this user may not look into.
        entries = sorted(entry.name for entry in path.glob("*"))
        reason = f"has no {STATE_FILE}, but {entries[:5]}" if entries else f"has no {STATE_FILE}"
        return NoState(Kind.DAMAGED if was_state else Kind.FOREIGN, reason)
    content = _read_state_file(path, was_state)
    if isinstance(content, NoState):
        return content
    for name, size in content["files"].items():
        if _size_of(path / name) != size:
            return NoState(Kind.DAMAGED, f"is damaged: {name} is missing or has another size")
    return content


def _size_of(path: Path) -> int | None:
    """Return the bytes of a regular file; None for anything else. It may be removed at this very moment."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _read_state_file(path: Path, was_state: bool) -> TrainerState | NoState:
    """Return what the file says, once all that can be known from it alone is right."""
    try:
        text = (path / STATE_FILE).read_bytes()
    except OSError as error:
        return NoState(Kind.DAMAGED, f"has a damaged {STATE_FILE}: {type(error).__name__}: {error}")
    return parse_state_file(text, was_state)


def parse_state_file(text: bytes, was_state: bool) -> TrainerState | NoState:
    """Return what the text of trainer_state.json says, or why it is none.

    Args:
        was_state: the folder has other files of a state.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"has a damaged {STATE_FILE}: {type(error).__name__}: {error}"
        return NoState(Kind.DAMAGED, reason)
    is_own = isinstance(content, dict) and "format_version" in content
    if isinstance(content, dict) and not is_own and not was_state:
        return NoState(Kind.FOREIGN, f"has a {STATE_FILE}, but none of accel")
    # States of the first versions do not name the order of the data: there was one only. Nor have they
    # attributes.
    state = {"order_version": 1, "attributes": None, **content} if isinstance(content, dict) else {}
    complete_progress(state)
    version = state.get("format_version")
    if version not in (None, *range(1, FORMAT_VERSION + 1)) or isinstance(version, bool):
        known = f"not 1 to {FORMAT_VERSION}; use the version of accel that wrote it"
        return NoState(Kind.UNKNOWN_FORMAT, f"has the format {version!r:.40}, {known}")
    flaw = files.find_flaw(state, TrainerState) or find_wrong_value(state)
    if version != 1 and not files.is_sealed(text):
        flaw = f"it is not what was written, since its digest differs{f' ({flaw})' if flaw else ''}"
    if flaw:
        return NoState(Kind.DAMAGED, f"has a damaged {STATE_FILE}: {flaw}")
    return cast(TrainerState, state)


def is_sharded(state: TrainerState) -> bool:
    """Whether an engine has written files of its own, which may be many and large."""
    return any(name.startswith("engine/") for name in state["files"])


def find_mismatch(path: Path, state: TrainerState, names: Iterable[str] | None = None) -> str | None:
    """Return what is wrong with the content of files of a complete state, by their digests.

    None if nothing is.

    Args:
        names: of the files to read; None reads all of them.
    """
    digests = state.get("digests", {})
    for name in digests if names is None else names:
        if name in digests and digest_of_file(path / name) != digests[name]:
            return f"is damaged: {name} is not what was written, since its digest differs"
    return None


def is_same_state(path: str | Path, run_id: str, run_progress: Mapping[str, Any]) -> bool:
    """Whether a complete state of this run with the same progress stands at `path`."""
    state = examine(Path(path))
    if isinstance(state, NoState) or state["run_id"] != run_id:
        return False
    return all(dict(state["run_progress"])[key] == run_progress[key] for key in ORDER)


ORDER: tuple[str, ...] = (
    "updates_completed",
    "stage",
    "epochs_completed",
    "train_epoch_completed",
    "eval_epoch_completed",
    "eval_sets_completed",
    "evaluation_told",
    "start_evaluated",
    "run_completed",
)
"""What tells which of two states of a run is the newer one, the first difference first."""


def metrics_of(state: TrainerState) -> dict[str, float]:
    """Return the metrics that were recorded for the very weights of a state, by name."""
    if "metrics" in state:
        return state["metrics"]
    update = state["run_progress"]["updates_completed"]
    records = state["run_history"].get("records", [])
    # In an old state all of the history stands here.
    return {record["name"]: record["value"] for record in records if record["update"] == update}
