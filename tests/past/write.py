"""The run that the files in format_1/ are of, and how they were written.

    python tests/past/write.py tests/past/format_1
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tests/past/write.py
    tests/past/format_1

The first command wrote `one_process/`, the second `two_processes/`, each with the code of its time:

    before_evaluation/              a training state after the training of the first epoch, before its
    evaluation mid_epoch/                      a training state in the middle of the second epoch model.pt
    model.safetensors     exports of the end of the run end.json                        weights, progress,
    metrics and what the callback has counted at that end

What stands there is what users have on their disks, so it is never written anew: a folder that exists is
refused. When the format changes, a new folder joins the old one.

Everything that decides about the result is computed by arithmetic or given, so that no default and no
generator matters.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from accel_core import Trainer, TrainerCallback

NUM_SAMPLES, NUM_EPOCHS = 29, 3
MID_EPOCH = {1: 7, 2: 5}
"""By the number of processes: the update after which the state in mid-epoch was saved. An epoch has 5 updates, or 3 on two."""
NOTE = {"note": "of the user's own", "numbers": [1, 2.5]}


class Points(Dataset):
    """Four numbers and a class each, from the sine of their index."""

    def __init__(self, num_samples: int) -> None:
        self.points = torch.arange(num_samples * 4, dtype=torch.float64).sin().reshape(num_samples, 4)
        self.targets = (self.points.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        return self.points[index], self.targets[index]


class Network(nn.Module):
    """Two layers, behind buffers that shift and scale the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scale", torch.ones(4))
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first((points - self.mean) / self.scale)))


class PastTrainer(Trainer):
    """Logs the accuracy, and counts its steps in a state of its own."""

    num_steps = 0

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.num_steps += 1
        return with_accuracy(super().calculate_train_batch_loss(batch), batch)

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return with_accuracy(super().calculate_eval_batch_loss(batch), batch)

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]


class EventCounter(TrainerCallback):
    """A callback with a state: how often updates and epochs have ended."""

    def __init__(self) -> None:
        self.updates = self.epochs = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.updates += 1

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.epochs = state["updates"], state["epochs"]


class Saver(TrainerCallback):
    """Saves the training state at two places; behind the other callbacks, so that theirs is of the same moment."""

    order = 1000

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.epochs_completed == 0:
            trainer.save_training_state(self.folder / "before_evaluation", NOTE)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == MID_EPOCH[trainer.accelerator.num_processes]:
            trainer.save_training_state(self.folder / "mid_epoch", NOTE)


def with_accuracy(output: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Add the share of right classes, which the trainer averages over an epoch."""
    is_right = output["model_outputs"].argmax(1) == batch[1]
    return {**output, "log": {"accuracy": is_right.double().mean()}}


def create_trainer(*callbacks: TrainerCallback, is_empty: bool) -> PastTrainer:
    """A trainer of the run: with the weights from which it began, or with zeros, where all has to come from a file."""
    model = Network().double()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values(), 1):
            values = torch.linspace(-0.5, 0.6, tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            tensor.copy_(torch.zeros(()) if is_empty else (number * values).cos())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01)
    return PastTrainer(
        model, nn.functional.cross_entropy, optimizer, callbacks, accelerator=Accelerator(cpu=True), seed=5
    )


def train(
    trainer: Trainer,
    resume_from: Path | None = None,
    per_device_batch_size: int = 3,
    gradient_clip_norm: float | None = 2.0,
) -> None:
    """Train to the end of the run."""
    trainer.train(
        Points(NUM_SAMPLES),
        NUM_EPOCHS,
        eval_dataset=Points(11),
        per_device_batch_size=per_device_batch_size,
        eval_per_device_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_clip_norm=gradient_clip_norm,
        create_scheduler_fn=partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.8),
        scheduler_step_every="update",
        train_dataloader_kwargs={"num_workers": 0, "shuffle": True},
        eval_dataloader_kwargs={"num_workers": 0, "shuffle": False},
        seed_each_sample=False,
        resume_from=resume_from,
    )


def end_of(trainer: PastTrainer, counter: EventCounter) -> dict[str, Any]:
    """What is compared at the end of a run, as plain values."""
    return {
        "weights": {name: tensor.tolist() for name, tensor in trainer.get_model().state_dict().items()},
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "run_progress": dataclasses.asdict(trainer.run_progress),
        "history": trainer.run_history.to_records(),
        "counter": counter.state_dict(),
        "num_steps": trainer.num_steps,
    }


def main(folder: Path) -> None:
    """Write the folder of this number of processes."""
    accelerator = Accelerator(cpu=True)
    folder /= {1: "one_process", 2: "two_processes"}[accelerator.num_processes]
    accelerator.wait_for_everyone()
    if folder.exists():
        sys.exit(f"{folder} exists: it shows what users have on their disks, so it is not written anew.")
    accelerator.wait_for_everyone()
    trainer = create_trainer(counter := EventCounter(), Saver(folder), is_empty=False)
    train(trainer)
    trainer.save_checkpoint(folder / "model.pt", NOTE)
    trainer.save_checkpoint(folder / "model.safetensors")
    if trainer.is_main_process:
        (folder / "end.json").write_text(json.dumps(end_of(trainer, counter), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
