"""What is measured: the same model, data and loss for every loop, and a clock inside the model.

A *chunk* is one training run, or one evaluation, of a fresh model. The clock runs from one forward to
another, so that it sees the loop and nothing of its beginning and end, and every loop is measured at the same
place.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

WARM_UP_FORWARDS = 20


class Clock:
    """Wall and CPU time between two forwards."""

    def __init__(self, num_forwards: int) -> None:
        self.num_forwards = num_forwards
        self.forwards = 0
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.forwards += 1
        if self.forwards in (WARM_UP_FORWARDS, self.num_forwards):
            self.marks.append((time.perf_counter(), time.process_time()))

    def seconds_per_forward(self) -> tuple[float, float]:
        """Wall and CPU time of a forward and all that belongs to it."""
        if self.forwards != self.num_forwards:
            raise RuntimeError(f"The loop did {self.forwards} forwards instead of {self.num_forwards}.")
        (wall, cpu), (wall_end, cpu_end) = self.marks
        steps = self.num_forwards - WARM_UP_FORWARDS
        return (wall_end - wall) / steps, (cpu_end - cpu) / steps


class ClockedModel(torch.nn.Sequential):
    """Ticks before each forward."""

    clock: Clock | None = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.clock is not None:
            self.clock.tick()
        return super().forward(inputs)


class Pairs(Dataset[Any]):
    """Any map-style data set: a sample at a time, by `__getitem__`."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a chunk consists of."""

    title: str
    target: float | None
    """The ratio that the project set itself; None where it set none."""
    kind: str = "train"
    """`train` or `eval`."""
    model: str = "mlp"
    in_memory: bool = True
    steps: int = 600
    epochs: int = 1
    eval_steps: int = 0
    batch_size: int = 32
    accumulation: int = 1
    clip_norm: float | None = None
    schedule: bool = False
    bar: bool = False
    accuracy: bool = False
    processes: int = 1

    @property
    def num_forwards(self) -> int:
        """Forwards of one process in a chunk."""
        return self.epochs * (self.steps + self.eval_steps)

    @property
    def unit(self) -> int:
        """Forwards in what is reported: 1, or 2 where it is an epoch of one step and one evaluation step."""
        return 2 if self.eval_steps == 1 else 1


_TRAIN = Workload("MLP train step, TensorDataset", 0.88)
_ANY = dataclasses.replace(_TRAIN, title="MLP train step, any map-style data", target=1.03, in_memory=False)
_EVAL = Workload("eval step, TensorDataset", 0.70, kind="eval", steps=1200)
_EVAL_ANY = dataclasses.replace(_EVAL, title="eval step, any map-style data", target=1.03, in_memory=False)

WORKLOADS: dict[str, Workload] = {
    "train": _TRAIN,
    "train_any": _ANY,
    "bar": dataclasses.replace(
        _TRAIN, title="MLP train step with progress bar, TensorDataset", target=0.92, bar=True
    ),
    "bar_any": dataclasses.replace(
        _ANY, title="MLP train step with progress bar, any data", target=1.06, bar=True
    ),
    "eval": _EVAL,
    "eval_any": _EVAL_ANY,
    "accuracy": dataclasses.replace(
        _EVAL, title="eval step with accuracy, TensorDataset", target=0.80, accuracy=True, steps=600
    ),
    "accuracy_any": dataclasses.replace(
        _EVAL_ANY, title="eval step with accuracy, any data", target=1.03, accuracy=True, steps=600
    ),
    "epoch": dataclasses.replace(
        _TRAIN, title="epoch of 1 + 1 steps, TensorDataset", target=1.10, steps=1, eval_steps=1, epochs=300
    ),
    "epoch_any": dataclasses.replace(
        _ANY, title="epoch of 1 + 1 steps, any data", target=1.10, steps=1, eval_steps=1, epochs=300
    ),
    "convnet": Workload("convnet train step", 1.02, model="convnet", steps=80),
    "accumulation": dataclasses.replace(
        _TRAIN, title="accumulation of 4, TensorDataset", target=1.03, accumulation=4
    ),
    "accumulation_any": dataclasses.replace(
        _ANY, title="accumulation of 4, any data", target=None, accumulation=4
    ),
    "clipping": dataclasses.replace(
        _TRAIN, title="clipping by norm, TensorDataset", target=1.03, clip_norm=1.0
    ),
    "clipping_any": dataclasses.replace(_ANY, title="clipping by norm, any data", target=None, clip_norm=1.0),
    "schedule": dataclasses.replace(_TRAIN, title="a scheduler, TensorDataset", target=1.03, schedule=True),
    "schedule_any": dataclasses.replace(_ANY, title="a scheduler, any data", target=None, schedule=True),
    "processes": dataclasses.replace(
        _TRAIN,
        title="MLP train step, 2 processes on gloo, TensorDataset",
        target=1.03,
        processes=2,
        steps=400,
    ),
    "processes_any": dataclasses.replace(
        _ANY, title="MLP train step, 2 processes on gloo, any data", target=1.06, processes=2, steps=400
    ),
}


class Task:
    """Everything that a loop needs for one chunk."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        torch.manual_seed(0)
        self.model = _convnet() if workload.model == "convnet" else _mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loss_func = torch.nn.CrossEntropyLoss()
        self.train_data = _data(workload, workload.steps)
        self.eval_data = _data(workload, workload.eval_steps) if workload.eval_steps else None

    def start_clock(self) -> Clock:
        self.model.clock = Clock(self.workload.num_forwards)
        return self.model.clock

    def create_scheduler(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, _factor)

    def final_loss(self) -> float:
        """Loss of the model as it is, on fixed data: equal for loops that did the same work."""
        self.model.clock = None
        inputs, targets = _tensors(self.workload, 256)
        with torch.no_grad():
            return float(self.loss_func(self.model.eval()(inputs), targets))


def _factor(update: int) -> float:
    return 1 / (1 + update / 1000)


def _mlp() -> ClockedModel:
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return ClockedModel(linear(784, 128), relu(), linear(128, 64), relu(), linear(64, 10))


def _convnet() -> ClockedModel:
    conv, relu = torch.nn.Conv2d, torch.nn.ReLU
    return ClockedModel(
        *(torch.nn.Unflatten(1, (1, 28, 28)), conv(1, 16, 3, padding=1), relu(), torch.nn.MaxPool2d(2)),
        *(
            conv(16, 32, 3, padding=1),
            relu(),
            torch.nn.AdaptiveAvgPool2d(4),
            torch.nn.Flatten(),
            torch.nn.Linear(512, 10),
        ),
    )


_cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _tensors(workload: Workload, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    if num_samples not in _cache:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(num_samples, 784, generator=generator)
        _cache[num_samples] = inputs, inputs[:, :10].argmax(1)
    return _cache[num_samples]


def _data(workload: Workload, steps: int) -> Dataset[Any]:
    tensors = _tensors(workload, steps * workload.batch_size * workload.processes)
    return TensorDataset(*tensors) if workload.in_memory else Pairs(*tensors)
