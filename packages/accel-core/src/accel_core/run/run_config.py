"""Derives all numbers of a training run from the arguments, the data and the hardware."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator

from ..data.loader import ShardedDataLoader
from ..errors import ConfigurationError
from ..foreign_names.answers import ForeignName
from ..processes.collectives import all_gather_object
from ..processes.group import DataGroup


@dataclasses.dataclass(frozen=True)
class TrainerRunConfig:
    """Holds the numbers of a run, which are derived once, before the first update.

    Those that depend on the length of the data are None if it has none, or none that is certain, as iterable
    data with two and more workers.
    """

    num_epochs: int | None
    """Epochs of the whole run, of which the limit may cut the last."""
    train_per_device_batch_size: int | None
    """Samples in a step of one process."""
    train_dl_kwargs: dict[str, Any] | None
    """Arguments of the loader of the training data."""
    eval_per_device_batch_size: int | None
    """Samples in a batch of an evaluation, on one process."""
    eval_dl_kwargs: dict[str, Any] | None
    """Arguments of the loaders of evaluations."""
    gradient_accumulation_steps: int
    """Batches of one process in a full update."""
    gradient_clip_value: float | None
    """Largest absolute value of a gradient."""
    gradient_clip_norm: float | None
    """Largest norm of all gradients together."""
    train_total_batch_size: int | None
    """Samples of a full update, on all processes."""
    eval_total_batch_size: int | None
    """Samples in a batch of an evaluation, on all processes."""
    num_update_steps_per_epoch: int | None
    """Updates of a whole epoch."""
    max_num_train_steps: int | None
    """The limit of the run in updates: as it was given, or else `num_update_steps`."""
    num_update_steps: int | None
    """Updates of the whole run."""
    train_dataloader_len: int | None
    """Batches of one process in an epoch."""
    eval_dataloader_len: int | None
    """Batches of one process in an evaluation."""
    is_local_process_zero: bool
    """Whether this is the first process of its machine."""
    is_world_process_zero: bool
    """Whether this is the main process, the first of all."""
    is_distributed: bool
    """Whether there are several processes."""
    mixed_precision: str
    """`no`, `fp16`, `bf16` or `fp8`, as Accelerate names them."""
    num_processes: int
    """Processes of the run, on all machines."""
    seed: int
    """Seed of the order of the data."""

    num_local_update_steps_per_epoch = ForeignName("Use num_update_steps_per_epoch.")

    def __repr__(self) -> str:
        # Most fields of most runs are None, False or empty.
        given = {name: value for name, value in self.to_dict().items() if value not in (None, False, {})}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name; the dictionaries among them are copies."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}


COUNTED_BY_ALL = (
    "reset_run_history",
    "num_epochs",
    "max_num_train_steps",
    "gradient_accumulation_steps",
    "gradient_clip_value",
    "gradient_clip_norm",
    "eval_every_n_epochs",
    "eval_at_start",
)
"""Arguments of `train` that have to be the same on all processes."""


def check_same_on_all(
    arguments: Mapping[str, Any], eval_sets: list[str], **loaders: ShardedDataLoader | None
) -> None:
    """Raise on every process if the processes were given different data or numbers.

    They would wait for each other forever.

    Args:
        eval_sets: names of the evaluation sets, in their order.
    """
    own = {name: arguments.get(name) for name in COUNTED_BY_ALL}
    # Before the loaders, so that whoever has another set raises for this reason.
    own["The names of the evaluation sets"] = eval_sets
    for name, loader in loaders.items():
        own[f"The number of samples in {name}"] = getattr(loader, "num_samples", None)
        own[f"The batch size of {name}"] = getattr(loader, "batch_size", None)
        own[f"The number of batches of {name}"] = getattr(loader, "num_steps", None)
    # One exchange for all values, after which every process raises the same error, or none does.
    by_process = all_gather_object(own)
    for name in own:
        given = [values[name] for values in by_process]
        if any(value != given[0] for value in given):
            raise ConfigurationError(
                f"{name} is {given} on the {len(given)} processes, but must be the same on all. Pass the "
                "whole data and the same arguments on every process: accel distributes the samples itself. "
                "If each process brings its own share of the data, pass data_is_sharded=True."
            )


def plan_updates(
    num_steps_per_epoch: int | None,
    gradient_accumulation_steps: int,
    num_epochs: int | None,
    max_num_train_steps: int | None,
) -> tuple[int | None, int | None, int | None]:
    """Return epochs, updates per epoch and updates of the run.

    The smaller limit wins, and None is what is not known.

    Raises:
        ConfigurationError: an epoch has no update.
    """
    if num_steps_per_epoch is None:
        return num_epochs, None, max_num_train_steps
    # The short window at the end of an epoch is an update too.
    per_epoch = math.ceil(num_steps_per_epoch / gradient_accumulation_steps)
    if per_epoch == 0:
        raise ConfigurationError(
            "train_dataset gives no batch: it is empty, or smaller than one batch of all processes with "
            "drop_last=True. Pass more data, a smaller per_device_batch_size, or leave out drop_last."
        )
    total = math.inf if num_epochs is None else num_epochs * per_epoch
    total = int(min(total, math.inf if max_num_train_steps is None else max_num_train_steps))
    # A limit in updates may end the last epoch before its data.
    epochs = math.ceil(total / per_epoch)
    return epochs if num_epochs is None else min(num_epochs, epochs), per_epoch, total


def plan_run(
    arguments: dict[str, Any],
    train_loader: ShardedDataLoader | None,
    eval_loader: ShardedDataLoader | None,
    accelerator: Accelerator,
    group: DataGroup,
    seed: int,
) -> TrainerRunConfig:
    """Return the numbers of a run.

    Args:
        arguments: those of `train` by name; none of them if there is only an evaluation.
        train_loader: that of this process.
        eval_loader: that of this process.
        seed: that of the order of the data.
    """
    processes = group.size
    # An evaluation without a training run before it has no such argument.
    accumulation = arguments.get("gradient_accumulation_steps", 1)
    lengths = [
        loader.num_steps if loader is not None and loader.has_certain_length else None
        for loader in (train_loader, eval_loader)
    ]
    sizes = [None if loader is None else loader.batch_size for loader in (train_loader, eval_loader)]
    limits = (arguments.get("num_epochs"), arguments.get("max_num_train_steps"))
    epochs, per_epoch, total = plan_updates(lengths[0], accumulation, *limits)
    return TrainerRunConfig(
        num_epochs=epochs,
        train_per_device_batch_size=sizes[0],
        train_dl_kwargs=arguments.get("train_dataloader_kwargs"),
        eval_per_device_batch_size=sizes[1],
        eval_dl_kwargs=arguments.get("eval_dataloader_kwargs"),
        gradient_accumulation_steps=accumulation,
        gradient_clip_value=arguments.get("gradient_clip_value"),
        gradient_clip_norm=arguments.get("gradient_clip_norm"),
        train_total_batch_size=None if sizes[0] is None else sizes[0] * processes * accumulation,
        eval_total_batch_size=None if sizes[1] is None else sizes[1] * processes,
        num_update_steps_per_epoch=per_epoch,
        max_num_train_steps=total if limits[1] is None else limits[1],
        num_update_steps=total,
        train_dataloader_len=lengths[0],
        eval_dataloader_len=lengths[1],
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
        is_distributed=not group.is_only_process,
        mixed_precision=str(accelerator.mixed_precision),
        num_processes=group.num_processes,
        seed=seed,
    )
