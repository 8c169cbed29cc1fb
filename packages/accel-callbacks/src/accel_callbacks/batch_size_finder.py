"""find_batch_size: the largest batch of one step that fits into memory, for the same batch of each update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import (
    Step,
    UpdateGroup,
    all_gather_object,
    check_trial,
    check_whole_number,
    is_ready_loader,
    trial_of,
)


class BatchSizeRecord(TypedDict):
    """One batch size that was tried."""

    per_device_batch_size: int
    fits: bool
    """Whether it fits on every process."""


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """Numbers for `Trainer.train` that make the same updates as the batch that was asked for."""

    per_device_batch_size: int
    """Samples in a step of one process."""
    gradient_accumulation_steps: int
    """Steps of each process in an update."""
    records: list[BatchSizeRecord]
    """Sizes that were tried, in this order."""


def find_batch_size(
    trainer: Trainer,
    dataset: Any,
    per_device_batch_size: int,
    *,
    num_updates: int = 2,
    **train_arguments: Any,
) -> BatchSize:
    """Return the largest batch of one step that fits into memory and divides `per_device_batch_size`.

    You ask for the samples of one process in an update: `per_device_batch_size` times
    `gradient_accumulation_steps`. If they are too many for one step, they are spread over several. The
    update, and with it the learning rate that suits it, stays the same (for models without batch
    statistics). Each size is tried by updates of a copy of the model, from the largest down, until one fits
    on every process. `trainer` is not changed, as with `find_learning_rate`.

        found = find_batch_size(trainer, train_data, per_device_batch_size=256)
        trainer.train(
            train_data,
            num_epochs=10,
            per_device_batch_size=found.per_device_batch_size,
            gradient_accumulation_steps=found.gradient_accumulation_steps,
        )

    Call it before the first run, since memory that the trainer's own model takes on the device counts as in
    use. If samples differ in size, the largest may come after the updates that were tried: raise
    `num_updates`, or sort the data. Every process takes part and gets the same result.

    Args:
        dataset: data as for `Trainer.train`; it is read as often as needed.
        per_device_batch_size: samples of one process in an update, unless `gradient_accumulation_steps` is
            given.
        num_updates: updates that try a size; from the second on the optimizer's states take memory too.
        train_arguments: further arguments of `Trainer.train` about data, accumulation and clipping.

    Raises:
        ConfigurationError: an argument cannot be used, or not even one sample fits.
    """
    num_updates = check_whole_number(
        "num_updates", num_updates, "Use 2 to have the optimizer's memory in use."
    )
    check_trial("find_batch_size", trainer, dataset, per_device_batch_size, train_arguments)
    own = set(train_arguments.get("train_dataloader_kwargs") or ()) & {"batch_size", "batch_sampler"}
    if is_ready_loader(dataset) or own:
        given = (
            f"train_dataloader_kwargs has {sorted(own)}, which sets the batch size"
            if own
            else f"dataset is a {type(dataset).__name__}, which has a batch size of its own"
        )
        way_out = "Leave it out" if own else "Pass the data set inside it"
        raise ConfigurationError(
            f"{given}, so find_batch_size could try no other. {way_out}, and pass per_device_batch_size."
        )
    share = int(per_device_batch_size) * int(train_arguments.pop("gradient_accumulation_steps", 1))
    records: list[BatchSizeRecord] = []
    # The largest first, which is the answer as soon as one fits.
    for size in (size for size in range(share, 0, -1) if share % size == 0):
        arguments = {
            **train_arguments,
            "gradient_accumulation_steps": share // size,
            "max_num_train_steps": num_updates,
        }
        fits = _fits(trainer, dataset, {"per_device_batch_size": size, **arguments})
        # Else what a failed size leaves in the allocator would count against the next.
        clear_device_cache(garbage_collection=True)
        records.append({"per_device_batch_size": size, "fits": fits})
        if fits:
            return BatchSize(size, share // size, records)
    raise ConfigurationError(
        f"per_device_batch_size is {per_device_batch_size}, but not even one sample fits into the memory "
        f"of {trainer.device}. Use a smaller model, lower precision, or gradient checkpointing."
    )


class _DoesNotFitError(Exception):
    """Some process is out of memory. Raised on all of them after the same step."""


def _fits(trainer: Trainer, dataset: Any, arguments: dict[str, Any]) -> bool:
    """Whether every process can train a copy with these arguments of `train`."""
    fits = True
    with trial_of(trainer, dataset, TrainerCallback(), _AgreeOnMemory) as trial:
        try:
            trial.train(dataset, **arguments)
        except _DoesNotFitError:
            fits = False
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            # It happened outside of a step, as in fetching a batch. The others take part in this after
            # their next step.
            fits = all(all_gather_object(False))
    return fits


class _AgreeOnMemory(Trainer):
    """Lets the processes agree after each step, and after the optimizer's, whether there was enough memory.

    Otherwise those that had enough would wait for the others forever.
    """

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return the loader with a collate function of the user's own that leaves out what does not fit."""
        loader = super().create_train_dataloader(batch_size, train_dl_kwargs)
        if loader.collate_fn is not torch.utils.data.default_collate:
            # Such a function may leave out batches, of which the processes agree before the step.
            loader.collate_fn = _CollateWithinMemory(loader.collate_fn)
        return loader

    def run_train_step(self, step: Step, group: UpdateGroup) -> None:
        """Run the step without synchronising gradients."""
        loader = None if self.train_dataloader is None else self.train_dataloader.loader
        if getattr(getattr(loader, "collate_fn", None), "ran_out", False):
            _agree_on_memory(False)
        # A process without memory would leave the others waiting in backward. The step needs no less memory
        # like this, since DDP has made its buffers before.
        _agree(super().run_train_step, step._replace(is_last=False), group)

    def optimizer_step(self) -> None:
        """Change the parameters, for which the optimizer makes its states in the first update."""
        _agree(super().optimizer_step)


class _CollateWithinMemory:
    """Calls a collate function, and leaves out a batch for which memory runs out: the next step tells."""

    def __init__(self, collate_fn: Any) -> None:
        self.collate_fn = collate_fn
        self.ran_out = False

    def __call__(self, samples: Any) -> Any:
        try:
            return self.collate_fn(samples)
        except Exception as error:
            # A worker cannot tell the process that trains.
            if not _is_out_of_memory(error) or torch.utils.data.get_worker_info() is not None:
                raise
            self.ran_out = True
            return None


def _agree(act: Callable[..., None], *arguments: Any) -> None:
    """Call `act`. Raises `_DoesNotFitError` on every process if memory ran out on any of them."""
    has_memory = True
    try:
        act(*arguments)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        has_memory = False
    _agree_on_memory(has_memory)


def _agree_on_memory(has_memory: bool) -> None:
    if not all(all_gather_object(has_memory)):
        raise _DoesNotFitError


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, according to `error` or to what caused it."""
    # A data loader and a user's own code may raise another error from the one of the allocator.
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, Exception) and should_reduce_batch_size(error):
            return True
        error = error.__cause__
    return False
