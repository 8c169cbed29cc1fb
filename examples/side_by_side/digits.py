"""What the scripts in this folder share: the data and the model."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

BATCH_SIZE, NUM_EPOCHS, MAX_LR = 32, 10, 0.01


def load_data():
    """Return 1,437 digits for training and 360 for evaluation."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (
        torch.tensor(images, dtype=torch.float32) / 16,
        torch.tensor(labels),
    )
    return TensorDataset(images[:1437], labels[:1437]), TensorDataset(
        images[1437:], labels[1437:]
    )


def create_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
    )
