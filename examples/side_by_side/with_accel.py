"""Digits with accel.

A one-cycle schedule, accuracy after each epoch, the best weights at the end.
"""

from functools import partial

import torch
from digits import BATCH_SIZE, MAX_LR, NUM_EPOCHS, create_model, load_data
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    MetricsCallback,
    SaveBestModelCallback,
)
from accel_core import Trainer, TrainerPlaceholderValues

train_data, eval_data = load_data()
model = create_model()
trainer = Trainer(
    model,
    nn.CrossEntropyLoss(),
    torch.optim.AdamW(model.parameters()),
    callbacks=(
        MetricsCallback(
            {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}
        ),
        SaveBestModelCallback(
            "best_digits.pt", watch_metric="accuracy", greater_is_better=True
        ),
        *DEFAULT_CALLBACKS,
    ),
    seed=0,
)
trainer.train(
    train_data,
    num_epochs=NUM_EPOCHS,
    eval_dataset=eval_data,
    per_device_batch_size=BATCH_SIZE,
    create_scheduler_fn=partial(
        OneCycleLR,
        max_lr=MAX_LR,
        total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
    ),
)
print(f"Accuracy: {trainer.evaluate()['evaluation_accuracy']:.3f}")
