"""Whether a run of many updates costs at its end what it cost at its beginning, as JSON: time, memory, size of the state.

Started by run.py:

    python benchmarks/long_run.py UPDATES
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import Terminal
from torch.utils.data import TensorDataset

from accel_callbacks import DEFAULT_CALLBACKS, SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback

BATCH_SIZE = 4
EPOCHS = 10


class Watch(TrainerCallback):
    """Notes time and memory after each hundredth of the updates, and the size of each state that is saved."""

    def __init__(self, num_updates: int) -> None:
        self.part = num_updates // 100
        self.times: dict[int, float] = {}
        self.megabytes: dict[int, float] = {}
        self.kilobytes: list[float] = []

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        update = trainer.run_progress.updates_completed
        if update % self.part == 0:
            self.times[update // self.part] = time.process_time()
            self.megabytes[update // self.part] = psutil.Process().memory_info().rss / 2**20

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        self.kilobytes.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1000)

    def microseconds_of(self, first: int, last: int) -> float:
        """CPU time of an update in these hundredths: that of the fastest, as a machine has other work too."""
        return min(self.times[n] - self.times[n - 1] for n in range(first + 1, last + 1)) / self.part * 1e6


def main() -> None:
    torch.set_num_threads(1)
    num_updates = int(sys.argv[1])
    model = torch.nn.Linear(8, 2)
    inputs = torch.randn(num_updates // EPOCHS * BATCH_SIZE, 8)
    watch = Watch(num_updates)
    with tempfile.TemporaryDirectory() as folder:
        saver = SaveTrainingStateCallback(folder, save_every_n_updates=watch.part, keep_last=3)
        callbacks: Any = (watch, saver, *DEFAULT_CALLBACKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks=callbacks)
        with contextlib.redirect_stdout(Terminal()), contextlib.redirect_stderr(Terminal()):
            trainer.train(
                TensorDataset(inputs, inputs.argmax(1) % 2),
                num_epochs=EPOCHS,
                per_device_batch_size=BATCH_SIZE,
            )
    figures = {
        "CPU microseconds of an update": (watch.microseconds_of(1, 10), watch.microseconds_of(90, 100)),
        "memory, MB": (watch.megabytes[1], watch.megabytes[100]),
        "training state, kB": (watch.kilobytes[0], watch.kilobytes[-1]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
