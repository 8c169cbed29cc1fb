"""What a run builds before its first step: loaders, the prepared model and optimizer, the scheduler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..data.loader import ShardedDataLoader
from ..engines.choose import check_accumulation
from ..engines.modes import evaluation_mode
from ..engines.trained import clear_gradients
from ..engines.weights import renew_step
from ..notices import logger_of
from ..processes.agreement import Agreement
from ..processes.collectives import broadcast_object
from ..processes.shutdown import check_processes
from ..state.checkpoint import TrainerState
from ..state.random import capture_random_state, restore_random_state, seed_process
from ..text import counted
from .batch_output import add_way_out
from .counted_loss import counted_loss
from .ending import heed_earlier_signals, pass_on_signal, tell_launcher, tell_of_interrupt
from .first_steps import report_evaluation_step
from .launches import note_launch
from .leaving import report_leaving
from .loaders import create_eval_loader, create_loaders
from .loss_tracker import LossTracker, MeanTrackers
from .modes import begin_train_mode
from .prepared_parts import check_engine, prepare_parts
from .refused_collectives import refusing_collectives
from .rollback import Rollback, TrainingRollback
from .run import Run
from .run_config import plan_run
from .schedule_fit import check_fit
from .scheduling import plan_schedule
from .stages import Start, begin_counting, goes_on, order_version_of
from .train_arguments import EvaluationArguments, TrainArguments
from .trainer_parts import TrainerParts
from .update_groups import ItemTotals


def begin_run(trainer: TrainerParts, run: Run, state: TrainerState | None, keep_seed: bool = False) -> None:
    """Choose the seed, and check that the processes are as they should be. Every process takes part.

    Args:
        state: what the run continues from, or None.
        keep_seed: leave the seed of the training run before, which may yet be saved.
    """
    group = run.engine.group
    check_processes(group.num_processes)
    check_accumulation(trainer.accelerator)
    logger_of("engine").info(
        "%s runs the steps on %s, device %s, precision %s.",
        run.engine.name,
        counted(group.size, "processes"),
        trainer.device,
        trainer.accelerator.mixed_precision,
    )
    if trainer.seed is not None and not trainer.is_seeded:
        seed_process(trainer.seed, group.index)
        trainer.is_seeded = True
    elif not trainer.is_seeded and group.processes_per_copy > 1:
        # Else dropout, and data that draws random numbers, would differ within a copy of the model.
        restore_random_state(broadcast_object(capture_random_state(trainer.device)), trainer.device)
    own_seed = broadcast_object(torch.initial_seed() if trainer.seed is None else trainer.seed)
    if not keep_seed:
        trainer.data_seed = own_seed if state is None else state["seed"]
    trainer.eval_loss = LossTracker(trainer.device)


def begin_evaluation(
    trainer: TrainerParts,
    run: Run,
    training_run: Run | None,
    arguments: Mapping[str, EvaluationArguments],
    collate_fn: Any,
    computes_loss: bool = True,
) -> dict[str, ShardedDataLoader]:
    """Build what an evaluation needs, and leave `training_run`, the latest one, as it is.

    Every process takes part.

    Args:
        arguments: those of each evaluation set, by its name.
        computes_loss: it makes evaluation steps; False for predictions.
    """
    begin_run(trainer, run, None, keep_seed=training_run is not None)
    loaders = {name: create_eval_loader(trainer, run, each, collate_fn) for name, each in arguments.items()}
    if training_run is None:
        main = "" if "" in loaders else next(iter(loaders))
        loader = loaders[main]
        given = {"eval_dataloader_kwargs": arguments[main].dataloader_kwargs}
        seed = trainer.data_seed
        trainer.run_config = plan_run(given, None, loader, trainer.accelerator, run.engine.group, seed)  # type: ignore[misc]
    prepare_parts(trainer, run)
    if computes_loss:
        report_evaluation_step(trainer)
    return loaders


def begin_training(
    trainer: TrainerParts, run: Run, arguments: TrainArguments, start: Start, base: type
) -> None:
    """Build everything that a training run needs; what takes long comes last. Every process takes part.

    Args:
        start: what the run continues from.
        base: `Trainer`, by which is known what the trainer's class overrides.
    """
    state = start.state
    # A run has one order of the data, whatever was seeded between two of its stages.
    begin_run(trainer, run, state, keep_seed=state is None and goes_on(trainer, arguments))
    run.order_version = order_version_of(start)
    create_loaders(trainer, run, arguments)
    # A cached property, which may be set.
    trainer.run_config = trainer.create_run_config(**arguments.as_keywords())  # type: ignore[misc]
    check_engine(trainer, run, arguments, base)
    trainer.agreement = Agreement(trainer.device, run.engine.word)
    heed_earlier_signals(trainer.agreement)
    prepared = prepare_parts(trainer, run, arguments.per_device_batch_size)
    begin_train_mode(trainer, run)
    run.engine.set_clipping(arguments.gradient_clip_norm)
    trainer.train_loss = LossTracker(trainer.device)
    run.train_logs = MeanTrackers(trainer.device)
    run.engine.zero_grad()
    # A scheduler watches the step of the optimizer that it was made for, which has to be the one that steps.
    trainer.optimizer = prepared.user_optimizer
    trainer.scheduler = trainer.create_scheduler()
    trainer.optimizer = prepared.optimizer
    renew_step(prepared.optimizer)
    step_every, metric = arguments.scheduler_step_every, arguments.scheduler_metric
    run.schedule = plan_schedule(trainer.scheduler, step_every, metric, arguments.eval_sets)
    loader = run.train_loader
    may_differ = loader is not None and loader.may_leave_out_batches
    may_differ |= counted_loss(trainer.loss_func) is not None
    word = run.engine.word
    if word is not None:
        word.differs = lambda: run.group is not None and run.group.differs_from_plan
    run.item_totals = ItemTotals(run.engine.group, may_differ, word)
    begin_counting(trainer, arguments, state)
    if state is None:
        check_fit(trainer, run)
    # Before the events, in which a state may be saved.
    note_launch(trainer, run, start)


@contextlib.contextmanager
def standing_in(trainer: TrainerParts, model: torch.nn.Module | None) -> Iterator[None]:
    """Let `model` stand in for the trainer's, with a loss of its own; nothing changes if it is None.

    Afterwards the state may be saved again, which an evaluation of another model does not allow.
    """
    before = (trainer.model, trainer.eval_loss)
    if model is not None:
        trainer.model, trainer.eval_loss = model, LossTracker(trainer.device)
    try:
        yield
    finally:
        trainer.model, trainer.eval_loss = before
        if trainer._run is not None:
            trainer._run.is_between_sets = False


@contextlib.contextmanager
def evaluating(trainer: TrainerParts, run: Run) -> Iterator[None]:
    """Let `trainer.model` be the module to evaluate. Every process takes part.

    Afterwards all is as it was. Training draws the random numbers that it would have drawn without it.
    """
    model = trainer.model
    before = (run.phase, run.lacks_batches)
    # An evaluation on its own draws like any other code.
    random_state = None if run.arguments is None else capture_random_state(trainer.device)
    updates = trainer.run_progress.updates_completed
    logger_of("evaluations").debug("An evaluation begins after update %s.", updates)
    trainer.eval_loss.reset()
    try:
        with evaluation_mode(run.engine, model, vars(trainer)) as trainer.model:
            yield
    finally:
        trainer.model = model
        run.phase, run.lacks_batches = before
        if random_state is not None:
            restore_random_state(random_state, trainer.device)


class running:  # noqa: N801  # A context manager is named like a function.
    """Let `run` go on. Afterwards close everything, and give the user's own model and optimizer back."""

    def __init__(self, trainer: TrainerParts, run: Run) -> None:
        self._trainer, self._agreement_before = trainer, trainer.agreement
        self._run = run
        self._context = _running(trainer, run)

    def __enter__(self) -> Run:
        return self._context.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        finally:
            # What is behind the caller's line is of no use to whoever has pressed Ctrl-C.
            if isinstance(error, KeyboardInterrupt):
                error.__traceback__ = None
            # Only now, when the handlers are back that were there before; and only what came to this run.
            agreement = self._trainer.agreement
            if agreement is not self._agreement_before:
                pass_on_signal(agreement.signal_received, error)
        if error is None:
            for act in self._run.afterwards:
                act()


