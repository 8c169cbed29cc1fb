"""What saves cost a training, as JSON: digests, copies in the background, and the thousandth save beside the second.

All figures are of saves by `SaveTrainingStateCallback` in a training run, since that is what a user waits for. To write the
same files again and again is another measure: the system has the memory of the files before at hand.

Started by run.py:

    python benchmarks/saves.py MEGABYTES SAVES
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback, TrainingStatisticsCallback
from accel_core import Trainer, TrainerCallback
from accel_core.state import digests, files

ROUNDS = 11
"""Pairs of saves. The disk is not always as fast: with five their median changed from 5% to 17%."""
STEPS_OF_A_SAVE = 5


class NoDigest:
    """Stands in for SHA-256, and does nothing."""

    def update(self, data: Any) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


class TimedSaver(SaveTrainingStateCallback):
    """Notes the milliseconds that each save takes from the training, also after it was written."""

    has_saved = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.milliseconds: list[float] = []

    def save(self, trainer: Trainer, is_last: bool = False) -> None:
        self.has_saved = True
        super().save(trainer, is_last)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.has_saved = False
        start = time.perf_counter()
        super().on_optimizer_step_end(trainer)
        milliseconds = (time.perf_counter() - start) * 1000
        if self.has_saved:
            self.milliseconds.append(milliseconds)
        elif self.milliseconds:
            # The state before is removed once one that was written in the background stands.
            self.milliseconds[-1] += milliseconds


class SaverInPairs(TimedSaver):
    """Saves in pairs, one with digests and one without. They take turns in going first."""

    def save(self, trainer: Trainer, is_last: bool = False) -> None:
        has_digests = self.has_digests(len(self.milliseconds))
        digests.hashlib = hashlib if has_digests else type("Hashes", (), {"sha256": NoDigest})  # type: ignore[attr-defined]
        token = digests.hashes_beside.set(has_digests)
        no_checksums = files._no_checksums
        if not has_digests:
            # Without a digest the checksums of torch.save have a use.
            files._no_checksums = contextlib.nullcontext
        try:
            super().save(trainer, is_last)
        finally:
            files._no_checksums = no_checksums
            digests.hashes_beside.reset(token)
            digests.hashlib = hashlib  # type: ignore[attr-defined]

    @staticmethod
    def has_digests(number: int) -> bool:
        return number % 4 in (1, 2)


def cost_of_digests(folder: Path, megabytes: int) -> tuple[float, float]:
    """How much longer a save in a training takes with digests than without, and what SHA-256 alone takes.

    Both are shares of a save without. All that a save does counts: the check of the parameters, writing, and the removal
    of the state before, as a user waits for it.
    """
    model = Held(megabytes * 250_000 // 3)
    saver = SaverInPairs(folder, save_every_n_updates=3, keep_last=1, save_at_end=False)
    train_for_saves(model, [saver], 6 * (ROUNDS + 1))
    shares, without = [], []
    # The first pair warms the disk.
    for number in range(2, len(saver.milliseconds), 2):
        pair = {saver.has_digests(each): saver.milliseconds[each] for each in (number, number + 1)}
        shares.append(pair[True] / pair[False] - 1)
        without.append(pair[False])
    start = time.perf_counter()
    # A third of a state of Adam are weights, the rest are its two averages.
    for _ in range(3):
        hashlib.sha256(model.weight.detach().numpy())
    alone = (time.perf_counter() - start) * 1000
    return statistics.median(shares), alone / statistics.median(without)


def train_for_saves(model: torch.nn.Module, callbacks: list[TrainerCallback], num_updates: int) -> None:
    trainer = Trainer(
        model, lambda outputs, targets: outputs, torch.optim.AdamW(model.parameters()), callbacks, seed=1
    )
    data = TensorDataset(torch.zeros(num_updates, 1), torch.zeros(num_updates))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(data, 1, per_device_batch_size=1)


def cost_of_late_saves(folder: Path, num_saves: int, keep_last: int | None) -> tuple[float, float]:
    """Median milliseconds of a save among the second to eleventh, and among the last ten."""
    model = torch.nn.Linear(6, 2)
    saver = TimedSaver(folder, save_every_n_updates=STEPS_OF_A_SAVE, keep_last=keep_last, save_at_end=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    callbacks = [TrainingStatisticsCallback(STEPS_OF_A_SAVE), saver]
    trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=1)
    inputs = torch.randn(400, 6)
    with contextlib.redirect_stdout(io.StringIO()):
        data = TensorDataset(inputs, inputs.argmax(1) % 2)
        trainer.train(data, max_num_train_steps=num_saves * STEPS_OF_A_SAVE)
    return statistics.median(saver.milliseconds[1:11]), statistics.median(saver.milliseconds[-10:])


class Held(torch.nn.Module):
    """Holds parameters of some size, and uses each of them once."""

    def __init__(self, num_parameters: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_parameters))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean() + self.weight.square().mean()


class TimedUpdates(TrainerCallback):
    """Notes the milliseconds of updates, without the saves at their end, beside a save that is being written or not."""

    order: ClassVar[int] = -1000

    def __init__(self) -> None:
        self.milliseconds: dict[bool, list[float]] = {False: [], True: []}
        self.peak_bytes = 0

    @property
    def is_writing(self) -> bool:
        return any(thread.name == "accel-save" for thread in threading.enumerate())

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.was_writing, self.start = self.is_writing, time.perf_counter()

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        milliseconds = (time.perf_counter() - self.start) * 1000
        self.peak_bytes = max(self.peak_bytes, psutil.Process().memory_info().rss)
        # An update in which the writing ends is of neither kind.
        if self.was_writing == self.is_writing:
            self.milliseconds[self.is_writing].append(milliseconds)


def train_with_saves(
    folder: Path, megabytes: int, in_background: bool
) -> tuple[list[float], dict[bool, list[float]], float]:
    """Train while states are saved: milliseconds of saves, of updates, and the peak of memory above the start, in MB.

    The peak is that of the ends of the updates, where the copies of a save stand beside the model.
    """
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    model = Held(megabytes * 250_000 // 3)
    saver = TimedSaver(
        folder, save_every_n_updates=10, keep_last=1, save_at_end=False, in_background=in_background
    )
    updates = TimedUpdates()
    # Small ones vary more.
    train_for_saves(model, [updates, saver], 50 if megabytes > 100 else 200)
    return saver.milliseconds, updates.milliseconds, (updates.peak_bytes - before) / 1e6


def cost_in_background(folder: Path, megabytes: int) -> dict[str, float]:
    """What a save that is written in the background leaves of the stall, does to the updates beside it, and holds."""
    # A process each, since the memory that one has freed is used again by the next.
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as processes:
        blocking, _, memory_of_blocking = processes.submit(
            train_with_saves, folder / f"blocking_{megabytes}", megabytes, False
        ).result()
        saves, updates, memory = processes.submit(
            train_with_saves, folder / f"background_{megabytes}", megabytes, True
        ).result()
    # The first save makes the memory for its copies, and the last one is followed by none.
    stall, whole = (statistics.median(each[1:]) for each in (saves, blocking))
    without = statistics.median(updates[False][1:])
    title = f"{megabytes} MB in the background"
    figures = {
        f"{title}, blocking save, ms": whole,
        f"{title}, stall, ms": stall,
        f"{title}, stall, % of a blocking save": 100 * stall / whole,
        f"{title}, update without a save, ms": without,
        f"{title}, memory above a blocking save, MB": memory - memory_of_blocking,
    }
    # What is written faster than an update takes has none beside it.
    if updates[True]:
        during = 100 * statistics.median(updates[True]) / without
        figures[f"{title}, update beside the writing, % of one without"] = during
    return figures


def main() -> None:
    torch.set_num_threads(1)
    megabytes, num_saves = map(int, sys.argv[1:3])
    cores = sorted(os.sched_getaffinity(0))
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, usable in (("a core free", cores), ("no core free", cores[:1])):
            os.sched_setaffinity(0, usable)
            cost, alone = cost_of_digests(folder / name.replace(" ", "_"), megabytes)
            figures[f"digests, {name}, %"] = 100 * cost
            figures[f"SHA-256 alone, {name}, % of a save without"] = 100 * alone
        os.sched_setaffinity(0, cores)
        for keep_last in (None, 2):
            early, late = cost_of_late_saves(folder / f"keep_{keep_last}", num_saves, keep_last)
            figures[f"save 2, keep_last={keep_last}, ms"] = early
            figures[f"save {num_saves}, keep_last={keep_last}, ms"] = late
        for size in (megabytes // 10, megabytes):
            figures.update(cost_in_background(folder, size))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
