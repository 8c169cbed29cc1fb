"""Metrics in a callback, moved from pytorch-accelerated to accel: the imports change.

    python examples/from_pytorch_accelerated/train_with_metrics_in_callback.py

The whole callback could go: MetricsCallback(metrics) of accel_callbacks moves, updates, computes and records
them, and is exact where processes have different numbers of batches.
"""

from mnist import MNISTModel, load_mnist
from torch import nn, optim
from torch.utils.data import random_split
from torchmetrics import Accuracy, MetricCollection, Precision, Recall

from accel_callbacks import (
    DEFAULT_CALLBACKS,
)  # was: from pytorch_accelerated.trainer import DEFAULT_CALLBACKS
from accel_core import (
    Trainer,
    TrainerCallback,
)  # was: from pytorch_accelerated and pytorch_accelerated.callbacks


class ClassificationMetricsCallback(TrainerCallback):
    def __init__(self, num_classes):
        self.metrics = MetricCollection(
            {
                "accuracy": Accuracy(
                    task="multiclass", num_classes=num_classes
                ),
                "precision": Precision(
                    task="multiclass", num_classes=num_classes, average="macro"
                ),
                "recall": Recall(
                    task="multiclass", num_classes=num_classes, average="macro"
                ),
            }
        )

    def _move_to_device(self, trainer):
        self.metrics.to(trainer.device)

    def on_training_run_start(self, trainer, **kwargs):
        self._move_to_device(trainer)

    def on_evaluation_run_start(self, trainer, **kwargs):
        self._move_to_device(trainer)

    def on_eval_step_end(self, trainer, batch, batch_output, **kwargs):
        self.metrics.update(
            batch_output["model_outputs"].argmax(dim=-1), batch[1]
        )

    def on_eval_epoch_end(self, trainer, **kwargs):
        metrics = self.metrics.compute()
        trainer.run_history.update_metric("accuracy", metrics["accuracy"].cpu())
        trainer.run_history.update_metric(
            "precision", metrics["precision"].cpu()
        )
        trainer.run_history.update_metric("recall", metrics["recall"].cpu())
        self.metrics.reset()


def main():
    train_dataset, validation_dataset, test_dataset = random_split(
        load_mnist(), [4000, 500, 500]
    )
    model = MNISTModel()

    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        callbacks=(
            ClassificationMetricsCallback(num_classes=10),
            *DEFAULT_CALLBACKS,
        ),
    )

    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        num_epochs=4,
        per_device_batch_size=32,
    )

    trainer.evaluate(dataset=test_dataset, per_device_batch_size=64)


if __name__ == "__main__":
    main()
