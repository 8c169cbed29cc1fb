"""Describes in words what a run will do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from ..callbacks.callback import TrainerCallback
from ..callbacks.callback_list import EVENTS, CallbackList
from ..callbacks.limit_batches import batch_limits
from ..processes.lost import collective_timeout
from ..text import counted
from .evaluation_sets import label_of, named_sets
from .run_config import TrainerRunConfig
from .trainer_parts import TrainerParts


def describe_callback(callback: TrainerCallback, callbacks: CallbackList) -> str:
    """Return one line: the class, its place in the order, and the events that it listens to."""
    events = [event for event in EVENTS if callback in callbacks.listeners(event)]
    return f"{type(callback).__name__} (order {callback.order}): {', '.join(events) or 'no events'}"


def describe_briefly(trainer: Any) -> str:
    """Return the class of a trainer with its model, its optimizer, what it has trained, and its callbacks.

    It makes no accelerator, so that looking at a trainer changes nothing.
    """
    progress = trainer.run_progress
    optimizer = None if trainer.optimizer is None else type(trainer.optimizer).__name__
    updates, epochs = progress.updates_completed, progress.epochs_completed
    return (
        f"{type(trainer).__name__}(model={type(trainer.model).__name__}, optimizer={optimizer}, trained "
        f"{counted(format(updates, ','), 'updates')} in {counted(format(epochs, ','), 'epochs')}, "
        f"callbacks={list(trainer.callbacks)!r})"
    )


def describe_run(
    trainer: TrainerParts,
    counting: str,
    config: TrainerRunConfig | None,
) -> str:
    """Return data, batch sizes, updates, precision, processes, and callbacks with what each listens to.

    Args:
        counting: what the loss of a batch is the mean of.
        config: the numbers of the current or latest training run; None before the first.
    """
    model, optimizer, callbacks = trainer.model, trainer.optimizer, trainer.callbacks
    accelerator, engine = trainer.accelerator, trainer.engine
    datasets = {"train_dataset": trainer.train_dataset}
    datasets |= {
        label_of("eval_dataset", name): each for name, each in named_sets(trainer.eval_dataset).items()
    }
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = counted(format(sum(parameter.numel() for parameter in parameters), ","), "parameters")
    lines = [
        f"model: {type(model).__name__}, {total}, {trainable:,} of them trainable",
        f"optimizer: {'none' if optimizer is None else type(optimizer).__name__}",
        f"processes: {engine.group.num_processes}, layout: {engine.name}, device: {accelerator.device}, "
        f"precision: {accelerator.mixed_precision}",
        counting,
    ]
    if engine.group.processes_per_copy > 1:
        lines.append(
            f"data: {engine.group.processes_per_copy} processes hold a copy of the model and read the same "
            f"batches; {engine.group.size} such groups share the data"
        )
    lines += _describe_waiting(accelerator.device)
    if engine.steps_in_backward:
        lines.append(
            f"engine: {engine.name} steps inside backward, so at "
            "on_optimizer_step_start the parameters have changed already, and it clips the gradients itself"
        )
    if config is None:
        lines.append("training: not known before train")
    else:
        lines += [f"{name}: {_size(dataset)}" for name, dataset in datasets.items() if dataset is not None]
        lines += _describe_training(config)
    lines += [f"limit: {limit}" for limit in batch_limits(callbacks)]
    lines.append("callbacks, in the order in which they are called:")
    for callback in callbacks:
        own = callback.describe(trainer)  # type: ignore[arg-type]
        lines.append(f"  {describe_callback(callback, callbacks)}{own and f'; {own}'}")
    if not list(callbacks):
        lines.append("  none")
    return "\n".join(lines)


def _describe_waiting(device: torch.device) -> list[str]:
    timeout = collective_timeout(device)
    if timeout is None:
        return []
    minutes = counted(timeout.total_seconds() / 60, "minutes")
    return [
        f"waiting: a process gives up on the others after {minutes}, by InitProcessGroupKwargs(timeout=...) "
        "of accelerate"
    ]


def _describe_training(config: TrainerRunConfig) -> list[str]:
    def known(number: int | None) -> str:
        return "an unknown number" if number is None else f"{number:,}"

    def known_samples(number: int | None) -> str:
        return "an unknown number of samples" if number is None else counted(f"{number:,}", "samples")

    clipping = {"value": config.gradient_clip_value, "norm": config.gradient_clip_norm}
    clipped = ", ".join(f"{how} {most}" for how, most in clipping.items() if most is not None)
    lines = [
        f"batches: {known_samples(config.train_per_device_batch_size)} per process and step, "
        f"{counted(config.gradient_accumulation_steps, 'steps')} and "
        f"{known_samples(config.train_total_batch_size)} an update",
        f"updates: {known(config.num_update_steps)} in all, {known(config.num_update_steps_per_epoch)} an "
        f"epoch, {counted(known(config.num_epochs), 'epochs')}",
        f"gradients: {f'clipped by {clipped}' if clipped else 'not clipped'}",
        f"seed of the order of the data: {config.seed}",
    ]
    if config.eval_total_batch_size is not None:
        # Behind the batches of training.
        lines.insert(
            1,
            f"evaluation batches: {known_samples(config.eval_per_device_batch_size)} per process and step",
        )
    return lines


def _size(dataset: Any) -> str:
    # The length of a loader counts batches; that of its data counts samples.
    source: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    try:
        size = counted(format(len(source), ","), "samples")
    # Data without a length has no `__len__`, or one that raises.
    except (TypeError, NotImplementedError):
        size = "an unknown number of samples"
    return f"{type(dataset).__name__}, {size}"
