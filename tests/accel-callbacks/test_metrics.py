"""MetricsCallback on one and on two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassRecall,
)

from accel_callbacks import MetricsCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from launching import launch


def data(size: int = 23) -> TensorDataset:
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())


def create_trainer(*callbacks: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=1)


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(2, average="micro")


def true_accuracy(model: nn.Module, size: int = 23) -> float:
    inputs, targets = data(size).tensors
    return float((model(inputs).argmax(1) == targets).double().mean())


def test_metrics_of_evaluations_and_of_evaluate_have_names_of_their_own() -> None:
    trainer = create_trainer(MetricsCallback({"accuracy": accuracy()}))
    history = trainer.train(data(), num_epochs=2, eval_dataset=data(), per_device_batch_size=5)
    assert history.get_latest_metric("accuracy") == pytest.approx(true_accuracy(trainer.model))
    metrics = trainer.evaluate(data(7), per_device_batch_size=3)
    assert metrics["evaluation_accuracy"] == pytest.approx(true_accuracy(trainer.model, 7))
    assert len(history.get_metric_values("accuracy")) == 2


def test_training_metrics_count_each_sample_of_the_epoch_and_intermediate_ones_are_kept_apart() -> None:
    class EvaluateInBetween(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 2:
                trainer.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)

    callback = MetricsCallback(
        MetricCollection({"accuracy": accuracy(), "recall": MulticlassRecall(2)}), on="both"
    )
    history = create_trainer(callback, EvaluateInBetween()).train(data(), num_epochs=1, eval_dataset=data())
    assert {"train_accuracy", "intermediate_accuracy", "accuracy", "recall"} <= history.get_metric_names()


def test_an_update_of_ones_own_sees_batch_and_output() -> None:
    def update(metric: Any, batch: Any, batch_output: Any) -> None:
        metric.update(batch_output["model_outputs"], 1 - batch[1])

    trainer = create_trainer(MetricsCallback({"error": accuracy()}, update=update, prefix="top1_"))
    history = trainer.train(data(), num_epochs=1, eval_dataset=data())
    assert history.get_latest_metric("top1_error") == pytest.approx(1 - true_accuracy(trainer.model))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"metrics": 3}, "metrics is 3.*Metric"),
        ({"metrics": {}, "on": "test"}, r"on is 'test'.*\['train', 'eval', 'both'\]"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        MetricsCallback(**arguments)


def test_metrics_of_an_epoch_go_on_from_their_state() -> None:
    first, second = (MetricsCallback({"accuracy": accuracy()}, on="train") for _ in range(2))
    output = {"model_outputs": torch.eye(2)}
    trainer: Any = None
    first.on_train_step_end(trainer, batch=(None, torch.tensor([0, 1])), batch_output=output, step=0)
    second.load_state_dict(first.state_dict())
    second.on_train_step_end(trainer, batch=(None, torch.tensor([1, 0])), batch_output=output, step=1)
    assert float(second._train_metrics["accuracy"].compute()) == 0.5


class SaveEachUpdate(TrainerCallback):
    order = 1000

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        trainer.save_training_state(self.folder / str(trainer.run_progress.updates_completed))


def test_a_run_resumed_in_mid_epoch_records_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """With sums, with lists of all that was seen, and with a collection whose members share their sums."""

    def callback() -> MetricsCallback:
        pair = MetricCollection({"f1": MulticlassF1Score(2), "recall": MulticlassRecall(2)})
        scores = MulticlassAUROC(2)
        return MetricsCallback({"accuracy": accuracy(), "auroc": scores, "pair": pair}, on="both")

    arguments: dict[str, Any] = {"num_epochs": 2, "eval_dataset": data(), "per_device_batch_size": 5}
    expected = create_trainer(callback(), SaveEachUpdate(tmp_path)).train(data(), **arguments).to_records()
    assert len(expected) == 2 * (2 + 2 * 4)
    for update in range(1, 11):
        resumed = create_trainer(callback()).train(data(), **arguments, resume_from=tmp_path / str(update))
        assert resumed.to_records() == expected, update


def test_sums_of_another_number_of_processes_are_not_counted_twice() -> None:
    first, second = (MetricsCallback({"accuracy": accuracy()}, on="train") for _ in range(2))
    trainer: Any = None
    batch = (None, torch.tensor([0, 1]))
    first.on_train_step_end(trainer, batch=batch, batch_output={"model_outputs": torch.eye(2)}, step=0)
    second.load_state_dict({**first.state_dict(), "num_processes": 2})
    assert second._train_metrics["accuracy"].update_count == 0


def test_collections_may_be_given_by_name_and_resume() -> None:
    callback = MetricsCallback(
        {"top": MetricCollection({"accuracy": accuracy(), "recall": MulticlassRecall(2)})}, on="both"
    )
    history = create_trainer(callback).train(data(), num_epochs=1, eval_dataset=data())
    assert {
        "top_accuracy",
        "top_recall",
        "train_top_accuracy",
        "train_top_recall",
    } <= history.get_metric_names()
    state = callback.state_dict()
    callback.load_state_dict(state)
    assert callback.state_dict()["metrics"]["top"][0]["updates"] == state["metrics"]["top"][0]["updates"] == 3


@pytest.mark.parametrize(
    ("metric", "name"),
    [(BinaryAUROC(), "auroc"), (MulticlassF1Score(2), "f1_score"), (MulticlassRecall(2), "recall")],
)
def test_a_metric_alone_is_named_by_its_class_without_the_task(metric: Any, name: str) -> None:
    assert list(MetricsCallback(metric)._eval_metrics) == [name]


def test_a_metric_of_each_class_is_recorded_by_class() -> None:
    trainer = create_trainer(MetricsCallback({"recall": MulticlassRecall(2, average=None)}))
    names = trainer.train(data(), num_epochs=1, eval_dataset=data()).get_metric_names()
    assert {"recall_0", "recall_1"} <= names


def test_a_step_without_outputs_is_reported() -> None:
    class WithoutOutputs(Trainer):
        def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
            output = super().calculate_eval_batch_loss(batch)
            return {key: value for key, value in output.items() if key != "model_outputs"}

    model = create_trainer().model
    trainer = WithoutOutputs(
        model, nn.CrossEntropyLoss(), None, callbacks=[MetricsCallback({"accuracy": accuracy()})]
    )
    with pytest.raises(
        ConfigurationError, match=r"keys \['loss', 'batch_size'.*need 'model_outputs'.*or pass update\."
    ):
        trainer.evaluate(data())


def test_a_batch_without_targets_in_second_place_is_reported() -> None:
    callback = MetricsCallback({"accuracy": accuracy()})
    trainer: Any = None
    with pytest.raises(ConfigurationError, match=r"batch is a dict.*batch\[1\].*update=lambda"):
        callback.on_eval_step_end(trainer, batch={"x": 1}, batch_output={"model_outputs": torch.eye(2)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metrics": {"accuracy": 3}},
            r"metrics is \{'accuracy': 3\}.*torchmetrics Metric.*MulticlassAccuracy\(",
        ),
        (
            {"metrics": MulticlassAccuracy},
            "metrics is .*class MulticlassAccuracy.*torchmetrics Metric.*Pass ",
        ),
        ({"metrics": accuracy(), "update": 3}, "update is 3.*function.*update=lambda"),
        ({"metrics": accuracy(), "prefix": 3}, "prefix is 3.*string.*'test_'"),
        (
            {"metrics": accuracy(), "on": "evaluation"},
            r"on is 'evaluation'.*\['train', 'eval', 'both'\].*Did you mean 'eval'",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_reported(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        MetricsCallback(**arguments)


def test_two_callbacks_may_not_record_under_one_name() -> None:
    collection = MetricCollection({"accuracy": accuracy()})
    trainer = create_trainer(
        MetricsCallback({"accuracy": accuracy()}, on="both"), MetricsCallback(collection)
    )
    with pytest.raises(ConfigurationError, match=r"MetricsCallback.*'accuracy'.*prefix"):
        trainer.train(data(), 1, data())
    trainer = create_trainer(
        MetricsCallback({"accuracy": accuracy()}, on="train"), MetricsCallback(collection)
    )
    assert trainer.train(data(), 1, data()).get_metric_names() >= {"accuracy", "train_accuracy"}


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.retrieval import RetrievalMRR
from accel_callbacks import MetricsCallback
from accel_core import Trainer

torch.manual_seed(0)
model = nn.Linear(4, 2)
def update(metric, batch, batch_output):
    if isinstance(metric, RetrievalMRR):  # its states are lists that nothing joins, of different lengths on the processes
        metric.update(batch_output["model_outputs"][:, 1], batch[1], indexes=batch[1] * 0)
    else:
        metric.update(batch_output["model_outputs"], batch[1])

def create_metrics():
    return {"accuracy": MulticlassAccuracy(2, average="micro"), "auroc": MulticlassAUROC(2), "mrr": RetrievalMRR()}

callback = MetricsCallback(create_metrics(), update=update)
trainer = Trainer(model, nn.functional.cross_entropy, None, callbacks=[callback])
assert trainer.accelerator.num_processes == 2
for size in (61, 5, 1):
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    targets = (inputs.sum(1) > 0).long()
    found = trainer.evaluate(TensorDataset(inputs, targets), per_device_batch_size=4)
    for name, metric in create_metrics().items():
        metric._to_sync = False
        with torch.no_grad():
            update(metric, (inputs, targets), {"model_outputs": model(inputs)})
        expected = float(metric.compute())
        assert abs(found[f"evaluation_{name}"] - expected) < 1e-6, (size, name, found, expected)
print(f"exact on {trainer.accelerator.process_index};", end="", flush=True)
"""


def test_metrics_are_exact_on_two_processes_also_where_one_has_no_batch() -> None:
    result = launch(SCRIPT, processes=2, timeout=120)
    assert "exact on 0;" in result.stdout
    assert "exact on 1;" in result.stdout
