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
    trainer.eval_dataloader = None
    if trainer.eval_dataset is not None:
        report_evaluation_step(trainer)
        loader = trainer.create_eval_dataloader(arguments.eval_batch_size, arguments.eval_dataloader_kwargs)
        trainer.eval_dataloader = _shard(trainer, run, loader, seeds_samples, is_sharded)
    for message in limit_loaders(trainer.callbacks, train_loader, trainer.eval_dataloader):
        notify(trainer, message, "loader")
    loaders = {"train_dataset": train_loader, "eval_dataset": trainer.eval_dataloader}
    check_same_on_all(arguments.as_keywords(), **loaders)
    check_not_shares(**loaders)
    return train_loader


def create_eval_loader(
    trainer: TrainerParts, run: Run, arguments: EvaluationArguments, collate_fn: Any
) -> ShardedDataLoader:
    """Return this process's loader of other data, and leave the data of the trainer as it is.

    Every process takes part.
    """
    before = (trainer.eval_dataset, trainer.collate_fn)
    trainer.eval_dataset, trainer.collate_fn = arguments.dataset, collate_fn
    try:
        loader = trainer.create_eval_dataloader(arguments.per_device_batch_size, arguments.dataloader_kwargs)
        loader = _shard(trainer, run, loader, data_is_sharded=arguments.data_is_sharded)
    finally:
        trainer.eval_dataset, trainer.collate_fn = before
    for message in limit_loaders(trainer.callbacks, None, loader):
        notify(trainer, message, "loader")
    check_same_on_all({}, dataset=loader)
    check_not_shares(dataset=loader)
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
    arguments = EvaluationArguments(dataset)
    if run.arguments is not None:
        of_run = run.arguments
        batch_size, kwargs = of_run.eval_batch_size, of_run.eval_dataloader_kwargs
        # Those of the run may not fit a loader that makes its own batches.
        kwargs = None if is_ready_loader(dataset, kwargs) else kwargs
        arguments = EvaluationArguments(dataset, batch_size, kwargs, None, of_run.data_is_sharded)
    loader = create_eval_loader(trainer, run, arguments, trainer.collate_fn)
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
    sharded.log = functools.partial(notify, trainer, room="loader")
    run.loaders.append(sharded)
    logger_of("loader").debug(
        "%s is read by %s in batches of %s a process.",
        type(getattr(loader, "dataset", loader)).__name__,
        type(sharded.source).__name__,
        sharded.batch_size,
    )
    return sharded
