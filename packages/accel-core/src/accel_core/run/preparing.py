"""What a run builds before its first step: loaders, the prepared model and optimizer, the scheduler."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any

import torch

from ..callbacks.limit_batches import limit_loaders
from ..data.loader import ShardedDataLoader
from ..data.waiting import WaitingReport
from ..engines.choose import check_accumulation
from ..engines.engine import LEFT_TO_ENGINE, Prepared
from ..engines.weights import evaluation_mode, move_modules, renew_step
from ..errors import ConfigurationError
from ..processes.agreement import Agreement
from ..processes.collectives import broadcast_object
from ..processes.shutdown import check_processes
from ..state.checkpoint import TrainerState
from ..state.random import seed_process
from .batch_output import add_way_out
from .loss_tracker import LossTracker, MeanTrackers
from .rollback import Rollback, TrainingRollback
from .run import Run
from .run_config import check_same_on_all, plan_run
from .run_progress import RunProgress
from .scheduling import plan_schedule
from .train_arguments import TrainArguments
from .trainer_parts import TrainerParts
from .update_groups import ItemTotals


def begin_run(trainer: TrainerParts, run: Run, state: TrainerState | None, keep_seed: bool = False) -> None:
    """Choose the seed, and check that the processes are as they should be. Every process takes part.

    Args:
        state: what the run goes on from, or None.
        keep_seed: leave the seed of the training run before, which may yet be saved.
    """
    group = run.engine.group
    check_processes(group.size)
    check_accumulation(trainer.accelerator)
    if trainer.seed is not None and not trainer.is_seeded:
        seed_process(trainer.seed, group.index)
        trainer.is_seeded = True
    own_seed = broadcast_object(torch.initial_seed() if trainer.seed is None else trainer.seed)
    if not keep_seed:
        trainer.data_seed = own_seed if state is None else state["seed"]
    trainer.eval_loss = LossTracker(trainer.device)


def begin_evaluation(
    trainer: TrainerParts,
    run: Run,
    training_run: Run | None,
    dataset: Any,
    batch_size: int,
    kwargs: Any,
    collate_fn: Any,
) -> ShardedDataLoader:
    """Build what an evaluation needs, and leave `training_run`, the latest one, as it is. Every process takes part."""
    begin_run(trainer, run, None, keep_seed=training_run is not None)
    loader = create_eval_loader(trainer, run, dataset, batch_size, kwargs, collate_fn)
    if training_run is None:
        arguments = {"eval_dataloader_kwargs": kwargs}
        seed = trainer.data_seed
        trainer.run_config = plan_run(arguments, None, loader, trainer.accelerator, run.engine.group, seed)  # type: ignore[misc]
    prepare_parts(trainer, run)
    return loader


def create_loaders(trainer: TrainerParts, run: Run, arguments: TrainArguments) -> ShardedDataLoader:
    """Make this process's loaders for training and evaluation, and return the first. Every process takes part."""
    seeds_samples = arguments.seed_each_sample
    loader = trainer.create_train_dataloader(
        arguments.per_device_batch_size, arguments.train_dataloader_kwargs
    )
    train_loader = _shard(trainer, run, loader, seeds_samples)
    # On several machines the processes of the others have cores of their own.
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", run.engine.group.size))
    train_loader.waiting = WaitingReport(loader, loader is trainer.train_dataset, num_local_processes)
    trainer.train_dataloader = run.train_loader = train_loader
    trainer.eval_dataloader = None
    if trainer.eval_dataset is not None:
        loader = trainer.create_eval_dataloader(arguments.eval_batch_size, arguments.eval_dataloader_kwargs)
        trainer.eval_dataloader = _shard(trainer, run, loader, seeds_samples)
    for message in limit_loaders(trainer.callbacks, train_loader, trainer.eval_dataloader):
        trainer.print(message)
    loaders = {"train_dataset": train_loader, "eval_dataset": trainer.eval_dataloader}
    check_same_on_all(arguments.as_keywords(), **loaders)
    return train_loader


def create_eval_loader(
    trainer: TrainerParts, run: Run, dataset: Any, batch_size: int, kwargs: Any, collate_fn: Any
) -> ShardedDataLoader:
    """Return this process's loader of `dataset`, and leave the data of the trainer as it is. Every process takes part."""
    before = (trainer.eval_dataset, trainer.collate_fn)
    trainer.eval_dataset, trainer.collate_fn = dataset, collate_fn
    try:
        loader = _shard(trainer, run, trainer.create_eval_dataloader(batch_size, kwargs))
    finally:
        trainer.eval_dataset, trainer.collate_fn = before
    for message in limit_loaders(trainer.callbacks, None, loader):
        trainer.print(message)
    check_same_on_all({}, dataset=loader)
    return loader


@contextlib.contextmanager
def loader_to_evaluate(trainer: TrainerParts, run: Run, dataset: Any) -> Iterator[ShardedDataLoader]:
    """Give this process's loader of `dataset`, or that of the run for None.

    A loader that is made for this evaluation is closed afterwards. Every process takes part.
    """
    dataset = trainer.eval_dataloader if dataset is None else dataset
    if dataset is None:
        raise ConfigurationError(
            "eval_dataset is None, so there is nothing to evaluate on. Pass eval_dataset to train."
        )
    if isinstance(dataset, ShardedDataLoader):
        yield dataset
        _announce_epoch_again(run, dataset)
        return
    batch_size = 8 if run.arguments is None else run.arguments.eval_batch_size
    kwargs = None if run.arguments is None else run.arguments.eval_dataloader_kwargs
    loader = create_eval_loader(trainer, run, dataset, batch_size, kwargs, trainer.collate_fn)
    try:
        yield loader
        _announce_epoch_again(run, loader)
    finally:
        run.loaders.remove(loader)
        loader.close()


