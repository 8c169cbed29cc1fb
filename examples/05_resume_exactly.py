"""Stop a training at any moment, start it again, and get bit-identical weights.

    # Trains for about half a minute. Stop it at any time: Ctrl-C, kill, kill -9.
    python examples/05_resume_exactly.py
    # The same command continues with the next sample.
    python examples/05_resume_exactly.py
    # Two processes, which torchrun starts again after a failure.
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 ACCELERATE_USE_CPU=true \
        torchrun --standalone --nproc_per_node 2 --max_restarts 3 \
        examples/05_resume_exactly.py

It prints the losses of each epoch and the fingerprint of the final weights. The
fingerprint equals that of a run which was never stopped, although the digits are
shifted at random and dropout is random too. Another number of processes or of
threads (OMP_NUM_THREADS) gives another fingerprint, since sums are rounded in
another order.

A finished run trains no further. To start again, remove
`outputs/05_resume_exactly`, which holds its states.
"""

import argparse
import hashlib
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    EarlyStoppingCallback,
    SaveTrainingStateCallback,
)
from accel_core import Trainer, TrainerPlaceholderValues, latest_checkpoint


class ShiftedDigits(Dataset):
    """Digits, each moved by up to one pixel anew whenever it is read."""

    def __init__(self, first: int, last: int) -> None:
        data = load_digits()
        self.images = (
            torch.tensor(
                data.images[first:last], dtype=torch.float32
            ).unsqueeze(1)
            / 16
        )
        self.labels = torch.tensor(data.target[first:last])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shifts = torch.randint(-1, 2, (2,)).tolist()
        return self.images[index].roll(shifts, dims=(1, 2)), self.labels[index]


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--save-dir",
        default="outputs/05_resume_exactly",
        help="where the training is saved",
    )
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )
    saver = SaveTrainingStateCallback(
        args.save_dir,
        save_every_n_updates=25,
        keep_last=2,
        save_on_signals=(
            "SIGTERM",
            "SIGUSR1",
            "SIGINT",
        ),  # With SIGINT, Ctrl-C finishes the update and saves.
    )
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        # Patience has a state too: it is saved with the rest.
        callbacks=(
            EarlyStoppingCallback(early_stopping_patience=10),
            saver,
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    trainer.train(
        ShiftedDigits(0, 1500),
        num_epochs=args.epochs,
        eval_dataset=ShiftedDigits(1500, 1797),
        per_device_batch_size=32,
        create_scheduler_fn=partial(
            OneCycleLR,
            max_lr=1e-2,
            total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
        ),
        # The same shifts again for the same sample of the same epoch, whichever
        # process or worker reads it.
        seed_each_sample=True,
        # None where nothing was saved yet: then the training begins.
        resume_from=latest_checkpoint(args.save_dir),
    )
    trainer.print(f"Fingerprint of the weights: {fingerprint(model)}")


if __name__ == "__main__":
    main()
