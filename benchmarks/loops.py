"""The loops of this environment: written by hand, with accelerate, and ours. Each runs one chunk of a task.

A loop that evaluates returns the mean loss; one that trains changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler
from workloads import Task

Loop = Callable[[Task], float | None]


class _Rows(Dataset[Any]):
    """Whole batches of a `TensorDataset`."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, indices: list[int]) -> list[torch.Tensor]:
        rows = torch.tensor(indices)
        return [tensor.index_select(0, rows) for tensor in self.tensors]


def raw(task: Task) -> float | None:
    """What one writes by hand."""
    return _by_hand(task, task.model, _loader)


def raw_by_index(task: Task) -> float | None:
    """By hand, with batches fetched by index."""

    def loader(task: Task, data: Any) -> DataLoader[Any]:
        rows = _Rows(data.tensors)
        return DataLoader(
            rows,
            sampler=BatchSampler(SequentialSampler(rows), task.workload.batch_size, False),
            batch_size=None,
        )

    return _by_hand(task, task.model, loader)


def raw_distributed(task: Task) -> float | None:
    """By hand on several processes."""
    return _by_hand(task, torch.nn.parallel.DistributedDataParallel(task.model), _loader)


def _loader(task: Task, data: Any) -> DataLoader[Any]:
    sampler = DistributedSampler(data, shuffle=False) if task.workload.processes > 1 else None
    return DataLoader(data, batch_size=task.workload.batch_size, shuffle=False, sampler=sampler)


def _by_hand(
    task: Task, model: torch.nn.Module, create_loader: Callable[[Task, Any], DataLoader[Any]]
) -> float | None:
    workload, loss_func, optimizer = task.workload, task.loss_func, task.optimizer
    loader = create_loader(task, task.train_data)
    if workload.kind == "eval":
        return _evaluate_by_hand(task, loader)
    eval_loader = None if task.eval_data is None else create_loader(task, task.eval_data)
    scheduler = task.create_scheduler(optimizer) if workload.schedule else None
    for _epoch in range(workload.epochs):
        model.train()
        total = 0.0
        for number, (inputs, targets) in enumerate(_with_bar(loader, workload.bar), start=1):
            loss = loss_func(model(inputs), targets)
            total += loss.item() * len(inputs)
            if workload.accumulation > 1:
                loss = loss / workload.accumulation
            loss.backward()
            if number % workload.accumulation == 0:
                if workload.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), workload.clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
        if eval_loader is not None:
            _evaluate_by_hand(task, eval_loader)
    return None


def _evaluate_by_hand(task: Task, loader: Iterable[Any]) -> float:
    accuracy = create_accuracy() if task.workload.accuracy else None
    task.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for inputs, targets in loader:
            outputs = task.model(inputs)
            total += task.loss_func(outputs, targets).item() * len(inputs)
            count += len(inputs)
            if accuracy is not None:
                accuracy.update(outputs, targets)
    if accuracy is not None:
        accuracy.compute()
    return total / count


def _with_bar(loader: Iterable[Any], wanted: bool) -> Iterable[Any]:
    if not wanted:
        return loader
    from tqdm import tqdm

    return tqdm(loader)


def create_accuracy() -> Any:
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(num_classes=10)


def plain_accelerate(task: Task) -> float | None:
    """The loop of accelerate's own documentation."""
    from accelerate import Accelerator

    workload, loss_func = task.workload, task.loss_func
    accelerator = Accelerator(gradient_accumulation_steps=workload.accumulation)
    loader = DataLoader(task.train_data, batch_size=workload.batch_size, shuffle=False)
    eval_loader = DataLoader(task.eval_data or task.train_data, batch_size=workload.batch_size)
    model, optimizer, loader, eval_loader = accelerator.prepare(
        task.model, task.optimizer, loader, eval_loader
    )
    scheduler = accelerator.prepare(task.create_scheduler(optimizer)) if workload.schedule else None

    def evaluate() -> float:
        model.eval()
        losses = []
        accuracy = create_accuracy() if workload.accuracy else None
        with torch.no_grad():
            for inputs, targets in eval_loader:
                outputs = model(inputs)
                losses.append(accelerator.gather_for_metrics(loss_func(outputs, targets).repeat(len(inputs))))
                if accuracy is not None:
                    accuracy.update(*accelerator.gather_for_metrics((outputs, targets)))
        if accuracy is not None:
            accuracy.compute()
        return float(torch.cat(losses).mean())

    if workload.kind == "eval":
        return evaluate()
    for _epoch in range(workload.epochs):
        model.train()
        total = 0.0
        for inputs, targets in _with_bar(loader, workload.bar):
            with accelerator.accumulate(model):
                loss = loss_func(model(inputs), targets)
                total += loss.item() * len(inputs)
                accelerator.backward(loss)
                if accelerator.sync_gradients and workload.clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), workload.clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
        if task.eval_data is not None:
            evaluate()
    return None


def accel_with_messages(task: Task) -> float | None:
    """Ours, but the processes agree by a message of its own after each update, as without DDP."""
    from accel_core.engines.carried_word import CarriedWord

    can_travel, CarriedWord._can_travel = CarriedWord._can_travel, lambda *_: False  # type: ignore[method-assign]
    try:
        return accel(task)
    finally:
        CarriedWord._can_travel = can_travel  # type: ignore[method-assign]


def accel(task: Task) -> float | None:
    """Ours, with the default callbacks of the package."""
    import accel_core

    workload = task.workload
    callbacks: tuple[Any, ...] = accel_core.DEFAULT_CALLBACKS
    if workload.bar:
        from accel_callbacks import DEFAULT_CALLBACKS as callbacks
    if workload.accuracy:
        from accel_callbacks import MetricsCallback

        callbacks = (MetricsCallback({"accuracy": create_accuracy()}), *callbacks)
    trainer = accel_core.Trainer(task.model, task.loss_func, task.optimizer, callbacks=callbacks)
    as_they_come = {"num_workers": 0, "shuffle": False}
    if workload.kind == "eval":
        return trainer.evaluate(task.train_data, workload.batch_size, dataloader_kwargs=as_they_come)[
            "evaluation_loss"
        ]
    trainer.train(
        task.train_data,
        num_epochs=workload.epochs,
        eval_dataset=task.eval_data,
        per_device_batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.accumulation,
        gradient_clip_norm=workload.clip_norm,
        create_scheduler_fn=task.create_scheduler if workload.schedule else None,
        train_dataloader_kwargs=as_they_come,
        eval_dataloader_kwargs=as_they_come,
    )
    return None


LOOPS: dict[str, Loop] = {
    "raw": raw,
    "raw by index": raw_by_index,
    "accelerate": plain_accelerate,
    "accel": accel,
    "accel with messages": accel_with_messages,
}
