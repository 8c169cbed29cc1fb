"""Two runs are compared by their states, and with replays down to the update."""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_core import CheckpointError, Trainer, TrainerCallback, compare_runs, samples_of
from replaying import saving
from tiny import tiny_data, tiny_trainer

EVERY = 8


class Planting(TrainerCallback):
    """Changes something at one update or from it on."""

    def __init__(self, update, what):
        self.update, self.what = update, what

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        due = trainer.run_progress.updates_completed + 1
        if self.what == "rate" and due >= self.update:
            trainer.optimizer.param_groups[0]["lr"] = 0.05

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if self.what == "weight" and trainer.run_progress.updates_completed == self.update:
            with torch.no_grad():
                trainer.model[0].weight[0, 0] += 0.5


def run(folder, data=None, callbacks=(), replayed=None):
    trainer = tiny_trainer(callbacks=callbacks if replayed else [*callbacks, saving(folder, EVERY)])
    given = {"num_epochs": 6, "per_device_batch_size": 4}
    data = tiny_data() if data is None else data
    if replayed:
        return trainer.replay(data, update=replayed, folder=folder, **given)
    trainer.train(data, **given)
    return folder


def test_equal_runs_are_equal(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    assert str(compare_runs(a, b)) == "equal"


@pytest.mark.parametrize("what", ["rate", "weight"])
@pytest.mark.parametrize("update", [1, 21, 37, 48])
def test_a_planted_difference_is_found_at_its_update(tmp_path, what, update):
    planting = [Planting(update, what)]
    a, b = run(tmp_path / "a"), run(tmp_path / "b", callbacks=planting)
    found = compare_runs(a, b)
    assert found.last_equal == ((update - 1) // EVERY * EVERY or None)
    assert found.first_difference == -(-update // EVERY) * EVERY
    replays = (lambda n: run(a, replayed=n), lambda n: run(b, callbacks=planting, replayed=n))
    found = compare_runs(a, b, replays)
    assert found.first_difference == update
    assert found.num_replays <= math.log2(EVERY) + 1
    assert ("learning_rates" in found.differing) == (what == "rate")
    assert not found.is_rounding


def test_another_sample_is_found_in_its_batch(tmp_path):
    inputs, targets = (tensor.clone() for tensor in tiny_data().tensors)
    a = run(tmp_path / "a")
    inputs[samples_of(a, 5)[0], 0] += 1
    # Each sample comes once in an epoch of ten updates.
    other = TensorDataset(inputs, targets)
    b = run(tmp_path / "b", other)
    found = compare_runs(a, b, (lambda n: run(a, replayed=n), lambda n: run(b, other, replayed=n)))
    assert found.first_difference == 5
    assert found.differing[:2] == ["batch", "loss"]


class Turned(torch.nn.Linear):
    """Adds the same numbers in another order, so that sums are rounded in another way."""

    def forward(self, inputs):
        return torch.nn.functional.linear(inputs.flip(-1), self.weight.flip(-1), self.bias)


class Shifted(torch.nn.Tanh):
    def forward(self, inputs):
        return super().forward(inputs) + 0.01


@pytest.mark.parametrize(
    ("position", "part", "is_rounding"), [(0, Turned(64, 32), True), (1, Shifted(), False)]
)
def test_the_layer_is_named_and_what_is_only_rounded_is_told_apart(tmp_path, position, part, is_rounding):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 64), torch.randint(2, (40,)))

    def run(folder, changes, replayed=None):
        torch.manual_seed(1)
        layers = [torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)]
        if changes:
            if is_rounding:
                part.load_state_dict(layers[position].state_dict())
            layers[position] = part
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        callbacks = [] if replayed else [saving(folder, EVERY)]
        trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer, callbacks, seed=1)
        if replayed:
            return trainer.replay(
                data, 2, update=replayed, folder=folder, per_device_batch_size=4, layers=True
            )
        trainer.train(data, 2, per_device_batch_size=4)
        return folder

    a, b = run(tmp_path / "a", False), run(tmp_path / "b", True)
    assert compare_runs(a, b).is_rounding == is_rounding
    found = compare_runs(a, b, (lambda n: run(a, False, n), lambda n: run(b, True, n)))
    assert found.first_difference == 1
    assert found.differing[0] == str(position)
    assert found.is_rounding == is_rounding
    assert ("up to rounding" in str(found)) == is_rounding


def test_runs_without_common_states_are_refused(tmp_path):
    a = run(tmp_path / "a")
    with pytest.raises(CheckpointError, match="none in common"):
        compare_runs(a / "update_00000008", a / "update_00000016")
    with pytest.raises(CheckpointError, match=r"holds no complete training state\. Pass a training state"):
        compare_runs(a, tmp_path / "b")


def test_the_command_tells_where_runs_part(tmp_path):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", callbacks=[Planting(21, "rate")])

    def compared(*paths):
        command = [sys.executable, "-m", "accel_core.compare", *paths]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return finished.returncode, finished.stdout + finished.stderr

    assert compared(a, a) == (0, "equal\n")
    status, text = compared(a, b)
    assert status == 1 and "equal up to update 16, differ from update 24" in text
    status, text = compared(a, tmp_path / "none")
    assert status == 2 and "none" in text
    assert compared(a) == (2, "Usage: python -m accel_core.compare A B\n")
