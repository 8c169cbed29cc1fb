"""A run that can be killed at any moment and started again.

    python examples/05_resume_exactly.py

Stop it with Ctrl-C, with `kill`, or with `kill -9`, and start it again: it goes on from the newest complete state in
`checkpoints`, and ends with the same fingerprint of the weights as a run that was never stopped, to the last bit. Prints the
metrics of each epoch and the fingerprint. Remove the folder `checkpoints` to begin anew.
"""

import argparse
import hashlib

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from accel_callbacks import DEFAULT_CALLBACKS, SaveTrainingStateCallback
from accel_core import Trainer, latest_checkpoint


def fingerprint(model: nn.Module) -> str:
    values = torch.cat([value.detach().flatten().float() for value in model.state_dict().values()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save-dir", default="checkpoints")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))
    train_data, eval_data = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        callbacks=(SaveTrainingStateCallback(args.save_dir, save_every_n_updates=20, keep_last=2), *DEFAULT_CALLBACKS),
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=eval_data,
        per_device_batch_size=32,
        resume_from=latest_checkpoint(args.save_dir),
    )
    trainer.print(f"Fingerprint of the weights: {fingerprint(model)}")


if __name__ == "__main__":
    main()
