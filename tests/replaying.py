"""Runs to be replayed: data with an index that draws, a model with dropout and batch norm, and what was seen."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from accel_callbacks import ModelEmaCallback, SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues

ONE_CYCLE = partial(
    torch.optim.lr_scheduler.OneCycleLR,
    max_lr=0.05,
    total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
)


class Numbered(Dataset[Any]):
    """Each sample is noisy numbers, their class, and its own index."""

    def __init__(self, size: int = 44) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(size, 5, generator=generator)
        self.targets = (self.inputs.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.inputs[index] + 0.1 * torch.randn(5), self.targets[index], index


class IgnoresIndex(Trainer):
    """Its batches have the index as a third element."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss(batch[:2])

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_eval_batch_loss(batch[:2])


class Recording(TrainerCallback):
    """Keeps of each update the batches, losses and outputs of this process, and the gradients."""

    order = 10**8
    runs_in_replay = False

    def __init__(self) -> None:
        self.updates: dict[int, dict[str, Any]] = {}
        self.steps: list[Any] = []

    def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, step: int) -> None:
        outputs = batch_output["model_outputs"].detach()
        self.steps.append((batch, batch_output["loss"].item(), outputs))

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        named = trainer.get_model().named_parameters()
        gradients = {name: parameter.grad.clone() for name, parameter in named}
        update = trainer.run_progress.updates_completed + 1
        self.updates[update] = {"steps": self.steps, "gradients": gradients}
        self.steps = []


def numbered_trainer(callbacks: Any = (), seed: int | None = 3, norm: bool = True) -> Trainer:
    """A trainer whose updates depend on random numbers and buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(8) if norm else nn.Identity()
        model = nn.Sequential(nn.Linear(5, 8), middle, nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return IgnoresIndex(model, nn.CrossEntropyLoss(), optimizer, callbacks=callbacks, seed=seed)


def saving(folder: Path, every: int) -> SaveTrainingStateCallback:
    return SaveTrainingStateCallback(folder, save_every_n_updates=every, keep_last=100)


def averaging() -> ModelEmaCallback:
    return ModelEmaCallback(decay=0.9)


def assert_equals_recording(result: Any, recordings: list[dict[str, Any]]) -> None:
    """The result of a replay is what a recording of each process saw of that update."""
    steps = [step for recording in recordings for step in recording["steps"]]
    batches = result.batch if len(steps) > 1 else [result.batch]
    outputs = result.model_outputs if len(steps) > 1 else [result.model_outputs]
    assert len(batches) == len(steps)
    for (batch, _, output), replayed, replayed_output in zip(steps, batches, outputs, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(batch, replayed, strict=True))
        assert torch.equal(output, replayed_output)
    assert result.indices == torch.cat([batch[2] for batch, _, _ in steps]).tolist()
    sizes = [len(batch[2]) for batch, _, _ in steps]
    losses = [loss * size for (_, loss, _), size in zip(steps, sizes, strict=True)]
    assert result.loss == (steps[0][1] if len(steps) == 1 else sum(losses) / sum(sizes))
    for name, gradient in recordings[0]["gradients"].items():
        assert torch.equal(gradient, result.gradients[name]), name
        assert torch.equal(gradient, dict(result.model.named_parameters())[name].grad)
