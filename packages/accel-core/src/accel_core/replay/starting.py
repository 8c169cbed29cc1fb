"""Chooses what a replay begins with: the nearest training state before the update, or the trainer itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checks.values import check_path, check_whole_number
from ..errors import CheckpointError
from ..state.checkpoint import TrainerState
from ..state.folder import complete_checkpoints


@dataclasses.dataclass(frozen=True)
class ReplayStart:
    """Holds what a replay begins with."""

    update: int
    """The one to replay, counted from 1 over all stages."""
    folder: Path | None
    """Of the state to begin with; None for the trainer's own weights."""
    state: TrainerState
    """That of `folder`, or the oldest of the run, which knows how the run began."""
    launch: Mapping[str, Any]
    """How the call of `train` has read the data that made the update."""
    begins_stage: bool = False
    """The state is the end of the stage before that of the update."""


def choose_replay_start(folder: Any, update: Any) -> ReplayStart:
    """Return what the replay of `update` begins with.

    Args:
        folder: in which the run has saved its states.
        update: counted from 1 over all stages.

    Raises:
        CheckpointError: the folder holds no state of use.
    """
    update = check_whole_number("update", update, "Updates are counted from 1.")
    path = check_path("folder", folder, "Pass the folder in which the run has saved its training states.")
    states = complete_checkpoints(path)
    if not states:
        raise CheckpointError(
            f"'{path}' holds no complete training state, so nothing says how the run was. Pass the folder in "
            "which SaveTrainingStateCallback has saved."
        )
    before = [each for each in states.items() if each[1]["run_progress"]["updates_completed"] < update]
    after = [each for each in states.items() if each not in before]
    # The first state after the update knows how it was made.
    knowing = (after or before[-1:])[0][1]
    launches = _launches_of(knowing, update)
    launch = launches[-1]
    if not before:
        _check_knows_beginning(path, knowing, launches, update)
        return ReplayStart(update, None, knowing, launch)
    found, state = before[-1]
    saved_at = state["run_progress"]["updates_completed"]
    _check_same_launch(found, saved_at, launches, update)
    if launch["stage"] == state["run_progress"]["stage"]:
        return ReplayStart(update, found, state, launch)
    began_at = min(each["updates_completed"] for each in launches if each["stage"] == launch["stage"])
    if saved_at == began_at:
        return ReplayStart(update, found, state, launch, begins_stage=True)
    raise CheckpointError(
        f"update {update} is of stage {launch['stage']} of its run, which began after update {began_at}. The "
        f"newest state before it, '{found}', was saved after update {saved_at} of the stage before. "
        "Replay an update after the first state of that stage, and let later runs save at the end of each "
        "stage."
    )


def _launches_of(state: TrainerState, update: int) -> list[dict[str, Any]]:
    """Return the launches up to the one that made `update`; of an older version's state one that is known."""
    launches = [each for each in state.get("launches", []) if each["updates_completed"] < update]
    if launches:
        return launches
    progress, launched = state["run_progress"], state["launched"]
    return [
        {
            "stage": progress["stage"],
            "updates_completed": progress["updates_before_stage"],
            "num_processes": launched["num_processes"],
            "gradient_accumulation_steps": launched["gradient_accumulation_steps"],
            "order": {"unknown": "an older version has saved the state"},
        }
    ]


def _check_same_launch(
    found: Path, saved_at: int, launches: Sequence[Mapping[str, Any]], update: int
) -> None:
    """Raise if the run went on in another way between the state and the update."""
    ways = {
        (each["num_processes"], each["gradient_accumulation_steps"], str(each["order"]))
        # The launch in which the state was saved has gone on from it, or the one that resumed from it.
        for each, following in zip(launches, [*launches[1:], None], strict=True)
        if following is None or following["updates_completed"] > saved_at
    }
    if len(ways) > 1:
        raise CheckpointError(
            f"update {update} cannot be replayed from '{found}', saved after update {saved_at}: after update "
            f"{launches[-1]['updates_completed']} the run went on with other processes, batches or data, and "
            "no state from there is left. Keep the states that runs are resumed from."
        )


def _check_knows_beginning(
    path: Path, oldest: TrainerState, launches: Sequence[Mapping[str, Any]], update: int
) -> None:
    """Raise if the replay cannot begin where the run began."""
    first = oldest["run_progress"]["updates_completed"]
    way_out = f"Replay an update after {first}, the first that has a state before it."
    if len(launches) > 1:
        raise CheckpointError(
            f"'{path}' holds no state before update {update}, and the run was interrupted before it. "
            f"{way_out}"
        )
    if "weights" not in oldest.get("beginning", {}):
        raise CheckpointError(
            f"'{path}' holds no state before update {update}, and its oldest one does not say with which "
            "weights the run began: an older version saved it, or an engine that spreads the parameters. "
            f"{way_out}"
        )