@contextlib.contextmanager
def _running(trainer: TrainerParts, run: Run) -> Iterator[Run]:
    model, optimizer = trainer.model, trainer.optimizer
    prepared = run.engine.prepared
    was_seeded = trainer.is_seeded
    if run.arguments is None:
        run.rollback = Rollback(trainer.run_history, trainer.device)
    else:
        run.rollback = TrainingRollback(trainer.run_history, trainer.device, vars(trainer))
    trainer._run = run
    try:
        with refusing_collectives(trainer.accelerator, run):
            yield run
    except BaseException as error:
        report_leaving(error, run, trainer.run_progress, trainer.device)
        _close_after(error, trainer, optimizer)
        tell_of_interrupt(trainer, run, error)
        tell_launcher(trainer, run, error)
        if run.rollback is not None:
            run.rollback.restore()
            trainer.is_seeded = was_seeded
        raise
    else:
        trainer.callbacks.on_run_close(trainer)  # type: ignore[arg-type]
    finally:
        run.close()
        if run.engine.further is not None:
            run.engine.further.release()
        run.rollback = None
        run.is_between_sets = False
        trainer._run = None
        if run.engine.prepared is not prepared and run.engine.prepared is not None:
            model, optimizer = run.engine.prepared.user_model, run.engine.prepared.user_optimizer
        if run.engine.prepared is not None:
            run.engine.prepared.patches.take_off()
        trainer.model, trainer.optimizer = model, optimizer


def _close_after(error: BaseException, trainer: TrainerParts, optimizer: Any) -> None:
    """Add the way out to an error, and let callbacks close what they opened.

    Args:
        error: is on its way already; what fails here is noted on it.
        optimizer: the user's own.
    """
    add_way_out(error)
    with _noting_failures_on(error):
        trainer.callbacks.on_exception(trainer, error=error)  # type: ignore[arg-type]
    with _noting_failures_on(error):
        trainer.callbacks.on_run_close(trainer)  # type: ignore[arg-type]
    if optimizer is not None:
        optimizer.zero_grad()
    if trainer.engine.trained is not None:
        clear_gradients(trainer.engine.trained.cleared)


@contextlib.contextmanager
def _noting_failures_on(error: BaseException) -> Iterator[None]:
    try:
        yield
    except Exception as another:
        error.add_note(f"While closing, a callback failed too: {another!r}")
