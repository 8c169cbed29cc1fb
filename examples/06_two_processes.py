"""Run the same script on one process and on several.

    # One process.
    python examples/06_two_processes.py
    # Two on a CPU.
    ACCELERATE_USE_CPU=true accelerate launch \
        --config_file examples/configs/two_cpu_processes.yaml \
        examples/06_two_processes.py
    # One for each of eight GPUs.
    accelerate launch --config_file examples/configs/all_gpus_bf16.yaml \
        --num_processes 8 examples/06_two_processes.py

Each process trains on its share of every batch, and evaluates its share of the
271 test images. Only the last process looks at the training loss, and asks all
to stop. The script prints the loss of each epoch, and why the processes have
stopped. It prints the test accuracy, above 90%, as a metric and counted by
hand. The lines are the same on one process and on two.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from accel_core import DEFAULT_CALLBACKS, Trainer, TrainerCallback

GLOBAL_BATCH_SIZE = 32


class StopWhenGoodEnough(TrainerCallback):
    """Asks all processes to stop, from the last of them alone: a stop takes
    effect everywhere after the same update.
    """

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        process, num_processes = (
            trainer.accelerator.process_index,
            trainer.accelerator.num_processes,
        )
        loss = trainer.run_history.get_latest_metric("train_loss_epoch")
        if process == num_processes - 1 and loss < 0.2:
            trainer.request_stop(f"the training loss is {loss:.3f}")


class DigitsTrainer(Trainer):
    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        hits = (output["model_outputs"].argmax(dim=1) == batch[1]).float()
        # The mean over this batch of this process; what is recorded is the mean
        # over all samples of all processes.
        return {**output, "log": {"accuracy": hits.mean()}}


def main() -> None:
    digits = load_digits()
    data = TensorDataset(
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target),
    )
    train_data, test_data = random_split(
        data, [1526, 271], generator=torch.Generator().manual_seed(0)
    )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = DigitsTrainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        callbacks=(StopWhenGoodEnough, *DEFAULT_CALLBACKS),
        seed=0,
    )
    per_device_batch_size = (
        GLOBAL_BATCH_SIZE // trainer.accelerator.num_processes
    )

    trainer.train(
        train_data, num_epochs=20, per_device_batch_size=per_device_batch_size
    )

    metrics = trainer.evaluate(
        test_data, per_device_batch_size=per_device_batch_size
    )
    trainer.print(f"Test accuracy: {metrics['evaluation_accuracy']:.2%}")

    # Every process gets all predictions, in the order of the data set.
    predictions = trainer.predict(
        test_data, per_device_batch_size=per_device_batch_size
    ).argmax(dim=1)
    targets = torch.stack([target for _, target in test_data])
    trainer.print(
        f"By hand:       {(predictions == targets).double().mean():.2%}"
    )


if __name__ == "__main__":
    main()
