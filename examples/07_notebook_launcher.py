"""Start several processes from a notebook, or from a script without a launcher.

    python examples/07_notebook_launcher.py

`accelerate.notebook_launcher` starts two processes: one for each of two GPUs, or
two on the CPU if there are fewer. In a notebook, the code below is the content of
a cell. Create everything that touches a device inside the function: the trainer,
its accelerator, tensors on a GPU. The processes are forked, and cannot use a
device that was in use before. The script prints the loss of each epoch, and the
test accuracy: at least 90%. Accelerate prints that it launches on CUDAs, on a
CPU too.
"""

import os

import torch
from accelerate import notebook_launcher
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from accel_core import Trainer

NUM_PROCESSES = 2


def train_digits(num_epochs: int) -> None:
    digits = load_digits()
    data = TensorDataset(
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target),
    )
    train_data, test_data = random_split(
        data, [0.85, 0.15], generator=torch.Generator().manual_seed(0)
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        seed=0,
    )
    trainer.train(train_data, num_epochs=num_epochs, per_device_batch_size=16)
    predictions = trainer.predict(test_data, per_device_batch_size=16).argmax(
        dim=1
    )
    hits = predictions == torch.stack([target for _, target in test_data])
    trainer.print(
        f"Test accuracy of {trainer.accelerator.num_processes} processes: "
        f"{hits.double().mean():.2%}"
    )


if __name__ == "__main__":
    if torch.cuda.device_count() < NUM_PROCESSES:
        # Else the processes would not see each other, and each would train
        # alone.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Over this port the processes find each other; a second notebook on the
    # same machine needs another one.
    port = os.environ.get("MASTER_PORT", "29500")
    notebook_launcher(
        train_digits, args=(4,), num_processes=NUM_PROCESSES, use_port=port
    )
