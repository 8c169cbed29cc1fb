"""Evaluate on two sets, and keep the best model of evaluations in mid-epoch.

    python examples/18_evaluation.py

It trains one long epoch on handwritten digits. Every ten updates it evaluates on
clean images and on noisy ones, and exports the model whenever the loss on the
noisy images was the best so far. It prints the best update, and the accuracies of
the exported model on both sets.
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    MetricsCallback,
    SaveBestModelCallback,
    StepBasedEvaluationCallback,
)
from accel_core import Trainer


def create_data() -> tuple[ConcatDataset, dict[str, TensorDataset]]:
    """Return training data, four times in one epoch, and two evaluation sets."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    noisy = images + 0.3 * torch.randn(
        images.shape, generator=torch.Generator().manual_seed(1)
    )
    train = TensorDataset(images[:1400], labels[:1400])
    clean_set = TensorDataset(images[1400:], labels[1400:])
    noisy_set = TensorDataset(noisy[1400:], labels[1400:])
    return ConcatDataset([train] * 4), {"": clean_set, "noisy": noisy_set}


def main() -> None:
    torch.manual_seed(0)
    train_dataset, eval_sets = create_data()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    with tempfile.TemporaryDirectory() as folder:
        best = SaveBestModelCallback(
            Path(folder) / "best.safetensors",
            watch_metric="noisy_intermediate_eval_loss_epoch",
        )
        accuracy = MetricsCallback(
            {"accuracy": MulticlassAccuracy(10, average="micro")}
        )
        trainer = Trainer(
            model,
            nn.functional.cross_entropy,
            torch.optim.Adam(model.parameters(), lr=3e-3),
            callbacks=[accuracy, StepBasedEvaluationCallback(10), best],
            seed=0,
        )
        trainer.train(
            train_dataset,
            1,
            eval_sets,
            per_device_batch_size=32,
            eval_at_start=True,
        )
        updates = trainer.run_progress.updates_completed
        print(f"Best update: {best.exported[0]['update']} of {updates}")
        results = trainer.evaluate(eval_sets, per_device_batch_size=128)
    print(f"Accuracy on clean images: {results['evaluation_accuracy']:.1%}")
    print(
        f"Accuracy on noisy images: {results['noisy_evaluation_accuracy']:.1%}"
    )


if __name__ == "__main__":
    main()
