"""Metrics in a subclass of the trainer, moved from pytorch-accelerated to accel: one import changes.

    python examples/from_pytorch_accelerated/train_with_metrics_in_loop.py

The new trainer moves the metrics to its device itself, and evaluates each sample once on any number of
processes.
"""

from mnist import MNISTModel, load_mnist
from torch import nn, optim
from torch.utils.data import random_split
from torchmetrics import Accuracy, MetricCollection, Precision, Recall

from accel_core import Trainer  # was: from pytorch_accelerated import Trainer


class TrainerWithMetrics(Trainer):
    def __init__(self, num_classes, *args, **kwargs):
        super().__init__(*args, **kwargs)
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

    def calculate_eval_batch_loss(self, batch):
        batch_output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(
            batch_output["model_outputs"].argmax(dim=-1), batch[1]
        )
        return batch_output

    def eval_epoch_end(self):
        metrics = self.metrics.compute()
        self.run_history.update_metric("accuracy", metrics["accuracy"].cpu())
        self.run_history.update_metric("precision", metrics["precision"].cpu())
        self.run_history.update_metric("recall", metrics["recall"].cpu())
        self.metrics.reset()


def main():
    train_dataset, validation_dataset, test_dataset = random_split(
        load_mnist(), [4000, 500, 500]
    )
    model = MNISTModel()

    trainer = TrainerWithMetrics(
        model=model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        num_classes=10,
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
