"""An event of one's own for callbacks, moved from pytorch-accelerated to accel: the imports, and the call of the event.

    python examples/from_pytorch_accelerated/custom_callback_event.py

Fails if a batch is not of the shape that the callback expects. The trainer passes itself, and the list is
trainer.callbacks, not trainer.callback_handler.
"""

from mnist import MNISTModel, load_mnist
from torch import nn, optim
from torch.utils.data import random_split

from accel_callbacks import (
    ProgressBarCallback,
)  # was: from pytorch_accelerated.callbacks, as those of the next line
from accel_core import (
    LogMetricsCallback,
    TerminateOnNaNCallback,
    Trainer,
    TrainerCallback,
)


class VerifyBatchCallback(TrainerCallback):
    def verify_train_batch(self, trainer, xb, yb):
        assert xb.shape == (
            trainer.run_config.train_per_device_batch_size,
            1,
            28,
            28,
        )
        assert yb.shape[0] == trainer.run_config.train_per_device_batch_size


class TrainerWithCustomCallbackEvent(Trainer):
    def calculate_train_batch_loss(self, batch):
        xb, yb = batch
        self.callbacks.call_event("verify_train_batch", xb=xb, yb=yb)
        return super().calculate_train_batch_loss(batch)


def main():
    train_dataset, validation_dataset = random_split(load_mnist(), [4500, 500])
    model = MNISTModel()

    trainer = TrainerWithCustomCallbackEvent(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        callbacks=(
            VerifyBatchCallback,
            TerminateOnNaNCallback,
            ProgressBarCallback,
            LogMetricsCallback,
        ),
    )

    trainer.train(
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        train_dataloader_kwargs={"drop_last": True},
        num_epochs=4,
        per_device_batch_size=32,
    )


if __name__ == "__main__":
    main()
