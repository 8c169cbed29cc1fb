"""Resuming on two processes to the bit, on another number of them with the next sample, and after a worker was killed."""

import json
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from torch.utils.data import Dataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues, latest_checkpoint
from launching import launch, start, wait_until

NUM_SAMPLES, NUM_EPOCHS = 53, 3
EXAMPLE = Path(__file__).parents[2] / "examples" / "05_resume_exactly.py"
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parents[1])}


class AugmentedPoints(Dataset):
    """Points with random noise, and their index."""

    def __init__(self, num_samples):
        self.points = torch.randn(num_samples, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return self.points[index] + 0.1 * noise, (self.points[index].sum() > 0).long(), index


class Seen(TrainerCallback):
    """Writes down which samples of which epoch this process has trained on, and how many epochs it has seen end."""

    def __init__(self, path):
        self.path = path
        self.epochs = 0

    def on_train_step_end(self, trainer, batch, batch_output, step):
        with self.path.open("a") as file:
            file.write(json.dumps([trainer.run_progress.epochs_completed, batch[2].tolist()]) + "\n")

    def on_training_run_epoch_end(self, trainer):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class StopAt(TrainerCallback):
    """Asks for a stop on the last process alone."""

    def __init__(self, update):
        self.update = update

    def on_optimizer_step_end(self, trainer):
        accelerator = trainer.accelerator
        if (
            trainer.run_progress.updates_completed == self.update
            and accelerator.process_index == accelerator.num_processes - 1
        ):
            trainer.request_stop("enough for now")


def run(folder, stage, stop_at=None, states="states"):
    """Go on from what is in the folder. Returns the trainer."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    # Dropout draws from the random state of the process, of which each has its own.
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.3),
        torch.nn.Linear(6, 2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = Seen(folder / f"seen_{stage}_{accelerator.process_index}")
    stop = [] if stop_at is None else [StopAt(stop_at)]
    saver = SaveTrainingStateCallback(folder / states, save_every_n_updates=2, keep_last=1)
    trainer = Trainer(
        model,
        torch.nn.functional.cross_entropy,
        optimizer,
        [seen, *stop, saver],
        accelerator=accelerator,
        seed=5,
    )
    trainer.train(
        AugmentedPoints(NUM_SAMPLES),
        NUM_EPOCHS,
        eval_dataset=AugmentedPoints(9),
        per_device_batch_size=3,
        gradient_accumulation_steps=2,
        create_scheduler_fn=partial(
            torch.optim.lr_scheduler.OneCycleLR,
            max_lr=0.05,
            total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS + 50,
        ),
        seed_each_sample=True,
        # Where the other processes see nothing, or something else, as on a disk that is late, the main one's
        # choice counts.
        resume_from=latest_checkpoint(folder / states) if accelerator.is_main_process else None,
    )
    return trainer


def assert_same(one, other):
    """Everything of this process is equal to the bit."""
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(one.model.state_dict()[name], tensor), name
    for index, state in other.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(one.optimizer.state_dict()["state"][index][name], value), (index, name)
    assert one.scheduler.state_dict() == other.scheduler.state_dict()
    assert one.run_history.to_records() == other.run_history.to_records()
    assert one.run_progress == other.run_progress


def main(folder, stage):
    """What the two processes do."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2 and accelerator.distributed_type == DistributedType.MULTI_CPU
    if stage == "same":
        whole = run(folder, "whole", states="states_of_whole")
        stopped = run(folder, "first", stop_at=6)
        assert stopped.stop_reason == "enough for now" and stopped.run_progress.updates_completed == 7
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.copytree(folder / "states", folder / "stopped")
        accelerator.wait_for_everyone()
        assert_same(run(folder, "rest"), whole)
    else:
        run(folder, "third")
    print(f"process {accelerator.process_index} is through")


def samples_seen(folder, *stages):
    """How often each sample was trained on in each epoch."""
    seen = [[0] * NUM_SAMPLES for _ in range(NUM_EPOCHS)]
    for stage in stages:
        for path in folder.glob(f"seen_{stage}_*"):
            for line in path.read_text().splitlines():
                epoch, indices = json.loads(line)
                for index in indices:
                    seen[epoch][index] += 1
    return seen


def losses_in(state):
    """The records of the epochs' losses in a training state."""
    records = map(json.loads, (state / "history.jsonl").read_text().splitlines())
    return [record for record in records if record["name"] == "train_loss_epoch"]


def test_two_processes_go_on_to_the_bit_and_another_number_goes_on_with_the_next_sample(tmp_path, capsys):
    once = [[1] * NUM_SAMPLES for _ in range(NUM_EPOCHS)]
    finished = launch(Path(__file__), args=[tmp_path, "same"], env=ENVIRONMENT)
    assert finished.stdout.count("is through") == 2
    assert samples_seen(tmp_path, "whole") == samples_seen(tmp_path, "first", "rest") == once

    shutil.rmtree(tmp_path / "states")
    shutil.copytree(tmp_path / "stopped", tmp_path / "states")
    alone = run(tmp_path, "second", stop_at=16)
    assert alone.run_progress.updates_completed == 17
    assert "1 instead of 2 processes" in capsys.readouterr().out
    finished = launch(Path(__file__), args=[tmp_path, "other"], env=ENVIRONMENT)
    assert "2 instead of 1 process" in finished.stdout
    assert samples_seen(tmp_path, "first", "second", "third") == once
    losses = losses_in(latest_checkpoint(tmp_path / "states"))
    assert [record["epoch"] for record in losses] == [1, 2, 3]
    of_whole = [record["value"] for record in losses_in(latest_checkpoint(tmp_path / "states_of_whole"))]
    # Summed over the parts of the epoch that two processes and one have trained.
    assert losses[0]["value"] == pytest.approx(of_whole[0], rel=0.2)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_started_again_and_the_weights_are_those_of_no_kill(tmp_path):
    arguments = ["--epochs", 3, "--save-dir"]
    whole = launch(EXAMPLE, args=[*arguments, tmp_path / "whole"], timeout=240)
    with start(EXAMPLE, args=[*arguments, tmp_path / "killed"], max_restarts=2) as running:
        wait_until(lambda: latest_checkpoint(tmp_path / "killed"), running, timeout=120)
        running.workers()[1].send_signal(signal.SIGKILL)
        finished = running.wait(240)
    assert finished.returncode == 0, finished.stderr
    fingerprints = [
        [line for line in text.splitlines() if line.startswith("Fingerprint")]
        for text in (whole.stdout, finished.stdout)
    ]
    assert fingerprints[0] == fingerprints[1] and len(fingerprints[0]) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
