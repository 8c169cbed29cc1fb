"""PredictionMetricsCallback on one process and on several."""

from functools import partial
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    MetricsCallback,
    ModelEmaCallback,
    PredictionMetricsCallback,
    StepBasedEvaluationCallback,
)
from accel_core import ConfigurationError, Trainer
from case_runner import run_as_script

SIZES = (61, 13, 9, 2)


def data(size: int = 23) -> TensorDataset:
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    return TensorDataset(inputs, torch.arange(size) % 2)


def create_trainer(*callbacks: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=1)


def roc_auc(outputs: Any, targets: Any) -> float:
    assert not outputs.requires_grad
    return float(roc_auc_score(targets, outputs[:, 1] - outputs[:, 0]))


def order_of(outputs: Any, targets: Any) -> float:
    """Depends on the place of each output, as no common metric does."""
    return float((outputs.double()[:, 0] * torch.arange(1, len(outputs) + 1)).sum())


def boxes_of(batch: Any, batch_output: Any) -> tuple[Any, Any]:
    """As many boxes a sample as its values are positive, also none."""
    boxes = [row[row > 0] for row in batch[0]]
    return {"boxes": boxes, "scores": batch_output["model_outputs"]}, (batch[1], batch[1].tolist())


def mean_boxes(outputs: Any, targets: Any) -> float:
    assert len(outputs["boxes"]) == len(outputs["scores"]) == len(targets[0]) == len(targets[1])
    return sum(float(boxes.sum()) * (n + 1) for n, boxes in enumerate(outputs["boxes"])) / len(targets[0])


def evaluate(num_samples: int, batch_size: int) -> dict[str, float]:
    callbacks = (
        PredictionMetricsCallback({"roc_auc": roc_auc, "order": order_of}),
        PredictionMetricsCallback({"boxes": mean_boxes}, collect=boxes_of),
    )
    trainer = create_trainer(*callbacks)
    sets = {"": data(num_samples), "other": data(5)}
    return dict(trainer.evaluate(sets, per_device_batch_size=batch_size))


def fail(batch_size: int) -> str:
    """A function that fails on the main process ends the evaluation on all of them."""

    def fn(outputs: Any, targets: Any) -> float:
        raise ValueError("only one class")

    trainer = create_trainer(PredictionMetricsCallback({"roc_auc": fn}))
    with pytest.raises(ValueError, match="only one class") as raised:
        trainer.evaluate(data(9), per_device_batch_size=batch_size)
    return str(raised.value)


CASES = {**{f"evaluate {size}": partial(evaluate, size) for size in SIZES}, "fail": fail}


@pytest.mark.parametrize("size", SIZES)
def test_any_number_of_processes_gives_the_same(outcome: Any, size: int) -> None:
    expected = outcome.alone(f"evaluate {size}")
    assert {"evaluation_roc_auc", "other_evaluation_order", "evaluation_boxes"} <= set(expected)
    for result in outcome.of(f"evaluate {size}"):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_a_function_that_fails_is_reported_by_every_process(outcome: Any) -> None:
    assert outcome.of("fail") == ["only one class"] * outcome.processes


def test_the_value_is_that_of_the_whole_data_and_has_the_name_of_its_evaluation() -> None:
    callbacks = (
        PredictionMetricsCallback({"roc_auc": roc_auc}, prefix="my_"),
        ModelEmaCallback(save_path=None),
        StepBasedEvaluationCallback(2),
    )
    trainer = create_trainer(*callbacks)
    sets = {"": data(), "shifted": data(7)}
    history = trainer.train(data(), 2, sets, per_device_batch_size=5)
    with torch.no_grad():
        for prefix, size in (("", 23), ("shifted_", 7)):
            inputs, targets = data(size).tensors
            found = history.get_metric_values(f"{prefix}my_roc_auc")
            assert len(found) == 2
            assert found[-1] == pytest.approx(roc_auc(trainer.model(inputs), targets))
    names = history.get_metric_names()
    assert {"ema_model_my_roc_auc", "intermediate_my_roc_auc", "shifted_intermediate_my_roc_auc"} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": roc_auc}, r"metrics is .*dict of functions by name. Pass \{'roc_auc'"),
        ({"metrics": {}}, r"metrics is \{\}.*dict of functions"),
        ({"metrics": {"roc_auc": 3}}, "metrics is .*'roc_auc': 3.*dict of functions"),
        ({"metrics": {"a": roc_auc}, "collect": 3}, "collect is 3.*collect=lambda"),
        ({"metrics": {"a": roc_auc}, "prefix": 3}, "prefix is 3.*string.*'test_'"),
        ({"metrics": {"a": roc_auc}, "on": "train"}, "on is 'train'.*evaluations only.*MetricsCallback"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PredictionMetricsCallback(**arguments)


@pytest.mark.parametrize(
    ("fn", "collect", "message"),
    [
        (lambda outputs, targets: outputs[:3], None, "metric 'm' is .*must be one number.*float"),
        (roc_auc, lambda batch, output: batch[1], "collect returned .*tuple of outputs and targets"),
        (roc_auc, lambda batch, output: (output["loss"], batch[1]), "outputs of a batch are .*collect="),
        (
            roc_auc,
            lambda batch, output: (batch[0], batch[0][:, : len(batch[0])]),
            r"targets .*shapes \[\(3,\), \(4,\)\].*lists of one item a sample",
        ),
    ],
)
def test_what_cannot_be_joined_or_recorded_is_refused(fn: Any, collect: Any, message: str) -> None:
    trainer = create_trainer(PredictionMetricsCallback({"m": fn}, collect))
    with pytest.raises(ConfigurationError, match=message):
        trainer.evaluate(data(), per_device_batch_size=5)


def test_a_batch_without_targets_in_second_place_is_refused() -> None:
    trainer: Any = None
    with pytest.raises(ConfigurationError, match=r"batch is a dict.*without collect.*collect=lambda"):
        PredictionMetricsCallback({"m": roc_auc}).on_eval_step_end(trainer, {"x": 1}, {"model_outputs": 1})


def test_no_two_metrics_may_have_one_name() -> None:
    accuracy = MetricsCallback({"accuracy": MulticlassAccuracy(2)})
    callback = PredictionMetricsCallback({"accuracy": roc_auc})
    with pytest.raises(ConfigurationError, match=r"PredictionMetricsCallback.*'accuracy'.*prefix"):
        create_trainer(accuracy, callback).train(data(), 1, data())
    sets = {"": data(), "a": data()}
    callback = PredictionMetricsCallback({"m": roc_auc, "a_m": roc_auc})
    with pytest.raises(ConfigurationError, match="Two evaluation sets record 'a_m'"):
        create_trainer(callback).train(data(), 1, sets)


if __name__ == "__main__":
    run_as_script(CASES)
