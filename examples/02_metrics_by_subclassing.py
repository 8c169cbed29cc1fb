"""Track metrics by overriding methods of the trainer.

    python examples/02_metrics_by_subclassing.py

The metrics are attributes of the trainer, which moves them to its device.
`eval_epoch_end` computes them over all processes and records them in the run
history. It prints the losses, accuracy, precision and recall of each epoch. The
numbers are those of example 03.
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

from accel_callbacks import DEFAULT_CALLBACKS
from accel_core import Trainer


class TrainerWithMetrics(Trainer):
    def __init__(self, *args, num_classes, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "precision": MulticlassPrecision(num_classes),
                "recall": MulticlassRecall(num_classes),
            }
        )

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(output["model_outputs"], batch[1])
        return output

    def eval_epoch_end(self):
        super().eval_epoch_end()
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value)
        self.metrics.reset()


def main() -> dict[str, float]:
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
    trainer = TrainerWithMetrics(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=DEFAULT_CALLBACKS,
        seed=0,
        num_classes=10,
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


if __name__ == "__main__":
    print("  ".join(f"{name}: {value:.6f}" for name, value in main().items()))
