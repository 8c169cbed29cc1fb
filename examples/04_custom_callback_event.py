"""Give callbacks an event of your own.

    python examples/04_custom_callback_event.py

The trainer calls `verify_train_batch` on every callback that has such a method.
If no callback has one, nothing happens. Here the callback looks at the first
batch of each epoch. It prints the range of the pixels and the labels of that
batch for each of three epochs, and the number of batches.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import DEFAULT_CALLBACKS, Trainer, TrainerCallback


class VerifyingTrainer(Trainer):
    def train_epoch_start(self):
        super().train_epoch_start()
        self.is_first_batch = True

    def calculate_train_batch_loss(self, batch):
        if self.is_first_batch:
            self.callbacks.call_event(
                "verify_train_batch", images=batch[0], labels=batch[1]
            )
            self.is_first_batch = False
        return super().calculate_train_batch_loss(batch)


class BatchVerifier(TrainerCallback):
    def __init__(self):
        self.batches_verified = 0

    def verify_train_batch(self, trainer, images, labels):
        assert images.min() >= 0 and images.max() <= 1, "pixels are not scaled"
        self.batches_verified += 1
        trainer.print(
            f"pixels from {images.min():.2f} to {images.max():.2f}, labels "
            f"{sorted(set(labels.tolist()))}"
        )


def main() -> int:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    verifier = BatchVerifier()
    trainer = VerifyingTrainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        callbacks=(verifier, *DEFAULT_CALLBACKS),
        seed=0,
    )
    trainer.train(data, num_epochs=3, per_device_batch_size=32)
    return verifier.batches_verified


if __name__ == "__main__":
    print(f"{main()} batches verified")
