"""Track metrics by a callback: your own, and `MetricsCallback`.

    python examples/03_metrics_by_callback.py

It trains twice: first with a callback that is written out here, then with
`MetricsCallback`, which does the same for any metric. It prints the losses,
accuracy, precision and recall of each epoch. Both callbacks give the numbers of
example 02.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassPrecision,
    MulticlassRecall,
)

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback
from accel_core import Trainer, TrainerCallback


class ClassificationMetricsCallback(TrainerCallback):
    def __init__(self, metrics):
        self.metrics = metrics

    def on_training_run_start(self, trainer):
        self.metrics.to(trainer.device)

    def on_eval_step_end(self, trainer, batch, batch_output):
        self.metrics.update(batch_output["model_outputs"], batch[1])

    def on_eval_epoch_end(self, trainer, **kwargs):
        for name, value in self.metrics.compute().items():
            trainer.run_history.update_metric(name, value)
        self.metrics.reset()


def create_metrics():
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(10, average="micro"),
            "precision": MulticlassPrecision(10),
            "recall": MulticlassRecall(10),
        }
    )


def train(callback: TrainerCallback) -> dict[str, float]:
    print(f"--- {type(callback).__name__}")
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    )
    train_data, eval_data = random_split(
        data, [0.8, 0.2], generator=torch.Generator().manual_seed(0)
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=(callback, *DEFAULT_CALLBACKS),
        seed=0,
    )
    history = trainer.train(
        train_data,
        num_epochs=5,
        eval_dataset=eval_data,
        per_device_batch_size=32,
    )
    return {
        name: history.get_latest_metric(name)
        for name in ("accuracy", "precision", "recall")
    }


def main() -> tuple[dict[str, float], dict[str, float]]:
    return train(ClassificationMetricsCallback(create_metrics())), train(
        MetricsCallback(create_metrics())
    )


if __name__ == "__main__":
    written_out, ready_made = main()
    print("equal" if written_out == ready_made else "different")
    print(
        "  ".join(f"{name}: {value:.6f}" for name, value in ready_made.items())
    )
