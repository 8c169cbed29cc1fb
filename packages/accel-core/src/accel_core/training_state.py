"""What a checkpoint folder holds, and how it comes to be complete or absent.

    trainer_state.json     what a person wants to know; written last, with the sizes of the other files
    model.safetensors      the parameters and buffers; model_extra.pt: what else the model's state has
    optimizer.pt  scheduler.pt  scaler.pt  extra.pt
    process_00000.pt ...   of each process: random state, loss so far, callbacks, position of iterable data
    engine/                sharded states, written by Accelerate

`<name>.incomplete` is being written or removed and is never read. `<name>.replaced` was complete when a newer state took
its name, and goes once that one stands.
"""

from __future__ import annotations

import logging
import platform
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import accelerate
import numpy as np
import torch

from . import durable_files
from .__about__ import __version__
from .errors import AccelError, CheckpointError, ConfigurationError

FORMAT_VERSION = 1
STATE_FILE = "trainer_state.json"
_OWN_NAMES = re.compile(r"trainer_state\.json|model\.safetensors|\w+\.pt|engine")
_ORDER = ("updates_completed", "epochs_completed", "train_epoch_completed", "eval_epoch_completed")
_logger = logging.getLogger("accel_core")


class RunState(TypedDict):
    """What the trainer tells about a run."""

    run_id: str
    run_progress: dict[str, Any]  # the fields of RunProgress
    run_history: dict[str, Any]
    seed: int
    num_samples: int | None  # of the training data, None where unknown; to notice other data, as `launched` is to compare
    launched: Launched
    callbacks: list[str]


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
    extra = durable_files.read_object(folder / "model_extra.pt")
    state = OrderedDict({**durable_files.read_tensors(folder / "model.safetensors"), **extra["entries"]})
    state._metadata = extra["metadata"]  # type: ignore[attr-defined]
    return state


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all global generators of this process, of python, numpy, torch and `device`, as plain values."""
    numpy_state = np.random.get_state(legacy=False)
    inner = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in numpy_state["state"].items()}
    state = {"python": random.getstate(), "numpy": {**numpy_state, "state": inner}, "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` returned; the generator of `device` only if it was saved on the same kind."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


def save_folder(
    path: str | Path,
    state: RunState,
    create_main_files: Callable[[], Mapping[str, Any]],
    create_process_state: Callable[[], Mapping[str, Any]],
    *,
    process_index: int,
    gather: Callable[[Any], Sequence[Any]],
    write_engine: Callable[[Path], object] | None = None,
) -> bool:
    """Write a checkpoint folder. Every process takes part, and either all of them return or all raise.

    Args:
        path: of the folder. A state of the same run that is there gives way once the new one is complete.
        state: for trainer_state.json; that of the main process counts.
        create_main_files: called on the main process; contents by file name: tensors for `.safetensors`, else plain.
        create_process_state: returns what this process keeps in its own file.
        process_index: 0 is the main process.
        gather: returns the values of all processes in their order, once all have called it.
        write_engine: called on every process with the folder in which an engine writes its own files.

    Returns:
        Whether something was written: not if this state stands there already.

    Raises:
        CheckpointError: what failed and on which process; the checkpoints before are as they were.
        ConfigurationError: the same for a state that cannot be saved.
    """
    path, is_main = Path(path).absolute(), process_index == 0
    aside = _beside(path, ".incomplete")

    def together(action: Callable[[], object], takes_part: bool = True) -> list[bool]:
        outcome, cause = False, None
        try:
            outcome = bool(takes_part and action())
        except Exception as error:
            cause = error
        told = cause and (str(cause) if isinstance(cause, AccelError) else f"{type(cause).__name__}: {cause}")
        gathered = gather((outcome, told, isinstance(cause, ConfigurationError)))
        failed = {f"Process {i}: {text}": is_users for i, (_, text, is_users) in enumerate(gathered) if text is not None}
        if not failed:
            return [outcome for outcome, _, _ in gathered]
        if is_main:
            remove_checkpoint(aside)
        kind = ConfigurationError if all(failed.values()) else CheckpointError
        raise kind(f"The training state was not saved to '{path}'. {' '.join(failed)}") from cause

    def write_own_files() -> None:
        if not aside.is_dir():
            raise CheckpointError(f"'{aside}' is not there. On several machines it has to be on a disk that they share.")
        for name, content in (create_main_files() if is_main else {}).items():
            is_tensors = name.endswith(".safetensors")
            (durable_files.write_tensors if is_tensors else durable_files.write_object)(aside / name, content)
        durable_files.write_object(aside / process_file(process_index), create_process_state())

    if together(lambda: _prepare(path, state), is_main)[0]:
        return False
    num_processes = len(together(write_own_files))
    if write_engine is not None:
        together(lambda: write_engine(aside / "engine"))
    together(lambda: _publish(path, state, num_processes), is_main)
    return True


def _prepare(path: Path, state: RunState) -> bool:
    """Make the folder to write to. Returns whether `state` stands at `path` already."""
    if is_same_state(path, state["run_id"], state["run_progress"]):
        return True
    if path.exists() and not ((path / STATE_FILE).exists() or _is_ours(path)):
        raise CheckpointError(f"'{path}' is no folder of a training state. Choose an empty or a new folder.")
    _refuse_other_run(path, _read(path), state["run_id"])
    durable_files.make_folder(path.parent)
    for leftover in filter(_is_ours, path.parent.glob("*.incomplete")):
        remove_checkpoint(leftover)
    _remove_replaced(path.parent)
    durable_files.make_folder(_beside(path, ".incomplete"))
    return False


def _publish(path: Path, state: RunState, num_processes: int) -> None:
    aside, replaced = _beside(path, ".incomplete"), _beside(path, ".replaced")
    if missing := [name for name in map(process_file, range(num_processes)) if not (aside / name).exists()]:
        raise CheckpointError(f"'{aside}' has no {missing}. On several machines it has to be on a disk that they share.")
    entries = sorted(aside.rglob("*"))
    for entry in entries:
        if entry.relative_to(aside).parts[0] == "engine":
            durable_files.sync(entry)
    files = {entry.relative_to(aside).as_posix(): entry.stat().st_size for entry in entries if entry.is_file()}
    durable_files.write_json(aside / STATE_FILE, {"format_version": FORMAT_VERSION, **state, "files": files})
    durable_files.sync(aside)
    try:
        if isinstance(_check(path), dict):
            durable_files.rename(path, replaced)
        elif path.exists():
            durable_files.remove_folder(path)
        durable_files.rename(aside, path)
    except OSError:
        if replaced.exists() and not path.exists():
            durable_files.rename(replaced, path)
        raise
    _remove_replaced(path.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a folder so that no half of it ever looks complete. What the disk refuses is left to the next save."""
    aside = path if path.name.endswith(".incomplete") else _beside(path, ".incomplete")
    try:
        if aside.exists():
            durable_files.remove_folder(aside)
        if path.exists():
            durable_files.rename(path, aside)
            durable_files.remove_folder(aside)
    except OSError as error:
        _logger.warning("'%s' could not be removed: %s", path, error)


