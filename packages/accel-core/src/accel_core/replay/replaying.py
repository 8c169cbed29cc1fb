"""Trains a copy of a trainer up to a past update, and stops before the parameters change."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..callbacks.callback_list import CallbackList
from ..checks.arguments import check_trainable
from ..checks.values import check_flag
from ..data.recorded_order import record_order
from ..engines.single import SingleProcess
from ..errors import CheckpointError, ConfigurationError
from ..processes.collectives import all_gather_object, run_on_main
from ..processes.group import DataGroup
from ..run.entering import check_can_run
from ..run.run_progress import RunProgress
from ..run.train_arguments import TrainArguments
from ..run.trial import trial_of
from ..state.checkpoint import library_versions
from ..state.resume import versions_changed
from ..text import counted
from .callbacks import Recorder, ReplayCallbacks, UpdateReached, copy_callbacks
from .in_turn import InTurn, OtherProcess
from .result import ReplayResult
from .starting import ReplayStart, choose_replay_start

_SET_BY_REPLAY = ("resume_from", "reset_run_history")


@dataclasses.dataclass
class ReplayState:
    """Holds what the copied trainer knows of its replay."""

    start: ReplayStart
    watchers: CallbackList
    """See the steps of all processes."""
    others: list[OtherProcess] = dataclasses.field(default_factory=list)
    buffers: list[Any] = dataclasses.field(default_factory=list)
    """Of the model before the first step of the current update, on several processes."""


class Replaying:
    """Is mixed into the copy of a trainer that replays."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing: what a replay cannot promise stands in its result."""

    def run_training(self: Any) -> None:
        """Check that all is as it was in the run, before the first step."""
        start, run = self.replaying.start, self._run
        _check_data(self, run, start)
        if start.folder is None:
            # The digest of the weights is made on the main process, and other processes have other random
            # states.
            run_on_main(lambda: _check_beginning(run.beginning, start), self.is_main_process)
        super().run_training()  # type: ignore[misc]


class ReplayingInTurn(Replaying, InTurn):
    """Is mixed into the copy of a trainer that replays what several processes did."""


def replay_update(
    trainer: Any,
    update: int,
    folder: str | Path,
    callbacks: Iterable[Any] = (),
    layers: bool = False,
    **given: Any,
) -> ReplayResult:
    """Do what `Trainer.replay` promises.

    Args:
        callbacks: further ones, for this replay alone.
        layers: keep what each layer has returned.
        given: the arguments of `train`.
    """
    check_can_run(trainer, "replay")
    check_flag("layers", layers)
    _check(trainer, given)
    start: ReplayStart = run_on_main(lambda: choose_replay_start(folder, update), trainer.is_main_process)
    _check_processes(trainer, start)
    recorder = Recorder(start.update, layers)
    dataset = given["train_dataset"]
    # A callback may hold these, and they are not copied with it.
    shared = (dataset, given.get("eval_dataset"), trainer.accelerator, trainer.engine)
    memo: dict[int, Any] = {id(each): each for each in shared}
    is_in_turn = start.launch["num_processes"] != trainer.engine.group.size
    mixin = ReplayingInTurn if is_in_turn else Replaying
    with trial_of(trainer, dataset, recorder, mixin, memo) as trial:
        _take_part(trial, trainer, start, memo, recorder, callbacks)
        try:
            trial.train(**given, **_go_to_start(trial, start))
        except UpdateReached:
            return _result(recorder, start, trial)
        ended_at = trial.run_progress.updates_completed
    raise ConfigurationError(
        f"update is {update}, but with these arguments the run ends after update {ended_at}. Pass what train "
        "was given, and an update that it made."
    )


def _check(trainer: Any, given: Mapping[str, Any]) -> None:
    """Raise before anything is copied."""
    for name in _SET_BY_REPLAY:
        if name in given:
            raise ConfigurationError(
                f"replay was given {name}, but chooses the state and the stage by itself. Leave it out."
            )
    # Made for its checks alone, so that a mistake is reported before anything is copied.
    TrainArguments(**given)
    check_trainable(trainer.model, trainer.optimizer, vars(trainer))


def _check_processes(trainer: Any, start: ReplayStart) -> None:
    """Raise unless one process replays, or as many as have made the update."""
    group, then = trainer.engine.group, start.launch["num_processes"]
    if trainer.engine.shards_parameters or group.processes_per_copy > 1:
        raise ConfigurationError(
            f"replay trains a copy of the model, but {trainer.engine.name} spreads the model over the "
            "processes, where it cannot be copied. Call it in a script that runs without that engine."
        )
    if group.size not in (1, then):
        or_alone = ", or on a single one, which takes their batches in turn" if then > 1 else ""
        raise ConfigurationError(
            f"replay was called on {counted(group.size, 'processes')}, but {then} made update "
            f"{start.update}. Start the script on {then}{or_alone}."
        )


