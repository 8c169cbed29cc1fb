"""The methods of `Trainer` that prove what a run did. What they need is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .replay.result import ReplayResult


def replay(
    self: Any,
    train_dataset: Any,
    num_epochs: int | None = None,
    *,
    update: int,
    folder: str | Path,
    callbacks: Any = (),
    layers: bool = False,
    **arguments: Any,
) -> ReplayResult:
    """Train a copy of the trainer up to a past update, bit-equal, and stop before the parameters change.

    It begins with the nearest complete training state before, or with the trainer's own weights if the run
    began with them. Nothing is written; the trainer and all random numbers stay as they are. As many
    processes as made the update replay it together, and all get the result. A single one replays what several
    did. If they were more than two, it is equal up to rounding, as `messages` of the result tells.

    Args:
        train_dataset: as `num_epochs` and all further arguments, what `train` was given.
        update: its number, counted from 1 over all stages of the run.
        folder: in which the run has saved its training states.
        callbacks: further ones, for the replay alone, which see the steps of all processes. Of the trainer's
            own, copies take part whose class has `runs_in_replay`.
        layers: keep what each layer returns in the update.

    Raises:
        CheckpointError: the folder has no state to begin with.
        ConfigurationError: an argument is not that of the run, or a part of the trainer cannot be copied.
    """
    from .replay.replaying import replay_update

    given = {"train_dataset": train_dataset, "num_epochs": num_epochs, **arguments}
    return replay_update(self, update, folder, callbacks, layers, **given)


def run_card(self: Any) -> dict[str, Any]:
    """Return what the latest training run was made of, and what is needed to repeat it, ready for JSON.

    Versions, hardware, settings of torch, the trainer's parts, the arguments of `train`, length and digest
    of the first samples of each data set, seed and order, digests of how the run began, what each call of
    `train` was and how often it was interrupted, the latest metrics, and the training states with
    digests. `to_repeat` says it in sentences. `SaveTrainingStateCallback` writes the same as
    `run_card.json`, and `compare_runs` reads that.

    The first samples are read once a run, on each process that asks, with random numbers of their own.

    Raises:
        ConfigurationError: `train` was not called yet.
    """
    from .run.card import create_card

    return create_card(self)
