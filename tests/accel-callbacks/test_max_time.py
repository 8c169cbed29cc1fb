"""MaxTimeCallback: a run ends when its time is over. On several processes: tests/promises/test_every_stop_is_agreed.py."""

import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import MaxTimeCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback

DATA = TensorDataset(torch.ones(20, 3), torch.ones(20, 1))


def train(callbacks, num_epochs):
    model = nn.Linear(3, 1)
    trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks)
    trainer.train(DATA, num_epochs=num_epochs, eval_dataset=DATA, per_device_batch_size=4)
    return trainer


def test_a_run_stops_when_its_time_is_over_and_has_the_reason():
    train([], num_epochs=1)  # torch imports much when an optimizer first steps
    began = time.monotonic()
    trainer = train([MaxTimeCallback(minutes=0.2 / 60)], num_epochs=100_000)
    assert 0.2 <= time.monotonic() - began < 10
    assert "time limit of 0.00333333 minutes" in trainer.stop_reason
    assert trainer.run_progress.updates_completed > 0


def test_a_run_within_its_time_ends_by_itself():
    trainer = train([MaxTimeCallback(minutes=10)], num_epochs=2)
    assert trainer.stop_reason is None and trainer.run_progress.epochs_completed == 2


def test_no_epoch_begins_when_the_evaluation_took_the_rest_of_the_time():
    class SlowEvaluation(TrainerCallback):
        def on_eval_epoch_end(self, trainer, **kwargs):
            while time.monotonic() < limit.ends_at:
                pass

    limit = MaxTimeCallback(minutes=0.5 / 60)
    trainer = train([limit, SlowEvaluation], num_epochs=100)
    assert (trainer.run_progress.epochs_completed, trainer.run_progress.updates_completed) == (1, 5)


def test_each_run_has_all_the_time():
    limit = MaxTimeCallback(minutes=0.3 / 60)
    model = nn.Linear(3, 1)
    trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), [limit])
    trainer.train(DATA, num_epochs=100_000)
    trainer.train(DATA, num_epochs=1)
    assert trainer.stop_reason is None and trainer.run_progress.epochs_completed == 1


@pytest.mark.parametrize("minutes", [0, -1, "5", None, float("nan"), True])
def test_a_limit_that_is_no_time_is_refused(minutes):
    with pytest.raises(ConfigurationError, match=r"^minutes is .*number.*above 0.*Leave the callback out"):
        MaxTimeCallback(minutes)
