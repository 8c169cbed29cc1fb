"""Steps that bypass Accelerate give the same weights as steps through it, to the last bit."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import Trainer, TrainerCallback
from accel_core.engines.single import SingleProcess
from case_runner import compare, run_as_script

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}
SETTINGS = list(itertools.product(("no", "bf16"), (1, 3), OPTIMIZERS, (None, 0.5)))
NAMES = [
    f"{precision}, {steps} steps, {optimizer}, clip {norm}" for precision, steps, optimizer, norm in SETTINGS
]


def make_data():
    inputs = torch.randn(46, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def make_trainer(precision, optimizer="sgd", callbacks=()):
    AcceleratorState._reset_state()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    return Trainer(
        model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, accelerator=accelerator, seed=4
    )


def go_through_accelerate(monkeypatch):
    monkeypatch.setattr(SingleProcess, "bypasses_accelerate", lambda engine, optimizer: False)


def train(bypasses, setting, **kwargs):
    """Weights and losses after three epochs with steps that bypass Accelerate, or go through it."""
    precision, steps, optimizer, norm = setting
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not bypasses:
            go_through_accelerate(monkeypatch)
        trainer = make_trainer(precision, optimizer)
        history = trainer.train(
            make_data(),
            num_epochs=3,
            eval_dataset=make_data(),
            per_device_batch_size=4,
            gradient_accumulation_steps=steps,
            gradient_clip_norm=norm,
            create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
            **kwargs,
        )
    is_torchs = type(trainer.engine.optimizer).__module__.startswith("torch.optim")
    return dict(trainer.model.state_dict()), history.to_records(), is_torchs


def check_equal(bypassing, through):
    assert bypassing[2] and not through[2], "each called what it should"
    assert bypassing[1] == through[1]
    assert all(torch.equal(bypassing[0][name], through[0][name]) for name in bypassing[0])


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_bypassing_accelerate_and_going_through_it_give_equal_weights_and_losses(setting):
    check_equal(train(True, setting), train(False, setting))


class SaveOnce(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == 5:
            trainer.save_training_state(self.folder)


def test_a_run_is_resumed_through_accelerate_as_if_it_had_bypassed_it_without_a_stop(monkeypatch, tmp_path):
    arguments = {
        "num_epochs": 3,
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clip_norm": 0.5,
    }
    whole = make_trainer("no", "adamw", [SaveOnce(tmp_path / "state")])
    whole.train(make_data(), **arguments)
    go_through_accelerate(monkeypatch)
    resumed = make_trainer("no", "adamw")
    resumed.train(make_data(), resume_from=tmp_path / "state", **arguments)
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("bypasses", [True, False], ids=["bypassing", "through"])
def test_accumulation_equals_the_big_batch_bypassing_accelerate_and_through_it(bypasses, monkeypatch):
    if not bypasses:
        go_through_accelerate(monkeypatch)
    weights = []
    for batch_size, steps in ((12, 1), (4, 3)):
        torch.manual_seed(1)
        model = nn.Linear(6, 3).double()
        inputs, targets = make_data().tensors
        trainer = Trainer(
            model,
            nn.functional.cross_entropy,
            torch.optim.SGD(model.parameters(), lr=0.1),
            callbacks=(),
            seed=4,
        )
        data = TensorDataset(inputs.double(), targets)
        trainer.train(data, 2, per_device_batch_size=batch_size, gradient_accumulation_steps=steps)
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-12)


class ClearsItself(torch.optim.SGD):
    cleared = 0

    def zero_grad(self, set_to_none=True):
        self.cleared += 1
        super().zero_grad(set_to_none)


def test_an_optimizer_that_clears_gradients_in_its_own_way_is_asked_to():
    model = nn.Linear(6, 3)
    optimizer = ClearsItself(model.parameters(), lr=0.1)
    Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=()).train(
        make_data(), max_num_train_steps=3
    )
    assert optimizer.cleared >= 3


CASES = {
    name: lambda batch_size, setting=setting: (train(True, setting), train(False, setting))
    for name, setting in zip(NAMES, SETTINGS, strict=True)
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return compare(CASES, __file__, 2, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", NAMES)
def test_bypassing_accelerate_and_going_through_it_give_equal_weights_and_losses_on_two_processes(
    two_processes, name
):
    for bypassing, through in two_processes.of(name):
        check_equal(bypassing, through)
    (first, _), (second, _) = two_processes.of(name)
    assert all(
        torch.equal(first[0][key], second[0][key])
        for key in first[0]
        if "running" not in key and "num_" not in key
    )


if __name__ == "__main__":
    run_as_script(CASES)
