"""Models, data, callbacks and trainers small enough to train a hundred times in a test."""

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues

ONE_CYCLE = partial(
    torch.optim.lr_scheduler.OneCycleLR,
    max_lr=0.3,
    total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
    base_momentum=0.5,
)


def tiny_data(size: int = 37, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """`size` samples of five numbers, in two classes."""
    inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs.to(dtype), (inputs.sum(1) > 0).long())


class Stream(IterableDataset[Any]):
    """The samples of `data` in their order; of no known number."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self.data)))


class Sized(Dataset[Any]):
    """Each sample is the size that the data set has just now. It stands here since workers that are spawned import it."""

    size = 1

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(self.size)]), torch.zeros(1)


class Drawing(Dataset[Any]):
    """Draws from the global random state whenever it is read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.randn(5, dtype=torch.float64) + index, index % 2


def tiny_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same weights at each call; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def linear_of_constants(num_inputs: int) -> nn.Linear:
    """A layer from `num_inputs` numbers to one, with the same weights at each call."""
    layer = nn.Linear(num_inputs, 1)
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.bias.fill_(0.0)
    return layer


def optimizer_of_rates(*rates: float, optimizer_class: Any = torch.optim.SGD, **kwargs: Any) -> Any:
    """An optimizer with a group of parameters for each learning rate."""
    return optimizer_class([{"params": nn.Linear(2, 2).parameters(), "lr": rate} for rate in rates], **kwargs)


def values_of(optimizer: Any, field: str = "lr") -> list[Any]:
    """The value of `field`, by default the learning rate, in each group of parameters."""
    return [group[field] for group in optimizer.param_groups]


class CountsTargets(Trainer):
    """For collate functions that drop samples: the step says how many are left."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {**super().calculate_train_batch_loss(batch), "batch_size": len(batch[1])}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {**super().calculate_eval_batch_loss(batch), "batch_size": len(batch[1])}


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


def assert_same_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """The same names with tensors that are equal to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


class Malicious:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


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


class EvaluateInMidEpoch(TrainerCallback):
    """Evaluates after each update; the model has to be in train mode again afterwards."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        trainer.run_eval_epoch(is_intermediate=True, metric_prefix="intermediate_eval")
        assert all(module.training for module in trainer.model.modules())


class RecordWanted(TrainerCallback):
    """Records given values under the name "wanted", one an epoch; None stands for none."""

    def __init__(self, *values: float | None) -> None:
        self.values = values

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        value = self.values[trainer.run_history.current_epoch - 1]
        if value is not None:
            trainer.run_history.update_metric("wanted", value)


class Rates(TrainerCallback):
    """Keeps the learning rate of each group of parameters with which each update is made."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        self.rates.append(values_of(trainer.optimizer))

    @property
    def of_first_group(self) -> list[float]:
        """Those of the first group."""
        return [rates[0] for rates in self.rates]


class Killed(Dataset[Any]):
    """Ends the process that reads its fifth sample, unless that is the main one. Spawned workers import it from here."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.main = os.getpid()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == 4 and os.getpid() != self.main:
            os.kill(os.getpid(), self.number) if self.number else os._exit(3)
        return torch.tensor([float(index)]), torch.zeros(1)


class KilledStream(IterableDataset[Any]):
    """The same without an index."""

    def __init__(self, number: int) -> None:
        self.data = Killed(number)

    def __iter__(self) -> Iterator[Any]:
        return (self.data[index] for index in range(len(self.data)))
