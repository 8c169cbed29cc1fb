"""MetricsCallback on one and on two processes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

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

    callback = MetricsCallback(MetricCollection({"accuracy": accuracy(), "recall": MulticlassRecall(2)}), on="both")
    history = create_trainer(callback, EvaluateInBetween()).train(data(), num_epochs=1, eval_dataset=data())
    assert {"train_accuracy", "intermediate_accuracy", "accuracy", "recall"} <= history.get_metric_names()


def test_an_update_of_ones_own_sees_batch_and_output() -> None:
    def update(metric: Any, batch: Any, batch_output: Any) -> None:
        metric.update(batch_output["model_outputs"], 1 - batch[1])

    trainer = create_trainer(MetricsCallback({"error": accuracy()}, update=update, prefix="top1_"))
    history = trainer.train(data(), num_epochs=1, eval_dataset=data())
    assert history.get_latest_metric("top1_error") == pytest.approx(1 - true_accuracy(trainer.model))


@pytest.mark.parametrize(
    ("arguments", "match"), [({"metrics": 3}, "metrics is 3"), ({"metrics": {}, "on": "test"}, "on is 'test'")]
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


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from accel_callbacks import MetricsCallback
from accel_core import Trainer

torch.manual_seed(0)
model = nn.Linear(4, 2)
callback = MetricsCallback({"accuracy": MulticlassAccuracy(2, average="micro")})
trainer = Trainer(model, nn.functional.cross_entropy, None, callbacks=[callback])
assert trainer.accelerator.num_processes == 2
for size in (61, 5, 1):
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    targets = (inputs.sum(1) > 0).long()
    found = trainer.evaluate(TensorDataset(inputs, targets), per_device_batch_size=4)["evaluation_accuracy"]
    expected = (model(inputs).argmax(1) == targets).double().mean().item()
    assert abs(found - expected) < 1e-6, (size, found, expected)
print(f"exact on {trainer.accelerator.process_index};", end="", flush=True)
"""


def test_metrics_are_exact_on_two_processes_also_where_one_has_no_batch() -> None:
    result = launch(SCRIPT, processes=2, timeout=120)
    assert "exact on 0;" in result.stdout
    assert "exact on 1;" in result.stdout
