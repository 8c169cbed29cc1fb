"""The job that is killed and resumed by test_resume_is_exact.py.

    python resume_job.py '{"folder": "/tmp/x", "workers": 0, ...}'     runs it once
    python resume_job.py                                               runs one for each line of settings on
                                                                       the standard input, in a fork, which
                                                                       spares importing torch

A job goes on from the newest state in its folder, and leaves `result.pt` there when it is through. It appends
what it is doing to `phases`: "started", "training", "saving", "saved", and with a mirror "mirroring".
"""

import json
import os
import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from accel_callbacks import EarlyStoppingCallback, SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues, latest_checkpoint
from accel_core.state import copying, files
from accel_core.state.store import Store

NUM_SAMPLES, BATCH_SIZE, NUM_EPOCHS = 66, 4, 3


class AugmentedPoints(Dataset):
    """Points with noise of three sources of random numbers, drawn anew at each access."""

    def __init__(self, num_samples):
        generator = torch.Generator().manual_seed(5)
        self.points = torch.randn(num_samples, 6, generator=generator)
        self.targets = (self.points.sum(1) > 0).long()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        noise = torch.randn(6) * 0.1 + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return self.points[index] + noise, self.targets[index]


class Phases(TrainerCallback):
    """Tells the test what the job is doing, so that it knows when it has killed it. Also records the learning rate."""

    order = -1

    def __init__(self, folder, pause):
        self.file = os.open(folder / "phases", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.pause = pause
        self.tell("started")

    def tell(self, phase):
        os.write(self.file, f"{phase}\n".encode())

    def on_train_step_start(self, trainer, batch):
        self.tell("training")

    def on_optimizer_step_end(self, trainer):
        trainer.run_history.update_metric("learning_rate", trainer.scheduler.get_last_lr()[0])

    def on_checkpoint_saved(self, trainer, path):
        self.tell("saved")
        time.sleep(self.pause)


class Job(Trainer):
    """Tells when it begins to save."""

    def save_training_state(self, output_dir, checkpoint_kwargs=None):
        next(callback for callback in self.callbacks if isinstance(callback, Phases)).tell("saving")
        super().save_training_state(output_dir, checkpoint_kwargs)


def slow_down(seconds):
    """Let every file operation of a save take some time, so that a kill at a random moment often meets it.

    What removes the oldest state after a save is made ten times as slow: it is a single operation.
    """
    for name in ("write_object", "write_tensors", "write_bytes", "write_pieces", "rename", "remove_folder"):
        operation = getattr(files, name)
        pause = seconds * (10 if name == "remove_folder" else 1)

        def slow(*args, operation=operation, pause=pause, **kwargs):
            time.sleep(pause / 2)
            result = operation(*args, **kwargs)
            time.sleep(pause / 2)
            return result

        setattr(files, name, slow)


def slow_down_mirror(seconds, phases):
    """Let each file that is mirrored take some time, and tell when a state begins to be."""
    put, upload = Store.put, copying.upload

    def slow(*args):
        time.sleep(seconds)
        put(*args)
        time.sleep(seconds)

    def told(*args):
        phases.tell("mirroring")
        return upload(*args)

    Store.put, copying.upload = slow, told


class Told(TrainerCallback):
    """Writes down what was told as saved or mirrored, and makes sure at the start that none of it was lost."""

    def __init__(self, folder, newest, saver):
        self.files = folder / "told", folder / "told_of_mirror"
        self.saver = saver
        for told in (file.read_text().split() for file in self.files if file.exists()):
            assert not told or (newest is not None and newest.name >= max(told)), (told, newest)

    def on_checkpoint_saved(self, trainer, path):
        self.write(self.files[0], path.name)

    def on_optimizer_step_end(self, trainer):
        if self.saver.last_mirrored is not None:
            self.write(self.files[1], self.saver.last_mirrored.rpartition("/")[2].partition("-")[0])

    def write(self, path, name):
        with path.open("a") as file:
            file.write(f"{name}\n")


def run(folder, workers, accumulation, is_saved, slow_seconds, in_background=False, mirror=None):
    folder = Path(folder)
    slow_down(slow_seconds)
    cache = {} if mirror is None else {"cache": folder / "states"}
    newest = latest_checkpoint(folder / "states" if mirror is None else mirror, **cache)
    # Whatever was drawn before must not matter to a run that goes on.
    torch.manual_seed(time.time_ns() if newest else 0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12),
        torch.nn.BatchNorm1d(12),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(12, 2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    saver = SaveTrainingStateCallback(
        folder / "states",
        1,
        save_every_n_updates=9 // accumulation,
        keep_last=2,
        in_background=in_background,
        mirror=mirror,
    )
    phases = Phases(folder, 10 * slow_seconds)
    if mirror is not None:
        slow_down_mirror(5 * slow_seconds, phases)
    patience = EarlyStoppingCallback(1000)
    trainer = Job(
        model,
        torch.nn.functional.cross_entropy,
        optimizer,
        [phases, Told(folder, newest, saver), patience, *[saver][:is_saved]],
        seed=3,
    )
    trainer.train(
        AugmentedPoints(NUM_SAMPLES),
        NUM_EPOCHS,
        eval_dataset=AugmentedPoints(21),
        per_device_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=accumulation,
        create_scheduler_fn=partial(
            torch.optim.lr_scheduler.OneCycleLR,
            max_lr=0.05,
            total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
        ),
        train_dataloader_kwargs={"num_workers": workers},
        eval_dataloader_kwargs={"num_workers": 0},
        resume_from=newest,
        seed_each_sample=True,
    )
    result = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "history": trainer.run_history.to_records(),
        "patience": patience.state_dict(),
        "random": torch.get_rng_state(),
    }
    files.replace_file(folder / "result.pt", lambda aside: torch.save(result, aside))


def run_in_fork(settings):
    """Run a job in a process group of its own and print its id, and its status when it has ended."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        output = os.open(Path(settings["folder"]) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            run(**settings)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run(**json.loads(sys.argv[1]))
    else:
        # Imports what torch imports at the first optimizer, which takes as long as torch itself.
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        for line in sys.stdin:
            run_in_fork(json.loads(line))
