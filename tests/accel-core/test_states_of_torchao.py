"""Optimizers of torchao keep their state in 8 bits, in tensors of a class of its own: it is saved and goes on to the bit."""

import warnings

import pytest
import torch

from accel_core import Trainer
from tiny import SaveAt, tiny_data, weights_of

with warnings.catch_warnings():
    # What torchao warns about while it is imported is not ours.
    warnings.simplefilter("ignore")
    torchao_optim = pytest.importorskip("torchao.optim", exc_type=ImportError)

DATA = tiny_data(24, torch.float32)


def create_trainer(*callbacks):
    torch.manual_seed(0)
    # Only parameters of 4,096 values and more are kept in 8 bits.
    model = torch.nn.Sequential(torch.nn.Linear(5, 1024), torch.nn.Tanh(), torch.nn.Linear(1024, 2))
    optimizer = torchao_optim.AdamW8bit(model.parameters(), lr=0.01)
    return Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks, seed=3)


def train(trainer, **kwargs):
    trainer.train(DATA, 2, **kwargs)
    return trainer


def plain(value):
    return value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value


@pytest.mark.seconds
def test_a_run_with_an_8_bit_optimizer_is_saved_and_goes_on_to_the_bit(tmp_path, monkeypatch):
    # Compiling the step takes a minute and changes nothing about states.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    whole = train(create_trainer(SaveAt(2, tmp_path / "state")))
    resumed = train(create_trainer(), resume_from=tmp_path / "state")
    assert resumed.run_progress.updates_completed == whole.run_progress.updates_completed == 6
    assert torch.equal(weights_of(resumed), weights_of(whole))
    expected, found = (each.optimizer.state_dict()["state"] for each in (whole, resumed))
    kinds = {type(value).__name__ for state in expected.values() for value in state.values()}
    assert any("8bit" in kind for kind in kinds), kinds
    for number, state in expected.items():
        for name, value in state.items():
            assert type(found[number][name]) is type(value)
            assert torch.equal(plain(torch.as_tensor(found[number][name])), plain(torch.as_tensor(value)))
