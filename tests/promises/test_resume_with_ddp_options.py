"""A state of some processes goes on on others with each option of DDP: the same samples in the same updates, so the same weights."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import Trainer
from case_runner import compare, run_as_script
from layouts import DDP_OPTIONS
from tiny import SaveAt

OPTIONS = {"none": {}, **DDP_OPTIONS}
SAMPLES_OF_UPDATE = 12
"""On any number of processes. 37 samples leave one for the last update of an epoch."""
LAUNCHES = (2, 3, 2)
"""Processes of each launch, which goes on from the states of the one before."""


def make_data():
    inputs = torch.randn(37, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def train(options, callbacks=(), **kwargs):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(**options)])
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, accelerator=accelerator, seed=0)
    size = SAMPLES_OF_UPDATE // accelerator.num_processes // 2
    trainer.train(make_data(), 3, per_device_batch_size=size, gradient_accumulation_steps=2, **kwargs)
    history = list(trainer.run_history.get_metric_values("train_loss_epoch"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, history, trainer.run_progress.updates_completed


def state_of(folder, name):
    return Path(folder) / name.replace(" ", "_")


def save_and_go_on(name):
    """Save in the middle of an epoch, and go on from the states of the launch before."""

    def case(batch_size):
        if Accelerator().num_processes == 1:
            return train(OPTIONS[name])
        own, *earlier = sys.argv[3:]
        whole = train(OPTIONS[name], [SaveAt(6, state_of(own, name))])
        return whole, *(train(OPTIONS[name], resume_from=state_of(folder, name)) for folder in earlier)

    return case


CASES = {name: save_and_go_on(name) for name in OPTIONS}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    found, folders = [], []
    for processes in LAUNCHES:
        folders.insert(0, tmp_path_factory.mktemp("states"))
        arguments = folders[:2]
        found.append(compare(CASES, __file__, processes, tmp_path_factory.mktemp("cases"), args=arguments))
    return found, folders


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_and_losses_are_those_of_the_run_that_was_not_stopped(launches, name):
    outcomes, folders = launches
    expected = outcomes[0].alone(name)
    assert expected[2] == 12
    for outcome, num_runs in zip(outcomes, (1, 2, 2), strict=True):
        for runs in outcome.of(name):
            assert len(runs) == num_runs
            for run in runs:
                torch.testing.assert_close(run, expected, rtol=0, atol=1e-12)
    on_one = train(OPTIONS[name], resume_from=state_of(folders[0], name))
    torch.testing.assert_close(on_one, expected, rtol=0, atol=1e-12)


if __name__ == "__main__":
    run_as_script(CASES)
