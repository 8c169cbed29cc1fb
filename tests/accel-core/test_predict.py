"""Predictions: the structure of one batch, joined in the order of the data, on the CPU."""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback

SIZE = 11
INPUTS = torch.arange(SIZE, dtype=torch.float32).reshape(SIZE, 1)
DATA = TensorDataset(INPUTS, torch.zeros(SIZE, 1))


class Pair(NamedTuple):
    logits: torch.Tensor
    embeddings: torch.Tensor


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Predicting(Trainer):
    """Predicts what `make` makes of the inputs."""

    def __init__(self, make: Any) -> None:
        super().__init__(nn.Linear(1, 1), None, None, callbacks=[])
        self.make = make

    def calculate_predictions(self, batch: Any) -> Any:
        return self.make(batch[0])


def predicted(make: Any) -> Any:
    return Predicting(make).predict(DATA, per_device_batch_size=4)


def test_predictions_are_those_of_the_model_in_the_order_of_the_data() -> None:
    model = nn.Linear(1, 2)
    outputs = Trainer(model, None, None, callbacks=[]).predict(DATA, per_device_batch_size=4)
    assert torch.equal(outputs, model(INPUTS).detach())
    assert not outputs.requires_grad
    assert outputs.device.type == "cpu"


@pytest.mark.parametrize("data", [INPUTS, DataLoader(INPUTS, batch_size=3), (row for row in INPUTS)])
def test_a_batch_that_is_no_tuple_is_given_to_the_model_as_it_is(data: Any) -> None:
    joined = {"batch_size": 8} if isinstance(data, Iterator) else None
    outputs = Trainer(nn.Identity(), None, None, callbacks=[]).predict(data, dataloader_kwargs=joined)
    assert torch.equal(outputs, INPUTS)


def test_mappings_are_given_to_the_model_as_they_are() -> None:
    class OfMapping(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return batch["x"] * 2

    outputs = Trainer(OfMapping(), None, None, callbacks=[]).predict([{"x": row} for row in INPUTS])
    assert torch.equal(outputs, INPUTS * 2)


def test_nested_outputs_keep_their_structure() -> None:
    outputs = predicted(
        lambda x: {"a": (x, [x + 1, x[:, 0]]), "none": None, "names": [f"n{int(v)}" for v in x]}
    )
    assert torch.equal(outputs["a"][0], INPUTS)
    assert isinstance(outputs["a"], tuple)
    assert torch.equal(outputs["a"][1][0], INPUTS + 1)
    assert outputs["a"][1][1].shape == (SIZE,)
    assert outputs["none"] is None
    assert outputs["names"] == [f"n{i}" for i in range(SIZE)]


def test_named_tuples_dataclasses_and_kinds_of_mappings_keep_their_type() -> None:
    pair = predicted(lambda x: Pair(x, x + 1))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.embeddings, INPUTS + 1)
    output = predicted(lambda x: Output(logits=x))
    assert isinstance(output, Output)
    assert output.hidden is None
    assert torch.equal(output.logits, INPUTS)
    assert type(predicted(lambda x: OrderedDict(a=x))) is OrderedDict
    assert torch.equal(predicted(lambda x: defaultdict(list, a=x))["a"], INPUTS)


def test_outputs_of_transformers_keep_their_type() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    joined = predicted(lambda x: outputs.SequenceClassifierOutput(logits=x))
    assert isinstance(joined, outputs.SequenceClassifierOutput)
    assert torch.equal(joined.logits, INPUTS)
    assert joined.loss is None


def test_outputs_of_different_sizes_are_filled_up_where_asked_for() -> None:
    trainer = Predicting(lambda x: Output(torch.ones(len(x), len(x), 2, dtype=torch.int64)))
    trainer.prediction_padding = -100
    joined = trainer.predict(DATA, per_device_batch_size=4)
    assert joined.logits.shape == (SIZE, 4, 2)
    assert joined.logits.dtype == torch.int64
    assert (joined.logits[:8] == 1).all()
    assert (joined.logits[8:, :3] == 1).all()
    assert (joined.logits[8:, 3] == -100).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.sum(), "returned tensor.*first dimension.*dictionaries"),
        (lambda x: {"mean": 1.5}, "returned 1.5.*first dimension.*dictionaries"),
        (
            lambda x: torch.zeros(len(x), len(x)),
            r"\[\(3, 3\), \(4, 4\)\].*first dimension.*prediction_padding",
        ),
        (lambda x: [row.reshape(1) for row in x], r"\[3, 4\].*same parts.*tensors"),
    ],
)
def test_what_cannot_be_joined_is_told(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=f"calculate_predictions .*{words}"):
        predicted(make)


def test_the_model_predicts_in_eval_mode_without_gradients_and_is_put_back() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).train()
    model[0].eval()

    class Watching(Trainer):
        def calculate_predictions(self, batch: Any) -> Any:
            seen.append((self.model.training, torch.is_grad_enabled()))
            return super().calculate_predictions(batch)

    Watching(model, None, None, callbacks=[]).predict(DATA)
    assert seen == [(False, False)] * 2
    assert model.training
    assert not model[0].training


def test_predicting_leaves_data_history_and_random_state_of_the_training_run() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[]
    )
    trainer.train(DATA, num_epochs=1, eval_dataset=DATA)
    records, state, loader = trainer.run_history.to_records(), torch.get_rng_state(), trainer.eval_dataloader
    trainer.predict(TensorDataset(INPUTS[:3]))
    assert trainer.run_history.to_records() == records
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.eval_dataset is DATA
    assert trainer.eval_dataloader is loader


def test_predicting_fires_only_what_concerns_any_run() -> None:
    class Counting(TrainerCallback):
        events: list[str] = []  # noqa: RUF012

        def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            self.events.append("step")

        def on_run_close(self, trainer: Trainer) -> None:
            self.events.append("close")

    Trainer(nn.Linear(1, 1), None, None, callbacks=[Counting]).predict(DATA)
    assert Counting.events == ["close"]


def test_a_list_of_mappings_has_one_for_each_sample() -> None:
    """Detectors find another number of boxes in each image."""
    detections = predicted(
        lambda inputs: [{"boxes": torch.zeros(int(x) % 3, 4), "index": x} for x in inputs[:, 0]]
    )
    assert [int(detection["index"]) for detection in detections] == list(range(SIZE))
    assert [len(detection["boxes"]) for detection in detections] == [index % 3 for index in range(SIZE)]
