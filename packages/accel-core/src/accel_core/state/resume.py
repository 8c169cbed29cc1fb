"""What a resumed run takes over from a training state, also on another number of processes.

And portable exports.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.loader import ShardedDataLoader
from ..errors import ConfigurationError
from ..run.loss_tracker import LossTrackerState
from . import files
from .checkpoint import RunState, TrainerState, process_file

_PLACE = {
    "random": dict,
    "train_loss": LossTrackerState,
    "train_logs": dict,
    "callbacks": dict,
    "trainer": dict,
    "data": object,
}


def read_resume_point(
    folder: Path, process_index: int, num_processes: int, saved_processes: int
) -> dict[str, Any]:
    """The state of this process at its place in the loop.

    On another number of processes everyone gets the callbacks' state of the main process, the main process
    all the sums of the losses, and nobody a random state or the position of iterable data.
    """
    if num_processes == saved_processes:
        return files.read_object(folder / process_file(process_index), _PLACE)  # type: ignore[no-any-return]
    places = [files.read_object(folder / process_file(index), _PLACE) for index in range(saved_processes)]
    is_main = process_index == 0
    logs: dict[str, Any] = {}
    for place in places:
        for name, part in place["train_logs"].items():
            logs[name] = _add(part, logs.get(name))
    losses = None
    for place in places:
        losses = _add(place["train_loss"], losses)
    nothing = {"total": 0.0, "count": 0.0}
    sums = {"train_loss": losses if is_main else nothing, "train_logs": logs if is_main else {}}
    return {**places[0], **sums, "random": None, "data": None}


def _add(part: dict[str, float], other: dict[str, float] | None) -> dict[str, float]:
    return part if other is None else {key: part[key] + other[key] for key in part}


def compare(saved: TrainerState, now: RunState, callbacks: Iterable[str], has_scheduler: bool) -> list[str]:
    """Sentences about what differs between the run that was saved and the one that goes on with `callbacks`.

    Raises:
        ConfigurationError: the position in the data means nothing for the data of this run.
    """
    before, after = saved["launched"], now["launched"]
    position = saved["run_progress"]["samples_completed_in_epoch"]
    told = []
    if saved["num_samples"] != now["num_samples"]:
        if position:
            raise ConfigurationError(
                f"train_dataset has {now['num_samples']} samples, but the state was saved after {position} "
                f"of {saved['num_samples']} samples of an epoch. Resume with the same data, or start a new "
                "run from an export with load_checkpoint."
            )
        told.append(f"The data has changed from {saved['num_samples']} to {now['num_samples']} samples.")
    if before["num_processes"] != after["num_processes"]:
        told.append(
            f"The run goes on with {after['num_processes']} instead of {before['num_processes']} processes, "
            "with the next sample. Random numbers of dropout and augmentation, and metrics so far in this "
            "epoch, cannot be carried over."
        )
    plan = (
        " (the saved scheduler keeps its own plan)"
        if has_scheduler and "scheduler.pt" in saved["files"]
        else ""
    )
    for key, what in (
        ("per_device_batch_size", "samples by process and step"),
        ("gradient_accumulation_steps", "steps an update"),
        ("num_update_steps", f"updates in all{plan}"),
    ):
        if before[key] != after[key]:  # type: ignore[literal-required]
            told.append(f"The run goes on with {after[key]} instead of {before[key]} {what}.")  # type: ignore[literal-required]
    changed = [
        f"{name} {before['versions'][name]} → {version}"
        for name, version in after["versions"].items()
        if before["versions"].get(name) != version
    ]
    if changed:
        told.append(f"Versions have changed, so the last bits may differ: {', '.join(changed)}.")
    if "scheduler.pt" in saved["files"] and not has_scheduler:
        told.append("The state of the scheduler is dropped, since this run has none.")
    missing = [name for name in saved["callbacks"] if name not in callbacks]
    if missing:
        told.append(f"The state of {missing} is dropped, since this run has no such callbacks.")
    if added := [name for name in now["callbacks"] if name not in saved["callbacks"]]:
        told.append(f"The callbacks {added} begin anew, since the saved run had no state of theirs.")
    return told


def limits_of_exactness(
    loader: ShardedDataLoader, eval_loader: ShardedDataLoader | None, saved: RunState, seed_each_sample: bool
) -> list[str]:
    """Sentences about the data in which the run that goes on may differ from one that was never stopped."""
    told, (skipped, rest) = [], divmod(saved["run_progress"]["samples_completed_in_epoch"], loader.step_size)
    if loader.sampler is None:
        has_position = (
            loader.stateful_source is not None and saved["launched"]["num_processes"] == loader.num_processes
        )
        name = type(loader.dataset).__name__
        if skipped and not has_position:
            told.append(f"Reading and leaving out {skipped} batches of {name}, on which it has trained.")
        if rest and not has_position and getattr(loader.loader, "num_workers", 0):
            told.append(f"Up to {rest} samples of {name} come twice, since workers read whole batches.")
        if skipped:
            told.append(f"Random numbers that {name} draws while it is read will differ.")
    elif not loader.sampler.order.is_function_of_epoch:
        sampler = type(loader.sampler.order.sampler).__name__
        told.append(
            f"The order is the business of {sampler}: it has no set_epoch, so samples may come twice or not "
            "at all."
        )
    has_workers = any(
        getattr(each.loader, "num_workers", 0) for each in (loader, eval_loader) if each is not None
    )
    if has_workers and not seed_each_sample:
        told.append(
            "Random numbers that the data set draws in workers will differ. Use seed_each_sample=True to "
            "repeat them."
        )
    return told