def _take_part(
    trial: Any,
    trainer: Any,
    start: ReplayStart,
    memo: dict[int, Any],
    recorder: Recorder,
    callbacks: Iterable[Any],
) -> None:
    """Give the copied trainer copies of all that takes part: callbacks, and containers of a subclass."""
    memo[id(trainer.run_history)] = trial.run_history
    memo[id(trainer.callbacks)] = trial.callbacks
    for name, value in vars(trainer).items():
        # In place changes of a subclass's own would else be those of the trainer.
        if type(value) in (list, dict, set, deque):
            setattr(trial, name, copy.deepcopy(value, memo))
    further = ReplayCallbacks(callbacks, trial)
    trial.callbacks = ReplayCallbacks([*copy_callbacks(trainer.callbacks, memo), *further, recorder], trial)
    trial.replaying = ReplayState(start, ReplayCallbacks([*further, recorder], trial))
    num_processes = start.launch["num_processes"]
    if num_processes != trainer.engine.group.size:
        trial._engine = SingleProcess(trial.accelerator, DataGroup(num_processes, 0))
    # What the run began with was drawn from the seed, or is replaced by the state.
    trial.is_seeded = False
    trial.run_id = None


def _go_to_start(trial: Any, start: ReplayStart) -> dict[str, Any]:
    """Let the copied trainer stand where its next call of `train` begins, and return what that call needs."""
    if start.folder is None:
        order_epoch = start.state["beginning"]["order_epoch"]
        trial.run_progress = RunProgress(order_epoch=order_epoch)
        return {}
    if start.begins_stage:
        trial.load_training_state(start.folder)
        return {"reset_run_history": False}
    stage = start.state["run_progress"]["stage"]
    if stage == 1:
        return {"resume_from": start.folder}
    # The calls of the stages before have done nothing, as in a script that is started again.
    trial.run_id = start.state["run_id"]
    trial.run_progress = RunProgress(stage=stage - 1, stage_skipped=True)
    return {"resume_from": start.folder, "reset_run_history": False}


def _check_data(trial: Any, run: Any, start: ReplayStart) -> None:
    """Raise if the data is not read as it was."""
    saved, own = start.launch["order"], record_order(run.loader_to_train)
    before = {**saved, "gradient_accumulation_steps": start.launch["gradient_accumulation_steps"]}
    now = {**own, "gradient_accumulation_steps": trial.run_config.gradient_accumulation_steps}
    if "unknown" in saved:
        before.pop("unknown")
    differing = [
        f"{name} is {now.get(name)!r}, but was {value!r}"
        for name, value in before.items()
        if now.get(name) != value
    ]
    if differing:
        raise ConfigurationError(
            f"The data of update {start.update} was read in another way: {'; '.join(differing)}. Pass what "
            "train was given."
        )


def _check_beginning(own: Mapping[str, Any], start: ReplayStart) -> None:
    """Raise if the trainer does not hold what the run began with."""
    saved = start.state["beginning"]
    for name, what in (
        ("weights", "its model has other weights. Make the trainer as for the run, without training it"),
        (
            "random",
            "its random state is another one. Give the trainer the seed of the run; if it had none, replay "
            "an update after its first state",
        ),
    ):
        if own.get(name) != saved.get(name):
            raise CheckpointError(
                f"No state was saved before update {start.update}, so the replay begins with the trainer "
                f"itself, which is not as the run began: {what}."
            )


def _result(recorder: Recorder, start: ReplayStart, trial: Any) -> ReplayResult:
    """Return what was recorded."""
    for name, parameter in recorder.model.named_parameters():
        # Closing the run has cleared them.
        parameter.grad = recorder.gradients[name]
    if not trial.engine.group.is_only_process:
        recorder.join(all_gather_object(recorder.own_steps()))
    has_several = len(recorder.batches) != 1
    return ReplayResult(
        update=start.update,
        folder=start.folder,
        batch=recorder.batches if has_several else recorder.batches[0],
        indices=recorder.indices,
        model_outputs=recorder.outputs if has_several else recorder.outputs[0],
        loss=recorder.loss,
        gradients=recorder.gradients,
        model=recorder.model,
        learning_rates=recorder.learning_rates,
        layers=recorder.layers,
        messages=_limits(start, recorder, trial.engine.group.is_only_process),
    )


def _limits(start: ReplayStart, recorder: Recorder, is_one_process: bool) -> list[str]:
    """Return sentences on what may keep the replay from being bit-identical."""
    messages = versions_changed(start.state["launched"]["versions"], library_versions())
    messages += recorder.limits_of_exactness
    num_processes = start.launch["num_processes"]
    if num_processes > 2 and is_one_process:
        messages.append(
            f"The run added the gradients of {num_processes} processes in the order of its network, so the "
            "replay equals it up to rounding."
        )
    return messages
