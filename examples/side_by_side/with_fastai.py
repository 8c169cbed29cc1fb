"""Digits with fastai.

A one-cycle schedule, accuracy after each epoch, the best weights at the end.
"""

from digits import BATCH_SIZE, MAX_LR, NUM_EPOCHS, create_model, load_data
from fastai.callback.schedule import (
    Learner,
)  # This module gives Learner its fit_one_cycle.
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from torch import nn

train_data, eval_data = load_data()
data = DataLoaders(
    DataLoader(train_data, bs=BATCH_SIZE, shuffle=True),
    DataLoader(eval_data, bs=BATCH_SIZE),
    device="cpu",
)
learner = Learner(
    data,
    create_model(),
    nn.CrossEntropyLoss(),
    metrics=accuracy,
    model_dir="outputs/fastai",
)
learner.fit_one_cycle(
    NUM_EPOCHS,
    MAX_LR,
    cbs=SaveModelCallback(monitor="accuracy", fname="best_digits"),
)
print(f"Accuracy: {learner.validate()[1]:.3f}")
