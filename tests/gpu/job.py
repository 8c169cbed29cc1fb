"""What each process of `test_several_processes.py` does: trains, stops together, resumes, evaluates and predicts.

    python tests/gpu/job.py DEVICE PROCESSES FOLDER

One process takes the batches of PROCESSES at once, so that it trains on the same samples in each update.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback
from accel_core import Trainer, TrainerCallback

BATCH_SIZE = 4


class Story(TrainerCallback):
    """Saves once in mid-epoch, or asks for a stop on the last process alone."""

    def __init__(self, folder: Path | None = None, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        update, accelerator = trainer.run_progress.updates_completed, trainer.accelerator
        if self.folder is not None and update == 3:
            trainer.save_training_state(self.folder)
        if update == self.stop_at and accelerator.process_index == accelerator.num_processes - 1:
            trainer.request_stop("enough")


def create_data(size: int) -> TensorDataset:
    inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(size))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def create_trainer(device: str, *callbacks: TrainerCallback) -> Trainer:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        callbacks=callbacks,
        seed=0,
        accelerator=Accelerator(cpu=device == "cpu"),
    )


def results(device: str, processes: int, folder: Path) -> dict[str, Any]:
    metrics = MetricsCallback({"accuracy": MulticlassAccuracy(3, average="micro")})
    whole = create_trainer(device, Story(folder / "state"), metrics)
    accelerator = whole.accelerator
    arguments: dict[str, Any] = {
        "num_epochs": 3,
        "eval_dataset": create_data(13),
        "per_device_batch_size": BATCH_SIZE * (processes // accelerator.num_processes),
        "gradient_accumulation_steps": 2,
        "gradient_clip_norm": 0.5,
    }
    history = whole.train(create_data(37), **arguments)
    rest = create_trainer(device, MetricsCallback({"accuracy": MulticlassAccuracy(3, average="micro")}))
    rest.train(create_data(37), **arguments, resume_from=folder / "state")
    stopped = create_trainer(device, Story(stop_at=2))
    stopped.train(create_data(37), **arguments)
    weights = [
        {name: value.cpu() for name, value in trainer.get_model(False).state_dict().items()}
        for trainer in (whole, rest)
    ]
    is_several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "backend": torch.distributed.get_backend() if is_several else None,
        "processes": accelerator.num_processes,
        "whole": weights[0],
        "rest": weights[1],
        "history": {name: list(history.get_metric_values(name)) for name in history.get_metric_names()},
        "stopped after": stopped.run_progress.updates_completed,
        "predictions": whole.predict(
            TensorDataset(create_data(13).tensors[0]), per_device_batch_size=2
        ).cpu(),
    }


if __name__ == "__main__":
    found = results(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    torch.save(found, Path(sys.argv[3]) / f"{os.environ['RANK']}.pt")
