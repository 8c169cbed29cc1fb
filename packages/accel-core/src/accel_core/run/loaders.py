"""The loaders of a run: made as for a single process, then sharded, limited, and compared by processes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from ..callbacks.limit_batches import limit_loaders
from ..data.loader import ShardedDataLoader
from ..data.readers import is_ready_loader
from ..data.shares import check_not_shares
from ..data.waiting import WaitingReport
from ..errors import ConfigurationError
from ..notices import logger_of, notify
from .evaluation_sets import check_named_sets, label_of, named_sets
from .first_steps import report_evaluation_step
from .run import Run
from .run_config import check_same_on_all
from .train_arguments import EvaluationArguments, TrainArguments
from .trainer_parts import TrainerParts


def create_loaders(trainer: TrainerParts, run: Run, arguments: TrainArguments) -> ShardedDataLoader:
    """Make this process's loaders for training and evaluation, and return the first.

    Every process takes part.
    """
    seeds_samples, is_sharded = arguments.seed_each_sample, arguments.data_is_sharded
    loader = trainer.create_train_dataloader(
        arguments.per_device_batch_size, arguments.train_dataloader_kwargs
    )
    train_loader = _shard(trainer, run, loader, seeds_samples, is_sharded)
    # On several machines the processes of the others have cores of their own.
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", run.engine.group.size))
    train_loader.waiting = WaitingReport(loader, loader is trainer.train_dataset, num_local_processes)
    trainer.train_dataloader = run.train_loader = train_loader
    trainer.eval_dataloader, trainer.eval_dataloaders = None, {}
    if arguments.eval_sets:
        report_evaluation_step(trainer)
    for name, given in arguments.eval_sets.items():
        with _evaluating_on(trainer, given.dataset, trainer.collate_fn):
            loader = trainer.create_eval_dataloader(given.batch_size, given.dataloader_kwargs)
        trainer.eval_dataloaders[name] = _shard(trainer, run, loader, seeds_samples, is_sharded)
    evaluations = trainer.eval_dataloaders
    # The set without a name is the main one, wherever it stands.
    trainer.eval_dataloader = evaluations.get("", next(iter(evaluations.values()), None))
    for message in limit_loaders(trainer.callbacks, train_loader, evaluations.values()):
        notify(trainer, message, "loader")
    named = {label_of("eval_dataset", name): each for name, each in evaluations.items()}
    loaders = {"train_dataset": train_loader, **named}
    check_same_on_all(arguments.as_keywords(), list(evaluations), **loaders)
    check_not_shares(**loaders)
    return train_loader


@contextlib.contextmanager
def _evaluating_on(trainer: TrainerParts, dataset: Any, collate_fn: Any) -> Iterator[None]:
    """Let `dataset` be the trainer's evaluation data, which `create_eval_dataloader` reads."""
    before = (trainer.eval_dataset, trainer.collate_fn)
    trainer.eval_dataset, trainer.collate_fn = dataset, collate_fn
    try:
        yield
    finally:
        trainer.eval_dataset, trainer.collate_fn = before


def create_eval_loader(
    trainer: TrainerParts, run: Run, arguments: EvaluationArguments, collate_fn: Any
) -> ShardedDataLoader:
    """Return this process's loader of other data, and leave the data of the trainer as it is.

    Every process takes part.
    """
    with _evaluating_on(trainer, arguments.dataset, collate_fn):
        loader = trainer.create_eval_dataloader(arguments.per_device_batch_size, arguments.dataloader_kwargs)
        loader = _shard(trainer, run, loader, data_is_sharded=arguments.data_is_sharded)
    for message in limit_loaders(trainer.callbacks, None, [loader]):
        notify(trainer, message, "loader")
    label = label_of("dataset", arguments.set_name)
    check_same_on_all({}, [arguments.set_name], **{label: loader})
    check_not_shares(**{label: loader})
    return loader


