"""Resuming to the bit on three processes and more, where the order in which gradients are added counts.

On two processes a + b = b + a hides it. The file is its own script: see case_runner. With the name of a job
as its second argument it is the job that is killed.
"""

import functools
import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, latest_checkpoint
from accel_core.processes.collectives import is_distributed
from case_runner import compare, run_as_script, shared_folder
from launching import launch, start, wait_until

NUM_SAMPLES, STATE_AT = 71, 5


def data():
    inputs = torch.randn(NUM_SAMPLES, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :8].argmax(1))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.shift = nn.Parameter(torch.zeros(8))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs * self.weight + self.shift, targets)


class SecondOptimizer(Trainer):
    """Trains a network that guesses what the model says, inside the step."""

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        guess = self.guesser(batch[0])
        self.backward_step(nn.functional.mse_loss(guess, output["model_outputs"].detach()))
        self.step_optimizer(self.guesser_optimizer, gradient_clip_norm=1.0)
        return output


class Unfreeze(TrainerCallback):
    """Freezes the first layer, and lets go of it after the first epoch: the model is wrapped anew."""

    def on_prepare_start(self, trainer):
        trainer.model[0].requires_grad_(False)

    def on_train_epoch_start(self, trainer):
        if trainer.run_progress.epochs_completed > 0:
            trainer.get_model()[0].requires_grad_(True)


class SaveAt(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == STATE_AT:
            trainer.save_training_state(self.folder)


def create(kind=Trainer, callbacks=(), unfreezes=False, **ddp):
    """A trainer whose gradients fill several buckets of a megabyte."""
    torch.manual_seed(0)
    sizes = [16, 500, 500, 500]
    layers = [
        part for size in itertools.pairwise(sizes) for part in (nn.Linear(*size), nn.Tanh(), nn.Dropout(0.2))
    ]
    model, loss_func = nn.Sequential(*layers, nn.Linear(500, 8)), Scale()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=1e-3)
    accelerator = Accelerator(
        cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=1, **ddp)]
    )
    unfreeze = [Unfreeze()] if unfreezes else []
    trainer = kind(
        model, loss_func, optimizer, callbacks=[*unfreeze, *callbacks], accelerator=accelerator, seed=0
    )
    trainer.guesser = nn.Sequential(nn.Linear(16, 100), nn.Tanh(), nn.Linear(100, 8))
    if kind is SecondOptimizer:
        trainer.guesser_optimizer = torch.optim.Adam(trainer.guesser.parameters(), lr=1e-3)
    return trainer


def train(trainer, accumulation=1, resume_from=None, num_epochs=2):
    arguments = {
        "gradient_accumulation_steps": accumulation,
        "gradient_clip_norm": 0.5,
        "resume_from": resume_from,
    }
    trainer.train(data(), num_epochs, per_device_batch_size=3, **arguments)
    modules = (trainer.model, trainer.loss_func, trainer.guesser)
    return torch.cat(
        [parameter.detach().flatten() for module in modules for parameter in module.parameters()]
    )


def resumed_and_undisturbed(batch_size, accumulation=1, **settings):
    """The bits of both runs, and what the resumed one has printed."""
    folder, printed = shared_folder() / "state", []
    undisturbed = train(create(callbacks=[SaveAt(folder)], **settings), accumulation=accumulation)
    trainer = create(**settings)
    trainer.print = lambda *args: printed.append(" ".join(map(str, args)))
    resumed = train(trainer, accumulation=accumulation, resume_from=folder)
    if is_distributed():
        torch.distributed.barrier()
    if trainer.is_main_process:
        shutil.rmtree(folder.parent)
    return torch.equal(resumed, undisturbed), (resumed - undisturbed).abs().max().item(), "\n".join(printed)


CASES = {
    "plain": resumed_and_undisturbed,
    "accumulated": functools.partial(resumed_and_undisturbed, accumulation=2),
    "unfrozen": functools.partial(resumed_and_undisturbed, unfreezes=True),
    "second optimizer": functools.partial(resumed_and_undisturbed, kind=SecondOptimizer),
    "unused parameters": functools.partial(resumed_and_undisturbed, find_unused_parameters=True),
    "static graph": functools.partial(resumed_and_undisturbed, static_graph=True),
}


@pytest.fixture(
    scope="module", params=[3, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format
)
def outcome(request, tmp_path_factory):
    return compare(CASES, __file__, request.param, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("case", [case for case in CASES if case != "static graph"])
def test_a_resumed_run_is_equal_to_the_bit(outcome, case):
    for is_equal, difference, printed in outcome.of(case):
        assert is_equal, difference
        assert "up to rounding" not in printed


def test_a_static_graph_resumes_up_to_rounding_and_says_so(outcome):
    for _, difference, _ in outcome.of("static graph"):
        assert difference < 1e-4
    printed = outcome.of("static graph")[0][2]
    assert "up to rounding" in printed and "static_graph" in printed


# ---------------------------------------------------------------------- killed


def job(folder, states):
    """Go on from the newest state in `folder / states`, and leave the weights there."""
    saver = SaveTrainingStateCallback(folder / states, save_every_n_updates=1, keep_last=2)
    trainer = create(SecondOptimizer, callbacks=[saver], unfreezes=True)
    weights = train(trainer, accumulation=2, resume_from=latest_checkpoint(folder / states), num_epochs=4)
    if trainer.is_main_process:
        torch.save(weights, folder / f"{states}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 4])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(processes, tmp_path):
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    launch(Path(__file__), processes, [tmp_path, "whole"], env=environment)
    for update in (2, 5):
        with start(Path(__file__), processes, [tmp_path, "killed"], env=environment) as running:
            # The loop goes on, so it is killed somewhere in the next updates.
            wait_until(lambda: any(tmp_path.glob(f"killed/update_{update:08}")), running)  # noqa: B023
            running.kill()
    assert not (tmp_path / "killed.pt").exists()
    launch(Path(__file__), processes, [tmp_path, "killed"], env=environment)
    assert torch.equal(torch.load(tmp_path / "killed.pt"), torch.load(tmp_path / "whole.pt"))


if __name__ == "__main__":
    if sys.argv[2] in ("whole", "killed"):
        job(Path(sys.argv[1]), sys.argv[2])
    else:
        run_as_script(CASES, create_accelerator=functools.partial(Accelerator, cpu=True))
