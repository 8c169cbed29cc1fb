"""Each way out works that an error of a loss step names, or the note on an error of torch within a step."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from accel_core import Trainer
from tiny import tiny_data, tiny_network, tiny_trainer
from ways_out import DATA, Row, make_mistake_and_ways_out, name_of, train, training

LOSS = nn.functional.cross_entropy


# ---------------------------------------------------------------------- loss steps


def step(**changes: Any) -> Trainer:
    """A trainer whose step returns what is usual, but for `changes`, functions of the loss."""

    def calculate_train_batch_loss(self: Trainer, batch: Any) -> Any:
        outputs = self.model(batch[0])
        loss = LOSS(outputs, batch[1])
        returned = {"loss": loss, "model_outputs": outputs, "batch_size": len(outputs)}
        returned.update({key: change(loss) for key, change in changes.items()})
        return {key: value for key, value in returned.items() if value is not None}

    own = {"calculate_train_batch_loss": calculate_train_batch_loss}
    return tiny_trainer(type("OwnTrainer", (Trainer,), own))


def stepping(**changes: Any) -> Callable[[], Trainer]:
    return lambda: train(step(**changes))


def returning_a_tensor() -> Trainer:
    own = {"calculate_train_batch_loss": lambda self, batch: self.model(batch[0]).sum()}
    return train(tiny_trainer(type("OwnTrainer", (Trainer,), own)))


STEPS: tuple[Row, ...] = (
    Row(
        "{} returned {}, but must return a dictionary. Return the keys 'loss', 'model_outputs' and",
        returning_a_tensor,
        (stepping(),),
    ),
    Row(
        "{} returned the keys {}, but {} is missing. Return {}.",
        stepping(batch_size=lambda loss: None),
        (stepping(),),
    ),
    Row(
        "{} returned {} as 'loss', but it must be a scalar tensor. Take the mean: loss.mean().",
        stepping(loss=lambda loss: loss.expand(4)),
        (stepping(loss=lambda loss: loss.expand(4).mean()),),
    ),
    Row(
        "{} returned {} as {}, but it must be a number of at least {}, such as len(xb). Return the number",
        stepping(batch_size=lambda loss: 0),
        (stepping(batch_size=lambda loss: 4), stepping(num_items_in_batch=lambda loss: 12)),
    ),
    Row(
        "{} returned {} as 'log', but it must be a dictionary of numbers or tensors of one element.",
        stepping(log=lambda loss: {"losses": loss.expand(4)}),
        (
            stepping(log=lambda loss: {"losses": loss.expand(4).mean()}),
            stepping(losses=lambda loss: loss.expand(4)),
        ),
    ),
    Row(
        "as 'progress', but it must be a dictionary of numbers, tensors of one element or texts, which the "
        "progress bar shows beside the loss. Return, for example, {'accuracy': accuracy} as 'progress'.",
        stepping(progress=lambda loss: 0.5),
        (stepping(progress=lambda loss: {"accuracy": 0.5}),),
    ),
    Row(
        "{} returned a 'loss' without a gradient, so nothing could be learned. Compute it from the model's",
        stepping(loss=lambda loss: loss.detach()),
        (stepping(),),
    ),
    Row(
        "{} returned the loss {} for the first batch, but it must be finite. Look for nan or inf in the data",
        lambda: train(data=TensorDataset(torch.full((8, 5), torch.nan).double(), DATA.tensors[1][:8])),
        (training(), stepping(loss=lambda loss: (loss + 1e-6).log())),
    ),
    Row(
        "Leave out samples without items, or return a batch_size or num_items_in_batch above 0.",
        stepping(num_items_in_batch=lambda loss: 0),
        (stepping(num_items_in_batch=lambda loss: 1), stepping(batch_size=lambda loss: 1)),
    ),
)

# ---------------------------------------------------------------------- notes on errors of torch


def with_batch_norm(**kwargs: Any) -> Trainer:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    return train(tiny_trainer(model=model), tiny_data(9), **kwargs)


RAGGED = [(inputs[: 3 + index % 3], target) for index, (inputs, target) in enumerate(DATA)]
PLAIN_OBJECTS = [(object(), target) for _, target in DATA]


def pad(samples: Any) -> Any:
    padded = [nn.functional.pad(inputs, (0, 5 - len(inputs))) for inputs, _ in samples]
    return torch.stack(padded), torch.stack([target for _, target in samples])


def joined(samples: Any) -> Any:
    return torch.zeros(len(samples), 5).double(), torch.stack([target for _, target in samples])


class WithClosure(Trainer):
    """Gives the optimizer a closure over the batch of the update."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.batch = batch
        return super().calculate_train_batch_loss(batch)

    def optimizer_step(self) -> None:
        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.calculate_train_batch_loss(self.batch)["loss"]
            loss.backward()
            return loss

        self.optimizer.step(closure)


def by_lbfgs(kind: type[Trainer]) -> Trainer:
    model = tiny_network()
    return train(kind(model, LOSS, torch.optim.LBFGS(model.parameters()), callbacks=()))


NOTES: tuple[Row, ...] = (
    Row(
        "Pass train_dataloader_kwargs={'drop_last': True}, or another per_device_batch_size.",
        with_batch_norm,
        (
            lambda: with_batch_norm(train_dataloader_kwargs={"drop_last": True}),
            lambda: with_batch_norm(per_device_batch_size=3),
        ),
    ),
    Row(
        "Pass a collate_fn that pads them, or give the samples one shape.",
        training(data=RAGGED),
        (training(data=RAGGED, collate_fn=pad), training()),
    ),
    Row(
        "Override optimizer_step: define the closure there, and call self.optimizer.step(closure).",
        lambda: by_lbfgs(Trainer),
        (lambda: by_lbfgs(WithClosure),),
    ),
    Row(
        "Pass your own collate_fn, or return tensors, numbers, strings, tuples, lists or dictionaries.",
        training(data=PLAIN_OBJECTS),
        (training(data=PLAIN_OBJECTS, collate_fn=joined), training()),
    ),
    Row(
        "Fit them to each other, or override calculate_train_batch_loss.",
        lambda: train(tiny_trainer(loss_func=nn.BCEWithLogitsLoss())),
        (training(), stepping()),
    ),
    Row(
        "create_scheduler_fn could not build StepLR from the optimizer alone. Pass functools.partial(StepLR",
        training(create_scheduler_fn=StepLR),
        (training(create_scheduler_fn=functools.partial(StepLR, step_size=1)),),
    ),
)

ROWS = STEPS


@pytest.mark.parametrize("row", STEPS + NOTES, ids=name_of)
def test_what_an_error_of_a_step_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
