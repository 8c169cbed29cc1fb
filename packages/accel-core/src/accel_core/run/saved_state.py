"""Collects what a trainer saves, and puts it back. The room `state` writes and reads the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checks.values import check_path
from ..data.loader import RANDOM_NUMBERS_OF_WORKERS
from ..data.order import ORDER_VERSION
from ..engines.weights import (
    check_finite,
    share_buffers,
)
from ..errors import ConfigurationError
from ..notices import logger_of, notify
from ..processes.collectives import all_gather_object, gather_on_main, run_on_main
from ..state import files
from ..state.checkpoint import (
    ATTRIBUTES_FILE,
    HISTORY_FILE,
    STATE_FILE,
    RunState,
    TrainerState,
    library_versions,
)
from ..state.random import capture_random_state, restore_random_state
from ..state.resume import compare, read_resume_point
from ..state.save import Saved, save_folder
from ..text import counted
from .checked_state import open_state, setting_damage_aside
from .choose_load import choose_load
from .evaluations import step_if_due
from .history_lines import metrics_of_update, split_state
from .machines import handed_out
from .modes import loading_weights, weights_to_train
from .prepared_parts import prepare_parts
from .preparing import begin_run
from .run import Run
from .run_progress import RunProgress
from .schedule_fit import check_fit
from .stages import load_history
from .train_arguments import TrainArguments
from .trained_state import compare_weights, create_state, loaded, names_of, read_state
from .trainer_parts import TrainerParts


def report_finished(trainer: TrainerParts, run: Run) -> None:
    """Print that the run to be resumed is finished, if it is."""
    point = run.resume_point
    if point is not None and run.is_finished(trainer.run_progress):
        updates = trainer.run_progress.updates_completed
        notify(
            trainer,
            f"The run in {point.folder} is finished after {counted(updates, 'updates')}, so there is nothing "
            f"to do. {_way_on(run)}",
            "resume",
        )


def _way_on(run: Run) -> str:
    limits = [name for name in ("num_epochs", "max_num_train_steps") if getattr(run, name) is not None]
    return (
        f"To train longer, pass a larger {' and '.join(limits)}. To start a new run, leave out resume_from."
    )


def save_run(trainer: TrainerParts, run: Run | None, output_dir: Any, values: dict[str, Any] | None) -> None:
    """Write what `Trainer.save_training_state` promises. Every process takes part.

    Args:
        run: the latest training run, or None before the first.
    """
    if run is None:
        raise ConfigurationError(
            "save_training_state was called before training, so there is no run to resume. Use "
            "save_checkpoint for the model."
        )
    _check_position(run)
    path = check_path("output_dir", output_dir, "Pass the name of a folder.").absolute()
    engine = run.engine
    state = create_run_state(trainer)
    check_finite(run.prepared.model, {} if engine.trained is None else engine.trained.modules)
    compare_weights(engine)
    share_buffers(run.prepared.model)
    history = trainer.run_history
    extra = {"extra.pt": values or {}}
    progress = dict(state["run_progress"])
    with weights_to_train(trainer):
        if state["attributes"]:
            extra[ATTRIBUTES_FILE] = engine.whole_state(create_state(engine.trained))
        saved = save_folder(
            path,
            state,
            lambda: {
                **engine.main_files(trainer.scheduler, trainer.create_model_state),
                **extra,
                HISTORY_FILE: run.history_lines.content(history),
            },
            lambda: create_process_state(trainer, run),
            process_index=engine.group.process_index,
            gather=all_gather_object,
            gather_on_main=gather_on_main,
            create_shards=engine.create_shards,
            write_engine=engine.write_own_files,
            is_known=run.known_states.get(path) == progress,
            is_first=path.parent not in run.tidied_folders,
            gathers_files=engine.gathers_files,
            writer=run.background and run.background.writer,
        )
    run.tidied_folders |= {path.parent}
    if saved is Saved.BEGUN and run.background is not None:
        run.background.begun(path, progress)
    else:
        _tell_saved(trainer, run, path, progress, is_new=bool(saved))


def _tell_saved(trainer: TrainerParts, run: Run, path: Path, progress: dict[str, Any], is_new: bool) -> None:
    if is_new:
        logger_of("saves").info("The state of update %s is saved: %s", progress["updates_completed"], path)
        run.known_states[path] = progress
        trainer.callbacks.on_checkpoint_saved(trainer, path=path)  # type: ignore[arg-type]
    trainer.last_checkpoint = path


def _check_position(run: Run) -> None:
    """Raise where a run stands from where it could not go on."""
    if run.is_in_update:
        raise ConfigurationError(
            "save_training_state was called in the middle of an update, but gradients are not part of the "
            "state. Call it in on_optimizer_step_end or later."
        )
    if run.is_between_sets:
        raise ConfigurationError(
            "save_training_state was called between two sets of an evaluation in mid-epoch, or in an "
            "evaluation of another model, from where no run could go on. Call it in on_optimizer_step_end "
            "or on_evaluation_end."
        )


def create_run_state(trainer: TrainerParts) -> RunState:
    """Return what `trainer_state.json` holds, but for the files: the same on every process."""
    config = trainer.run_config
    loader = trainer.train_dataloader
    progress = trainer.run_progress.state_dict()
    run = trainer._training_run
    return {
        "run_id": str(trainer.run_id),
        "run_progress": progress,
        "run_history": split_state(trainer.run_history)[0],
        "metrics": metrics_of_update(trainer.run_history, progress["updates_completed"]),
        "seed": trainer.data_seed,
        "order_version": ORDER_VERSION if run is None else run.order_version,
        "num_samples": None if loader is None else loader.num_samples,
        "launched": {
            "num_processes": trainer.engine.group.size,
            "per_device_batch_size": config.train_per_device_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "num_update_steps": config.num_update_steps,
            "versions": library_versions(),
        },
        "callbacks": list(trainer.callbacks.state_dict()),
        "attributes": names_of(trainer.engine.trained),
        "beginning": {} if run is None else dict(run.beginning),
        "launches": [] if run is None else list(run.launches),
    }


def create_process_state(trainer: TrainerParts, run: Run) -> dict[str, Any]:
    """Return what differs between processes, as `ProcessState`."""
    loader = trainer.train_dataloader
    return {
        "random": capture_random_state(trainer.device),
        "train_loss": trainer.train_loss.state_dict(),
        "train_logs": run.train_logs.state_dict(),
        "callbacks": trainer.callbacks.state_dict(),
        "trainer": trainer.state_dict(),
        "data": None if loader is None else loader.source_state,
    }


def print_differences(trainer: TrainerParts, arguments: TrainArguments, state: TrainerState) -> None:
    """Print what cannot be carried over, before anything is changed.

    Raises:
        ConfigurationError: the position in the data means nothing for the data of this run.
    """
    names = [name for name, _ in trainer.callbacks.named()]
    messages = compare(state, create_run_state(trainer), names, trainer.scheduler is not None)
    position = state["run_progress"]["samples_completed_in_epoch"]
    saved_processes = state["launched"]["num_processes"]
    train_loader, eval_loader = trainer.train_dataloader, trainer.eval_dataloader
    if train_loader is not None:
        messages += train_loader.limits_of_exactness(position, saved_processes, arguments.seed_each_sample)
    has_own_workers = train_loader is None or not train_loader.has_workers
    if (
        has_own_workers
        and eval_loader is not None
        and eval_loader.has_workers
        and not arguments.seed_each_sample
    ):
        messages.append(RANDOM_NUMBERS_OF_WORKERS)
    for message in (*messages, *trainer.engine.limits_of_exactness):
        notify(trainer, message, "resume")


def load_run(trainer: TrainerParts, run: Run, path: str | Path) -> dict[str, Any]:
    """Restore a training state, and return the values that were saved with it. Every process takes part."""
    folder, state = open_state(trainer, path)
    with setting_damage_aside(trainer, folder):
        values: dict[str, Any] = run_on_main(
            lambda: files.read_object(folder / "extra.pt", dict), trainer.is_main_process
        )
        begin_run(trainer, run, state)
        prepare_parts(trainer, run)
        restore_objects(trainer, run, folder, state)
    restore_resume_point(trainer, run)
    return values


def begin_resuming(
    trainer: TrainerParts, run: Run, arguments: TrainArguments, folder: Path, state: TrainerState
) -> None:
    """Print what cannot be carried over, then restore what is restored before the loop."""
    updates = state["run_progress"]["updates_completed"]
    logger_of("resume").info("The run continues from %s, after update %s.", folder, updates)
    print_differences(trainer, arguments, state)
    with setting_damage_aside(trainer, folder):
        restore_objects(trainer, run, folder, state)
    check_fit(trainer, run, state)


def restore_objects(trainer: TrainerParts, run: Run, folder: Path, state: TrainerState) -> None:
    """Restore model, optimizer, scheduler, progress and history; what the loop itself changes comes later."""
    with handed_out(folder, state, trainer.is_main_process) as readable:
        _restore_from(trainer, run, readable, state)
    run.known_states = {folder.absolute(): dict(state["run_progress"])}
    if run.resume_point is not None:
        run.resume_point = dataclasses.replace(run.resume_point, folder=folder)


def _restore_from(trainer: TrainerParts, run: Run, folder: Path, state: TrainerState) -> None:
    load = choose_load(trainer, folder) or trainer.load_model_state
    attributes = read_state(folder, state, run.engine.trained)
    if attributes is None and (names := names_of(run.engine.trained)):
        notify(
            trainer,
            f"'{folder}' was saved by a version that left out {names}, which stay unchanged.",
            "resume",
        )
    trainer.run_id = state["run_id"]
    saved_processes = state["launched"]["num_processes"]
    run.engine.check_files(folder, saved_processes, trainer.trust_engine_files)
    point = read_resume_point(folder, run.engine.group, saved_processes)
    run.resume_point = point
    trainer.callbacks.load_state_dict(point.process_state["callbacks"])
    trainer.load_state_dict(point.process_state["trainer"])
    with files.reading(folder / STATE_FILE):
        progress = RunProgress(**state["run_progress"])
    load_history(trainer, folder, state)
    with (
        loading_weights(trainer, training=True),
        loaded(run.engine.trained, attributes or {}, folder / ATTRIBUTES_FILE),
    ):
        run.engine.load_files(folder, trainer.scheduler, load)
    run.history_lines.adopt(folder, trainer.run_history)
    trainer.run_progress = progress
    run.rollback = None


def restore_resume_point(trainer: TrainerParts, run: Run) -> None:
    """Restore what the loop has changed since `restore_objects`, once it is where the state was saved."""
    if run.resume_point is None:
        return
    folder = run.resume_point.folder
    state = run.resume_point.process_state
    run.resume_point = None
    trainer.callbacks.load_state_dict(state["callbacks"])
    trainer.load_state_dict(state["trainer"])
    trainer.train_loss.load_state_dict(state["train_loss"])
    run.train_logs.load_state_dict(state["train_logs"])
    if run.loaders and state["data"] is not None and trainer.train_dataloader is not None:
        trainer.train_dataloader.restore_source(state["data"])
    if state["random"] is not None:
        restore_random_state(state["random"], trainer.device)
    trainer.callbacks.on_checkpoint_loaded(trainer, path=folder)  # type: ignore[arg-type]
    step_if_due(trainer)
    trainer.agreement.collect(blocking=True)
