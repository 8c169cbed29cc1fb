"""Finds which stage of a run a call of `train` is, and what it continues from.

A script of two stages calls `train` twice and passes the same `resume_from` to both calls:

    the state is of              the first call          the second call
    nothing (None)               begins a run            begins stage 2, from what the trainer holds
    stage 1                      resumes it              begins stage 2, from what the trainer holds
    stage 2                      does nothing            resumes it
"""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Any

from ..data.order import ORDER_VERSION
from ..errors import CheckpointError, ConfigurationError
from ..notices import notify
from ..processes.collectives import broadcast_object, run_on_main
from ..state import files
from ..state.checkpoint import STATE_FILE, TrainerState
from ..state.folder import open_training_state
from .checked_state import check_state
from .history_lines import read_history
from .run import Run
from .run_progress import RunProgress
from .train_arguments import TrainArguments
from .trainer_parts import TrainerParts


@dataclasses.dataclass(frozen=True)
class Start:
    """Holds what a call of `train` begins with."""

    stage: int
    """Number of this call within the run, counted from 1."""
    folder: Path | None = None
    """Folder of the state that `resume_from` names."""
    state: TrainerState | None = None
    """Its content if this call resumes it or is skipped; None if the call begins a stage of its own."""
    known_states: dict[Path, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Training states that earlier stages of this very run have saved or begun from, with their progress."""
    run_before: Run | None = None
    """The latest run of this trainer, whose stage comes before this one; None if there is none."""

    @property
    def is_skipped(self) -> bool:
        """Whether the state is of a later stage, so that this call has nothing to do."""
        return self.state is not None and self.state["run_progress"]["stage"] > self.stage


def goes_on(trainer: TrainerParts, arguments: TrainArguments) -> bool:
    """Whether a call of `train` with `arguments` is a later stage of the run before."""
    progress = trainer.run_progress
    # A run that failed before its first update is none to continue with.
    has_run = trainer.run_id is not None and (progress.updates_completed > 0 or progress.stage_skipped)
    return has_run and not arguments.reset_run_history


def choose_start(trainer: TrainerParts, arguments: TrainArguments) -> Start:
    """Return what a call of `train` with `arguments` begins with. Every process takes part.

    Raises:
        CheckpointError: `resume_from` is no complete state.
        ConfigurationError: the trainer does not hold what this stage would continue from.
    """
    progress = trainer.run_progress
    is_later_stage = goes_on(trainer, arguments)
    stage = progress.stage + 1 if is_later_stage else 1
    # What this run has begun from or saved is of an earlier stage, and may have been removed since.
    run_before = trainer._training_run if is_later_stage else None
    known = {} if run_before is None else dict(run_before.known_states)

    def open_chosen() -> tuple[str | Path | None, TrainerState | None]:
        chosen = arguments.resume_from
        # A later stage begins where this script is, not at a state that it has saved on the way.
        is_own = chosen is None or (Path(chosen).absolute() in known and not progress.stage_skipped)
        return chosen, None if is_own or chosen is None else open_training_state(chosen)

    # The main process's choice counts: disks of several machines may not show the same folder as the newest.
    folder, state = run_on_main(open_chosen, trainer.is_main_process)
    if folder is None or state is None:
        if progress.stage_skipped:
            raise ConfigurationError(
                "resume_from is None, but the call of train before did nothing, since the state that it was "
                f"given is of a later stage than {progress.stage}. So the model lacks its weights. "
                "Pass the same resume_from to all calls of train."
            )
        return Start(stage, known_states=known, run_before=run_before)
    if state["run_progress"]["stage"] >= stage:
        check_state(trainer, Path(folder), state)
        return Start(stage, Path(folder), state)
    _check_holds_stage_before(trainer, folder, state, stage)
    return Start(stage, known_states=known, run_before=run_before)


def _check_holds_stage_before(
    trainer: TrainerParts, folder: str | Path, state: TrainerState, stage: int
) -> None:
    """Raise unless the trainer holds the end of the stage before, which it has trained or resumed itself."""
    saved_stage = state["run_progress"]["stage"]
    if trainer.run_id == state["run_id"] and not trainer.run_progress.stage_skipped:
        return
    held = "skipped the stage before" if trainer.run_progress.stage_skipped else "trained another run"
    raise ConfigurationError(
        f"resume_from='{folder}' is a state of stage {saved_stage} of the run {state['run_id']!r}, but this "
        f"call of train is stage {stage}, and the trainer has {held}. Pass the same resume_from to all "
        "calls of train, or leave out reset_run_history=False to resume that state alone."
    )


def skip_stage(trainer: TrainerParts, arguments: TrainArguments, start: Start) -> None:
    """Note that a stage was skipped, so that the next call of `train` is the stage after it.

    Model and optimizer stay as they are. The history gets the records of the stages before that of the
    state, since scripts read it between two calls.
    """
    state, folder = start.state, start.folder
    # For type checkers: a stage is skipped only because of a state.
    if state is None or folder is None:
        return
    progress = state["run_progress"]
    notify(
        trainer,
        f"'{folder}' is a state of stage {progress['stage']} of its run, so this call of train, stage "
        f"{start.stage}, is skipped.",
        "resume",
    )
    trainer.run_progress = RunProgress(stage=start.stage, stage_skipped=True)
    trainer.run_id = state["run_id"]
    trainer.eval_dataset, trainer.collate_fn = arguments.eval_dataset, arguments.collate_fn
    content = run_on_main(lambda: read_history(folder, state), trainer.is_main_process)
    load_history(trainer, folder, state, content)
    history = trainer.run_history
    records = [
        record for record in history.to_records() if record["epoch"] <= progress["epochs_before_stage"]
    ]
    history.reset()
    for record in records:
        history.add_record(record)
    # The history stands where the stage before it ended.
    history.current_epoch = progress["epochs_before_stage"]
    history.current_update = progress["updates_before_stage"]


def order_version_of(start: Start) -> int:
    """Return the version of the order in which the run reads its data, from its beginning to its end.

    Raises:
        CheckpointError: the state is of a version that this accel does not know yet.
    """
    if start.state is None:
        return ORDER_VERSION if start.run_before is None else start.run_before.order_version
    version = start.state["order_version"]
    if not 1 <= version <= ORDER_VERSION:
        raise CheckpointError(
            f"'{start.folder}' was saved with version {version} of the order of the data, but this accel "
            f"knows the versions up to {ORDER_VERSION}. Use the version of accel that wrote it."
        )
    return version


def begin_counting(trainer: TrainerParts, arguments: TrainArguments, state: TrainerState | None) -> None:
    """Begin a run or its next stage; the counters of `state` are restored later. Every process takes part."""
    progress = trainer.run_progress
    is_later_stage = goes_on(trainer, arguments)
    if state is not None:
        # `restore_objects` replaces these counters by those of the state.
        trainer.run_progress = RunProgress(stage=progress.stage + 1 if is_later_stage else 1)
        trainer.run_id = state["run_id"]
        trainer.last_checkpoint = None
    elif is_later_stage:
        trainer.run_progress = progress.begin_stage()
    else:
        trainer.run_progress = progress.begin_run()
        # From the system, so that two runs with the same seed have different names.
        trainer.run_id = broadcast_object(secrets.token_hex(6))
        trainer.last_checkpoint = None
        if arguments.reset_run_history:
            trainer.run_history.reset()


def load_history(
    trainer: TrainerParts, folder: Path, state: TrainerState, content: dict[str, Any] | None = None
) -> None:
    """Replace the history by that of a training state.

    Args:
        content: of the history, if it is read already.
    """
    with files.reading(folder / STATE_FILE):
        history = trainer.run_history
        history.load_state_dict(read_history(folder, state) if content is None else content)
        if not (isinstance(history.current_epoch, int) and isinstance(history.current_update, int)):
            raise ValueError(f"the history is at the epoch {history.current_epoch!r:.60}, which is no number")
