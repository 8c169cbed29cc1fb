"""Each way out that a note on an error of torch, or of the user's, names works: the mistake is made, then what it says.

A note is added where the error stays what it is. The notes are read from the code, so that a new one fails here.
"""

import ast
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from accel_core import Trainer
from accel_core.run import batch_output
from accel_integrations.schedulers import StatefulSchedulerBase
from tiny import tiny_data, tiny_trainer
from ways_out import (
    DATA,
    PACKAGES,
    Row,
    make_mistake_and_ways_out,
    meanings_in,
    name_of,
    texts_in,
    train,
    training,
)

SEVENTEEN = tiny_data(17)
NO_ROOM = 8
"""Samples that all workers together may hold, where the system kills whoever wants more."""


def fit(model: Any = None, loss_func: Any = nn.functional.cross_entropy, **kwargs: Any) -> Trainer:
    model = nn.Linear(5, 2).double() if model is None else model
    kind = kwargs.pop("kind", Trainer)
    make = kwargs.pop("optimizer_class", torch.optim.SGD)
    trainer: Trainer = kind(model, loss_func, make(model.parameters(), lr=0.01), (), seed=3)
    return train(trainer, **kwargs)


def normalised(**kwargs: Any) -> Callable[[], Trainer]:
    """Train a model with batch norm on 17 samples."""
    return lambda: fit(nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)).double(), data=SEVENTEEN, **kwargs)


class Lengths(Dataset[Any]):
    """Samples of different lengths."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        length = self.lengths[index % len(self.lengths)]
        return torch.ones(length, dtype=torch.float64), index % 2


class Mean(nn.Module):
    """Takes inputs of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs.mean(1, keepdim=True))  # type: ignore[no-any-return]


def padded(samples: list[Any]) -> Any:
    inputs, targets = zip(*samples, strict=True)
    return pad_sequence(inputs, batch_first=True), torch.tensor(targets)


class ByClosure(Trainer):
    """Steps LBFGS as the note says."""

    def optimizer_step(self) -> None:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.loss_func(self.model(DATA.tensors[0]), DATA.tensors[1])
            loss.backward()
            return loss  # type: ignore[no-any-return]

        self.optimizer.step(closure)


class Hungry(Dataset[Any]):
    """Lets its worker be killed if all of them would hold too much, as a system does that has no memory."""

    def __init__(self, held: int, ahead: int) -> None:
        self.held, self.ahead = held, ahead

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return DATA[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        worker = get_worker_info()
        if worker and worker.num_workers * self.ahead * len(indices) * self.held > NO_ROOM:
            os.kill(os.getpid(), signal.SIGKILL)
        return [DATA[index] for index in indices]


class OwnLoader(DataLoader[Any]):
    """Is read as it is, so that what torch says of a lost worker arrives."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


def feed(held: int = 1, workers: int = 2, ahead: int = 2, batch_size: int = 4) -> None:
    data = Hungry(held, ahead)
    tiny_trainer().train(OwnLoader(data, batch_size, num_workers=workers, prefetch_factor=ahead), 1)


class Sample:
    """What the default collate function does not know."""

    def __init__(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        self.pair = (inputs, target)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return Sample(*DATA[index])


class FailsAt(Dataset[Any]):
    """Cannot read one of its samples."""

    def __init__(self, failing: int | None) -> None:
        self.failing = failing

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if index == self.failing:
            raise KeyError("no such file")
        return DATA[index]


def read_alone(index: int) -> None:
    """The very error comes up without accel."""
    with pytest.raises(KeyError, match="no such file"):
        FailsAt(index)[index]


class OwnLoss(Trainer):
    """Fits the targets to the outputs in a step of its own."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0])
        loss = self.loss_func(outputs, nn.functional.one_hot(batch[1], 2).double())
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}


BINARY = nn.functional.binary_cross_entropy_with_logits
FLOATS = TensorDataset(DATA.tensors[0], nn.functional.one_hot(DATA.tensors[1], 2).double())