def _announce_epoch_again(run: Run, evaluated: ShardedDataLoader) -> None:
    # Training data may go on being read in the middle of its epoch.
    if run.train_loader is not None:
        run.train_loader.announce_epoch_after(evaluated)


def _shard(trainer: TrainerParts, run: Run, loader: Any, seed_each_sample: bool = False) -> ShardedDataLoader:
    sharded = ShardedDataLoader(loader, trainer.data_seed, trainer.device, run.engine.group, seed_each_sample)
    sharded.log = trainer.print
    run.loaders.append(sharded)
    return sharded


def check_engine(trainer: TrainerParts, run: Run, arguments: TrainArguments, base: type) -> None:
    """Raise if the run asks for what the engine does not do.

    Args:
        base: `Trainer`, by which is known what the trainer's class overrides.
    """
    kind = type(trainer)
    overridden = [name for name in LEFT_TO_ENGINE if getattr(kind, name) is not getattr(base, name)]
    run.counts_before_forward = getattr(kind, "count_items") is not getattr(base, "count_items")  # noqa: B009
    is_sized = run.train_loader is not None and run.train_loader.is_sized
    has_plan = is_sized or run.counts_before_forward
    run.engine.check(overridden, arguments.gradient_clip_value, arguments.gradient_clip_norm, has_plan)


def prepare_parts(trainer: TrainerParts, run: Run, per_device_batch_size: int = 1) -> Prepared:
    """Place and wrap model and optimizer, unless they are those of the run before."""
    engine = run.engine
    if engine.prepared is None or not engine.prepared.is_of(trainer.model, trainer.optimizer):
        trainer.callbacks.on_prepare_start(trainer)  # type: ignore[arg-type]
        user_parts = (trainer.model, trainer.optimizer)
        with engine.completed_config(per_device_batch_size):
            trainer.prepare()
        engine.keep(Prepared(*user_parts, trainer.model, trainer.optimizer))
    prepared = run.prepared
    trainer.model, trainer.optimizer = prepared.model, prepared.optimizer
    move_modules(vars(trainer), trainer.device)
    engine.bind(prepared.optimizer)
    return prepared


def begin_training(
    trainer: TrainerParts, run: Run, arguments: TrainArguments, state: TrainerState | None, base: type
) -> None:
    """Build everything that a training run needs; what takes long comes last. Every process takes part.

    Args:
        state: what the run goes on from, or None.
        base: `Trainer`, by which is known what the trainer's class overrides.
    """
    begin_run(trainer, run, state)
    create_loaders(trainer, run, arguments)
    # A cached property, which may be set.
    trainer.run_config = trainer.create_run_config(**arguments.as_keywords())  # type: ignore[misc]
    check_engine(trainer, run, arguments, base)
    trainer.agreement = Agreement(trainer.device)
    prepared = prepare_parts(trainer, run, arguments.per_device_batch_size)
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
    run.schedule = plan_schedule(trainer.scheduler, step_every, metric, trainer.eval_dataset is not None)
    loader = run.train_loader
    may_differ = loader is not None and (loader.has_own_collate or not loader.is_sized)
    run.item_totals = ItemTotals(run.engine.group, may_differ)
    trainer.run_progress = RunProgress()
    if arguments.reset_run_history and state is None:
        trainer.run_history.reset()
    trainer.run_id = broadcast_object(secrets.token_hex(6)) if state is None else state["run_id"]
    trainer.last_checkpoint = None


@contextlib.contextmanager
def standing_in(trainer: TrainerParts, model: torch.nn.Module | None) -> Iterator[None]:
    """Let `model` stand in for the trainer's, with a loss of its own; nothing changes if it is None."""
    before = (trainer.model, trainer.eval_loss)
    if model is not None:
        trainer.model, trainer.eval_loss = model, LossTracker(trainer.device)
    try:
        yield
    finally:
        trainer.model, trainer.eval_loss = before


@contextlib.contextmanager
def evaluating(trainer: TrainerParts, run: Run) -> Iterator[None]:
    """Let `trainer.model` be the module to evaluate. Every process takes part."""
    model = trainer.model
    trainer.eval_loss.reset()
    try:
        with run.evaluating(), evaluation_mode(run.engine, model) as trainer.model:
            yield
    finally:
        trainer.model = model


@contextlib.contextmanager
def running(trainer: TrainerParts, run: Run) -> Iterator[Run]:
    """Let `run` go on. Afterwards close everything, and give the user's own model and optimizer back."""
    model, optimizer = trainer.model, trainer.optimizer
    prepared = run.engine.prepared
    was_seeded = trainer.is_seeded
    if run.arguments is None:
        run.rollback = Rollback(trainer.run_history, trainer.device)
    else:
        run.rollback = TrainingRollback(model, optimizer, trainer.run_history, trainer.device)
    trainer._run = run
    try:
        yield run
    except BaseException as error:
        _close_after(error, trainer, optimizer)
        if run.rollback is not None:
            run.rollback.restore()
            trainer.is_seeded = was_seeded
        raise
    else:
        trainer.callbacks.on_run_close(trainer)  # type: ignore[arg-type]
    finally:
        run.close()
        run.rollback = None
        trainer._run = None
        if run.engine.prepared is not prepared and run.engine.prepared is not None:
            model, optimizer = run.engine.prepared.user_model, run.engine.prepared.user_optimizer
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


@contextlib.contextmanager
def _noting_failures_on(error: BaseException) -> Iterator[None]:
    try:
        yield
    except Exception as another:
        error.add_note(f"While closing, a callback failed too: {another!r}")