def complete_checkpoints(folder: str | Path) -> dict[Path, TrainerState]:
    """Return the complete states directly inside `folder`, oldest first; logs what it passes over."""
    found = {}
    for path in filter(Path.is_dir, Path(folder).glob("*")):
        state = _check(path)
        if not isinstance(state, str):
            found[path] = state
        elif _is_ours(path):
            _logger.warning("'%s' is passed over: it %s.", path, state)

    def age(path: Path) -> tuple[object, ...]:
        return (*(found[path]["run_progress"][key] for key in _ORDER), not path.name.endswith(".replaced"), path.name)

    return {path: found[path] for path in sorted(found, key=age)}


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete state directly inside `folder`; None if there is none or no folder."""
    if isinstance(_check(Path(folder)), dict):
        _logger.warning("'%s' is itself a training state: give it to resume_from as it is.", folder)
    return next(reversed(complete_checkpoints(folder)), None)


def open_training_state(path: str | Path) -> TrainerState:
    """Return what trainer_state.json says. Raises `CheckpointError` if `path` is no complete state: what it is instead."""
    path = Path(path)
    state = _check(path)
    if not isinstance(state, str):
        return state
    newest = latest_checkpoint(path) or latest_checkpoint(path.parent)
    raise CheckpointError(f"'{path}' {state}." + (f" Did you mean '{newest}'?" if newest else ""))


def is_same_state(path: str | Path, run_id: str, run_progress: Mapping[str, Any]) -> bool:
    """Whether a complete state of this run with the same progress stands at `path`."""
    state = _check(Path(path))
    if isinstance(state, str) or state["run_id"] != run_id:
        return False
    return all(state["run_progress"][key] == run_progress[key] for key in _ORDER)


def check_run_id(save_dir: str | Path, run_id: str) -> None:
    """Raise `CheckpointError` if `save_dir` holds states of another run."""
    for path, state in complete_checkpoints(save_dir).items():
        _refuse_other_run(path, state, run_id)


def _refuse_other_run(path: Path, state: Mapping[str, Any], run_id: str) -> None:
    if state.get("run_id", run_id) != run_id:
        raise CheckpointError(
            f"'{path}' is a state of the run {state['run_id']!r}, but this is the run {run_id!r}. Choose another folder, or "
            f"go on with that run by resume_from='{path}'."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = durable_files.read_json(path / STATE_FILE)
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def _check(path: Path) -> TrainerState | str:
    """Return what trainer_state.json says, or why `path` is no complete state."""
    if not path.is_dir():
        is_file = "is a file, but a training state is a folder; load_checkpoint reads an export"
        return is_file if path.exists() else "does not exist"
    if path.name.endswith(".incomplete"):
        return "was not written to its end, or is half removed"
    if not (path / STATE_FILE).exists():
        return f"has no {STATE_FILE}"
    state = _read(path)
    if state.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return f"has the format {state['format_version']}, not {FORMAT_VERSION}; use the version of accel that wrote it"
    progress, files = state.get("run_progress"), state.get("files")
    is_whole = TrainerState.__required_keys__ <= state.keys() and isinstance(progress, dict) and isinstance(files, dict)
    if not is_whole or not all(isinstance(progress.get(key), int) for key in _ORDER):
        return f"has a damaged {STATE_FILE}"
    for name, size in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            return f"is damaged: {name} is missing or has another size"
    return cast(TrainerState, state)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and all(_OWN_NAMES.fullmatch(entry.name) for entry in path.iterdir())


def _remove_replaced(folder: Path) -> None:
    for replaced in filter(_is_ours, folder.glob("*.replaced")):
        if isinstance(_check(replaced.with_name(replaced.name.removesuffix(".replaced"))), dict):
            remove_checkpoint(replaced)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)