def sets_to_evaluate(trainer: TrainerParts, dataset: Any) -> dict[str, Any]:
    """Return data or loaders by name: those that were given.

    For None they are those of the run, or of the evaluation that callbacks are told to have ended.
    """
    if dataset is None:
        ended = None if trainer._run is None else trainer._run.evaluation_ended_on
        if ended is not None:
            return dict(ended)
        if not trainer.eval_dataloaders:
            raise ConfigurationError(
                "eval_dataset is None, so there is nothing to evaluate on. Pass eval_dataset to train."
            )
        return dict(trainer.eval_dataloaders)
    check_named_sets("dataset", dataset)
    # The loop itself names its loader, as overrides of `run_eval_epoch` expect it.
    return named_sets(dataset)


@contextlib.contextmanager
def loader_to_evaluate(
    trainer: TrainerParts, run: Run, dataset: Any, name: str = ""
) -> Iterator[ShardedDataLoader]:
    """Give this process's loader of `dataset`, which may be one already.

    A loader that is made for this evaluation is closed afterwards. Every process takes part.

    Args:
        name: that of the evaluation set.
    """
    with _loader_of(trainer, run, dataset, name) as loader:
        # A callback may evaluate something else in the midst of an evaluation.
        outer, run.evaluated_loader = run.evaluated_loader, loader
        try:
            yield loader
        finally:
            run.evaluated_loader = outer
        _announce_epoch_again(run, loader)


@contextlib.contextmanager
def _loader_of(trainer: TrainerParts, run: Run, dataset: Any, name: str) -> Iterator[ShardedDataLoader]:
    if isinstance(dataset, ShardedDataLoader):
        yield dataset
        return
    arguments = EvaluationArguments(dataset, set_name=name)
    if run.arguments is not None:
        of_run = run.arguments
        batch_size, kwargs = of_run.eval_batch_size, of_run.further_eval_kwargs
        # Those of the run may not fit a loader that makes its own batches.
        kwargs = None if is_ready_loader(dataset, kwargs) else kwargs
        arguments = EvaluationArguments(dataset, batch_size, kwargs, None, of_run.data_is_sharded, name)
    loader = create_eval_loader(trainer, run, arguments, trainer.collate_fn)
    try:
        yield loader
    finally:
        run.loaders.remove(loader)
        loader.close()


def loader_of_evaluation(trainer: TrainerParts) -> ShardedDataLoader | None:
    """Return the loader that the evaluation at this moment reads; None outside of one."""
    return None if trainer._run is None else trainer._run.evaluated_loader


@contextlib.contextmanager
def training_data_again(
    trainer: TrainerParts, run: Run, arguments: TrainArguments
) -> Iterator[ShardedDataLoader]:
    """Give a loader of the training data besides that of the run, which reads on where it was.

    Every process takes part.
    """
    size, kwargs = arguments.per_device_batch_size, arguments.train_dataloader_kwargs
    given = trainer.create_train_dataloader(size, kwargs)
    loader = _shard(trainer, run, given, arguments.seed_each_sample, arguments.data_is_sharded)
    # What is said of limits was said when the run began.
    limit_loaders(trainer.callbacks, loader, [])
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


def _shard(
    trainer: TrainerParts,
    run: Run,
    loader: Any,
    seed_each_sample: bool = False,
    data_is_sharded: bool = False,
) -> ShardedDataLoader:
    group = run.engine.group
    sharded = ShardedDataLoader(
        loader, trainer.data_seed, trainer.device, group, seed_each_sample, data_is_sharded
    )
    sharded.use_order(run.order_version)
    sharded.log = functools.partial(notify, trainer, room="loader")
    run.loaders.append(sharded)
    logger_of("loader").debug(
        "%s is read by %s in batches of %s a process.",
        type(getattr(loader, "dataset", loader)).__name__,
        type(sharded.source).__name__,
        sharded.batch_size,
    )
    return sharded
