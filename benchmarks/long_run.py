"""Whether a run of many updates costs at its end what it cost at its beginning, as JSON: time, memory, size of the state.

Started by run.py:

    python benchmarks/long_run.py UPDATES [RECORDS]

With RECORDS also whether an evaluation and a save cost after so many records what they cost before.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
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
REPEATS = 15


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


def cost_after_many_records(folder: Path, num_records: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of an evaluation of 4 samples and of a save, with few records and with `num_records`."""
    model = torch.nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks=DEFAULT_CALLBACKS)
    inputs = torch.randn(4, 8)
    data = TensorDataset(inputs, inputs.argmax(1) % 2)
    found: dict[str, list[float]] = {"evaluation": [], "save": []}
    with contextlib.redirect_stdout(Terminal()), contextlib.redirect_stderr(Terminal()):
        trainer.train(data, 1, data)
        for _ in range(2):
            trainer.evaluate(data)
            trainer.save_training_state(folder / "state")
            found["evaluation"].append(_median_milliseconds(lambda: trainer.evaluate(data)))
            found["save"].append(_median_milliseconds(lambda: _save_anew(trainer, folder)))
            for number in range(num_records):
                # A record an update, as a run makes them.
                trainer.run_history.current_update = number
                trainer.run_history.update_metric("gradient_norm", number)
    return {
        f"{name} of a small model, few records and {num_records:,}, ms": (few, many)
        for name, (few, many) in found.items()
    }


def _save_anew(trainer: Trainer, folder: Path) -> None:
    # A state of this very update that stands there would not be written again.
    trainer.run_progress.updates_completed += 1
    trainer.save_training_state(folder / f"update_{trainer.run_progress.updates_completed}")


def _median_milliseconds(action: Callable[[], object]) -> float:
    milliseconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        milliseconds.append((time.perf_counter() - start) * 1000)
    return statistics.median(milliseconds)


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
    if len(sys.argv) > 2:
        with tempfile.TemporaryDirectory() as folder:
            figures |= cost_after_many_records(Path(folder), int(sys.argv[2]))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
