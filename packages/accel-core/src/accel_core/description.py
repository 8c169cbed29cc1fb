"""What a run will do, in words."""

from __future__ import annotations

from typing import Any

from .callback import TrainerCallback
from .callback_list import EVENTS, CallbackList
from .run_config import TrainerRunConfig


def describe_callback(callback: TrainerCallback, callbacks: CallbackList) -> str:
    """One line: the class and the events that it listens to."""
    events = [event for event in EVENTS if callback in callbacks.listeners(event)]
    return f"{type(callback).__name__}: {', '.join(events) or 'no events'}"


def describe_run(
    model: Any, optimizer: Any, callbacks: CallbackList, datasets: dict[str, Any], config: TrainerRunConfig | None
) -> str:
    """Data, batch sizes, updates, precision, processes, and the callbacks in order with what each listens to."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    lines = [
        f"model: {type(model).__name__}, {total:,} parameters, {trainable:,} of them trainable",
        f"optimizer: {type(optimizer).__name__}",
    ]
    for name, dataset in datasets.items():
        size = f"{len(dataset):,}" if hasattr(dataset, "__len__") else "an unknown number of"
        lines += [] if dataset is None else [f"{name}: {type(dataset).__name__}, {size} samples or batches"]
    if config is None:
        lines.append("run: not known before train or evaluate")
    else:
        lines += [
            f"processes: {config.num_processes}, precision: {config.mixed_precision}, seed of the data order: {config.seed}",
            f"batches: {config.train_per_device_batch_size} samples by process and step, "
            f"{config.gradient_accumulation_steps} steps and {config.train_total_batch_size} samples an update",
            f"updates: {config.num_update_steps_per_epoch} an epoch, {config.num_update_steps} in {config.num_epochs} epochs",
            f"clipping: value {config.gradient_clip_value}, norm {config.gradient_clip_norm}",
        ]
    lines.append("callbacks, in the order in which they are called:")
    lines += [f"  {describe_callback(callback, callbacks)}" for callback in callbacks]
    return "\n".join(lines)
