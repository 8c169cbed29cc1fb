"""What a resumed run takes over from a training state, also on another number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from ..text import counted
from . import files
from .checkpoint import RunState, TrainerState, process_file


class LossSums(TypedDict):
    """The state of a `LossTracker`."""

    total: float
    count: float


class ProcessState(TypedDict):
    """What each process keeps in a file of its own."""

    random: dict[str, Any]
    train_loss: LossSums
    train_logs: dict[str, Any]
    callbacks: dict[str, Any]
    trainer: dict[str, Any]
    data: object


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """What the loop still has to restore, once it is at the place where the state was saved."""

    folder: Path
    process_state: dict[str, Any]
    """As `ProcessState`; `random` and `data` are None if the state is of another number of processes."""


def read_resume_point(folder: Path, group: DataGroup, saved_processes: int) -> ResumePoint:
    """Return what this process has to restore.

    On another number of processes everyone gets the callbacks' state of the main process, the main process
    all the sums of the losses, and nobody a random state or the position of iterable data.
    """
    if group.size == saved_processes:
        return ResumePoint(folder, files.read_object(folder / process_file(group.index), ProcessState))
    states = [
        files.read_object(folder / process_file(index), ProcessState) for index in range(saved_processes)
    ]
    logs: dict[str, Any] = {}
    losses = None
    for state in states:
        losses = _add(state["train_loss"], losses)
        for name, part in state["train_logs"].items():
            logs[name] = _add(part, logs.get(name))
    sums = {
        "train_loss": losses if group.is_main else {"total": 0.0, "count": 0.0},
        "train_logs": logs if group.is_main else {},
    }
    return ResumePoint(folder, {**states[0], **sums, "random": None, "data": None})


def _add(part: dict[str, float], other: dict[str, float] | None) -> dict[str, float]:
    return part if other is None else {key: part[key] + other[key] for key in part}


def compare(saved: TrainerState, now: RunState, callbacks: Iterable[str], has_scheduler: bool) -> list[str]:
    """Return messages about what differs between the saved run and the one that continues with `callbacks`.

    Raises:
        ConfigurationError: the position in the data means nothing for the data of this run.
    """
    return [
        *_compare_data(saved, now),
        *_compare_launches(saved, now, keeps_schedule=has_scheduler and "scheduler.pt" in saved["files"]),
        *_compare_parts(saved, now, list(callbacks), has_scheduler),
    ]


def _compare_data(saved: TrainerState, now: RunState) -> Iterator[str]:
    if saved["num_samples"] == now["num_samples"]:
        return
    position = saved["run_progress"]["samples_completed_in_epoch"]
    if position:
        raise ConfigurationError(
            f"train_dataset has {counted(str(now['num_samples']), 'samples')}, but the state was saved after "
            f"{position} of {counted(str(saved['num_samples']), 'samples')} of an epoch. Resume with the "
            "same data, or start a new run from an export with load_checkpoint."
        )
    samples = counted(str(now["num_samples"]), "samples")
    yield f"The data has changed from {saved['num_samples']} to {samples}."


def _compare_launches(saved: TrainerState, now: RunState, keeps_schedule: bool) -> Iterator[str]:
    before: dict[str, Any] = dict(saved["launched"])
    after: dict[str, Any] = dict(now["launched"])
    if before["num_processes"] != after["num_processes"]:
        yield (
            f"The run resumes on {after['num_processes']} instead of "
            f"{counted(before['num_processes'], 'processes')}, at the next sample. Random numbers of dropout "
            "and augmentation, and metrics so far in this epoch, cannot be carried over."
        )
    plan = " (the saved scheduler keeps its own plan)" if keeps_schedule else ""
    for key, what in (
        ("per_device_batch_size", "samples per process and step"),
        ("gradient_accumulation_steps", "steps per update"),
        ("num_update_steps", f"updates in all{plan}"),
    ):
        if before[key] != after[key]:
            yield f"The run continues with {after[key]} instead of {before[key]} {what}."
    yield from versions_changed(before["versions"], after["versions"])


def versions_changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return a sentence that names the libraries whose versions differ, if any do."""
    changed = [
        f"{name} {before.get(name)} → {version}"
        for name, version in after.items()
        if before.get(name) != version
    ]
    return [f"Versions have changed, so the last bits may differ: {', '.join(changed)}."] if changed else []


def _compare_parts(
    saved: TrainerState, now: RunState, callbacks: list[str], has_scheduler: bool
) -> Iterator[str]:
    if "scheduler.pt" in saved["files"] and not has_scheduler:
        yield "The state of the scheduler is dropped, since this run has none."
    missing = [name for name in saved["callbacks"] if name not in callbacks]
    if missing:
        yield f"The state of {missing} is dropped, since this run has no such callbacks."
    added = [name for name in now["callbacks"] if name not in saved["callbacks"]]
    if added:
        yield f"The callbacks {added} start from scratch, since the training state has nothing for them."
