"""Which samples an update saw, and which updates saw a sample: computed from a training state alone.

The order is a function of seed and epoch. A state says how each call of `train` of its run has divided it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checks.values import check_path, check_whole_number, plain
from ..data.order import shard_of
from ..data.recorded_order import order_of_epoch, places_of
from ..errors import CheckpointError, ConfigurationError
from ..processes.group import DataGroup
from ..state.checkpoint import NoState, TrainerState, examine
from ..state.latest import latest_checkpoint
from ..text import counted


class _Stretch(NamedTuple):
    """The updates of one epoch that one call of `train` has made."""

    launch: Mapping[str, Any]
    first_update: int
    num_updates: int
    order_epoch: int
    firsts: range
    """Where each global step begins in the order of the epoch."""


def samples_of(state_or_folder: str | Path, update: int) -> list[int]:
    """Return the indices of the samples that `update` saw: those of the first process first.

    Args:
        state_or_folder: a training state, or a folder of them, of which the newest counts.
        update: its number, counted from 1 over all stages of the run.

    Raises:
        CheckpointError: there is no state, or it does not know the order of the data; the reason is named.
        ConfigurationError: `update` came after the state.
    """
    state = _open(state_or_folder)
    update = check_whole_number("update", update, "Updates are counted from 1.")
    completed = state["run_progress"]["updates_completed"]
    if update > completed:
        raise ConfigurationError(
            f"update is {update}, but the state was saved after update {completed}. Pass a later state."
        )
    stretch = next(each for each in _stretches(state) if update < each.first_update + each.num_updates)
    record, steps = stretch.launch["order"], stretch.launch["gradient_accumulation_steps"]
    order = order_of_epoch(record, state["seed"], stretch.order_epoch)
    begin = (update - stretch.first_update) * steps
    size = stretch.launch["num_processes"]
    indices: list[int] = []
    for index in range(size):
        for first in stretch.firsts[begin : begin + steps]:
            batch = order[first : first + stretch.firsts.step]
            indices += batch[shard_of(len(batch), DataGroup(size, index))].tolist()
    return indices


def updates_of(state_or_folder: str | Path, sample: int) -> list[int]:
    """Return the number of each update up to the state that saw `sample`, in their order.

    Args:
        state_or_folder: a training state, or a folder of them, of which the newest counts.
        sample: its index in the data set, from 0.

    Raises:
        CheckpointError: there is no state, or it does not know the order of the data; the reason is named.
        ConfigurationError: the data of the run had no such sample.
    """
    state = _open(state_or_folder)
    sample = plain(sample)
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise ConfigurationError(f"sample is {sample!r}, but must be an index of the data set, from 0.")
    stretches = list(_stretches(state))
    sizes = {_size_of_data(each.launch["order"]) for each in stretches}
    if sizes and sample >= max(sizes):
        raise ConfigurationError(
            f"sample is {sample}, but the data of the run had {counted(max(sizes), 'samples')}, counted from "
            "0."
        )
    updates: set[int] = set()
    for stretch in stretches:
        firsts, steps = stretch.firsts, stretch.launch["gradient_accumulation_steps"]
        for place in places_of(stretch.launch["order"], state["seed"], stretch.order_epoch, sample).tolist():
            step = (place - firsts.start) // firsts.step
            update = stretch.first_update + step // steps
            if 0 <= step < len(firsts) and update < stretch.first_update + stretch.num_updates:
                updates.add(update)
    return sorted(updates)


def _size_of_data(record: Mapping[str, Any]) -> int:
    return int(record.get("data", record["num_samples"]))


def _open(state_or_folder: Any) -> TrainerState:
    """Return the state that is meant, once it is known to say how its samples were chosen."""
    way_out = "Pass a training state, or the folder in which they are saved."
    path = check_path("state_or_folder", state_or_folder, way_out)
    state = examine(path)
    if isinstance(state, NoState):
        # The newest may go before it is read: a run that saves removes old ones.
        path = latest_checkpoint(path) or path
        state = examine(path)
    if isinstance(state, NoState):
        raise CheckpointError(f"'{path}' holds no complete training state. {way_out}")
    launches = state.get("launches", [])
    # A run that an older version began has launches that nobody has noted.
    if not launches or launches[0]["updates_completed"]:
        raise CheckpointError(
            f"'{path}' does not say how its run has read the data, since an older version began it. Replay "
            "the update: its result has the indices."
        )
    for launch in launches:
        if "unknown" in launch["order"]:
            raise CheckpointError(
                f"'{path}' does not know which samples were seen: {launch['order']['unknown']}. Replay the "
                "update: its result has the batch."
            )
    return state


def _stretches(state: TrainerState) -> Iterator[_Stretch]:
    """Yield all updates up to the state, epoch by epoch."""
    completed = state["run_progress"]["updates_completed"]
    launches = state["launches"]
    ends = [*(launch["updates_completed"] for launch in launches[1:]), completed]
    for launch, end in zip(launches, ends, strict=True):
        update = launch["updates_completed"] + 1
        order_epoch, position = launch["order_epoch"], launch["samples_completed_in_epoch"]
        while update <= end:
            firsts = _firsts_of(launch, position)
            num_updates = -(-len(firsts) // launch["gradient_accumulation_steps"])
            # The launch may have ended in mid-epoch.
            num_updates = min(num_updates, end - update + 1)
            yield _Stretch(launch, update, num_updates, order_epoch, firsts)
            update += num_updates
            order_epoch, position = order_epoch + 1, 0


def _firsts_of(launch: Mapping[str, Any], position: int) -> range:
    """Return where each global step of an epoch begins, from the sample `position` on."""
    record = launch["order"]
    step_size = record["batch_size"] * launch["num_processes"]
    end = record["num_samples"] - (step_size - 1 if record["drop_last"] else 0)
    firsts = range(position, end, step_size)
    if record["max_steps"] is None:
        return firsts
    # The limit counts from the beginning of the epoch.
    return firsts[: max(record["max_steps"] - -(-position // step_size), 0)]
