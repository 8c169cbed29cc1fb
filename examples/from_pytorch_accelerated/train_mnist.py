"""The first script of pytorch-accelerated, moved to accel: one import changes.

    python examples/from_pytorch_accelerated/train_mnist.py

Prints the losses of each epoch, and that of the test data.
"""

from mnist import MNISTModel, load_mnist
from torch import nn, optim
from torch.utils.data import random_split

from accel_core import Trainer  # was: from pytorch_accelerated import Trainer


def main():
    train_dataset, validation_dataset, test_dataset = random_split(
        load_mnist(), [4000, 500, 500]
    )
    model = MNISTModel()

    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
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