class Asks(StatefulSchedulerBase):
    """Reads an attribute for its first value."""

    def __init__(self, optimizer: Any, is_before: bool) -> None:
        if is_before:
            self.rate = 0.5
        super().__init__(optimizer)
        self.rate = 0.5

    def get_updated_values(self, num_updates: int) -> list[float]:
        return [self.rate]


ROWS = (
    Row(
        "Batch norm cannot train on a batch of one sample",
        normalised(),
        (
            normalised(train_dataloader_kwargs={"drop_last": True}),
            normalised(per_device_batch_size=5),
        ),
    ),
    Row(
        "The samples of a batch differ in shape",
        lambda: fit(Mean(), data=Lengths(3, 4)),
        (lambda: fit(Mean(), data=Lengths(3, 4), collate_fn=padded), lambda: fit(Mean(), data=Lengths(3))),
    ),
    Row(
        "The optimizer computes the loss several times an update",
        lambda: fit(optimizer_class=torch.optim.LBFGS),
        (lambda: fit(optimizer_class=torch.optim.LBFGS, kind=ByClosure),),
    ),
    Row(
        "A worker of the data was killed or has ended by itself.",
        feed,
        (
            partial(feed, workers=1),
            partial(feed, batch_size=2),
            partial(feed, ahead=1),
            partial(feed, held=0),
        ),
    ),
    Row(
        "The default collate_fn cannot join what the data set returns.",
        lambda: fit(data=Samples()),
        (
            lambda: fit(
                data=Samples(),
                collate_fn=lambda samples: default_collate([sample.pair for sample in samples]),
            ),
            training(),
        ),
    ),
    Row(
        "loss_func was given the model's outputs, {}, with the targets, {}.",
        lambda: fit(loss_func=BINARY),
        (
            lambda: fit(loss_func=BINARY, data=FLOATS),
            lambda: fit(loss_func=BINARY, kind=OwnLoss),
        ),
    ),
    Row(
        "accel was reading {} of a {}{}. Try {} on its own; ",
        lambda: train(data=FailsAt(3)),
        (partial(read_alone, 3), lambda: train(data=FailsAt(None))),
        says="Try dataset[3] on its own",
    ),
    Row(
        "create_scheduler_fn could not build {} from the optimizer alone.",
        training(create_scheduler_fn=StepLR),
        (training(create_scheduler_fn=partial(StepLR, step_size=2)),),
    ),
    Row(
        "The constructor of StatefulSchedulerBase asks for the first value.",
        training(create_scheduler_fn=lambda optimizer: Asks(optimizer, is_before=False)),
        (training(create_scheduler_fn=lambda optimizer: Asks(optimizer, is_before=True)),),
    ),
)
ELSEWHERE = {
    "Some parameters that are trained got no gradient": "accel-core/test_unused_parameters.py",
    "{} waited, {}, in {}. Another process has ended": "promises/test_gathering_and_waiting.py",
}
"""Notes on several processes, and the tests that make them."""
FACTS = {
    "{} saves in a row have failed": "says why the run ends",
    "Another callback failed while closing": "the error of another callback",
    "While closing, a callback failed too": "the error of another callback",
    "{} was received too: a run that this process still begins stops at once.": "what a signal does",
}


def texts_of_notes() -> Iterator[str]:
    yield from batch_output._WAYS_OUT.values()
    for file in sorted(PACKAGES.rglob("src/**/*.py")):
        module = ast.parse(file.read_text())
        meanings = meanings_in(module)
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_note"):
                found = list(texts_in(node.args[0], meanings))
                # Of the table, whose texts come first.
                assert found or ast.unparse(node.args[0]) == "way_out", f"{file}: {ast.unparse(node)}"
                yield from found


def test_every_note_is_known() -> None:
    texts = list(texts_of_notes())
    known = [*(row.text for row in ROWS), *ELSEWHERE, *FACTS]
    assert [text for text in texts if not any(piece in text for piece in known)] == []
    assert [piece for piece in known if not any(piece in text for text in texts)] == []
    assert [name for name in ELSEWHERE.values() if not (Path(__file__).parents[1] / name).is_file()] == []


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_a_note_says_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
