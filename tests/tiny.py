"""Models, data and trainers small enough to train a hundred times in a test."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import Trainer, TrainerCallback


def tiny_data(size: int = 37, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """`size` samples of five numbers, in two classes."""
    inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), (inputs.sum(1) > 0).long())


def tiny_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights at each call; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def tiny_trainer(
    trainer_class: type[Trainer] = Trainer,
    callbacks: Any = (),
    *,
    lr: float = 0.1,
    model: nn.Module | None = None,
    loss_func: Any = nn.functional.cross_entropy,
    seed: int | None = 3,
    **kwargs: Any,
) -> Trainer:
    """A trainer with plain SGD."""
    model = tiny_network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return trainer_class(model, loss_func, optimizer, callbacks=callbacks, seed=seed, **kwargs)


def weights_of(trainer: Trainer) -> torch.Tensor:
    """All parameters of the model in one tensor."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def largest_difference(one: Trainer, other: Trainer) -> float:
    """Between the parameters of two trainers."""
    return float((weights_of(one) - weights_of(other)).abs().max())


class Seen(TrainerCallback):
    """Keeps the first number of each sample that was trained on, in order."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.samples += batch[0].reshape(len(batch[0]), -1)[:, 0].tolist()


class SaveAt(TrainerCallback):
    """Saves the training state once, after update `update`."""

    order = 1000
    """After all others, so that their state is that of the same moment."""

    def __init__(self, update: int, folder: Path) -> None:
        self.update = update
        self.folder = folder

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.update:
            trainer.save_training_state(self.folder)


class Rates(TrainerCallback):
    """Keeps the learning rate of each group of parameters with which each update is made."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizer.param_groups])
