"""TerminateOnNaNCallback(find=True) names where the first value arose that is not finite."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import (
    ConfigurationError,
    TerminateOnNaNCallback,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
)
from launching import launch
from tiny import tiny_data, tiny_trainer

# The saver tells that it saves no such weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not finite, so the state was not saved")

SAMPLE = 11
"""The planted one."""


def data_with(value):
    """A planted sample, whose first number is `value`."""
    inputs, targets = (tensor.clone() for tensor in tiny_data(dtype=torch.float32).tensors)
    inputs[SAMPLE, 0] = value
    return TensorDataset(inputs, targets)


class Block(nn.Module):
    """Takes a root between its layers: of what is far below zero it is nan."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, inputs):
        return self.second((self.first(inputs) + 100).sqrt())


class Exponential(nn.Module):
    """Is infinite where it is given more than 88."""

    def forward(self, inputs):
        return inputs.exp()


class RootOfZero(nn.Module):
    """The root of the absolute value: at zero its gradient is infinite."""

    def forward(self, inputs):
        return inputs.abs().sqrt()


def train(folder, model, data, callbacks=(), loss_func=nn.functional.cross_entropy, find=True, **arguments):
    """Two epochs of ten updates; returns the callback and the trainer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    nans = TerminateOnNaNCallback(find=find)
    saver = [] if folder is None else [SaveTrainingStateCallback(folder, save_every_n_updates=2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, loss_func, optimizer, [nans, *saver, *callbacks], seed=3)
    given = {"num_epochs": 2, "per_device_batch_size": 4, **arguments}
    trainer.train(data, **given)
    return nans, trainer


def update_of(data, sample=SAMPLE, seed=3):
    """The update of the first epoch that sees the planted sample."""
    seen = []

    class Looks(TrainerCallback):
        def on_train_step_end(self, trainer, batch, batch_output, step):
            if torch.isin(batch[0], data.tensors[0][sample]).any():
                seen.append(trainer.run_progress.updates_completed + 1)

    tiny_trainer(callbacks=[Looks], seed=seed, model=nn.Linear(5, 2)).train(data, 1, per_device_batch_size=4)
    return seen[0]


def test_the_batch(tmp_path, capsys):
    nans, trainer = train(tmp_path, nn.Linear(5, 2), data_with(math.nan))
    assert nans.origin.samples == [SAMPLE] and nans.origin.layer is None
    assert "the batch holds nan; samples [11]" in nans.origin.text
    assert re.search(r"loss .* nan", trainer.stop_reason)
    assert "the batch holds nan" in " ".join(capsys.readouterr().out.split())


def test_a_layer_whose_output_overflows_with_its_parameter_and_the_sample(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), Exponential(), nn.Linear(8, 2))
    nans, _ = train(tmp_path, model, data_with(1000.0))
    assert (nans.origin.layer, nans.origin.samples) == ("1", [SAMPLE])
    assert "the output of the layer '1' (Exponential) is infinite" in nans.origin.text
    data = data_with(0.0)
    data.tensors[0][SAMPLE] = 3e38
    nans, _ = train(tmp_path / "b", nn.Sequential(nn.Linear(5, 50), nn.Linear(50, 2)), data)
    assert (nans.origin.layer, nans.origin.parameter) == ("0", "0.weight")
    assert "its largest parameter is '0.weight'" in nans.origin.text


def test_an_operation_between_layers_is_told_with_its_module(tmp_path):
    nans, _ = train(tmp_path, nn.Sequential(Block()), data_with(-1000.0))
    assert (nans.origin.layer, nans.origin.samples) == ("0.second", [SAMPLE])
    assert "it comes from the forward of 0, between its layers" in nans.origin.text


def test_the_loss_function(tmp_path):
    def loss(outputs, targets):
        return (outputs[:, 0] + 100).sqrt().mean()

    nans, _ = train(tmp_path, nn.Linear(5, 2), data_with(-10000.0), loss_func=loss)
    assert nans.origin.layer is None and "it comes from the loss function" in nans.origin.text


def test_a_gradient_of_the_update_before_is_found_by_a_second_replay(tmp_path):
    data = data_with(0.0)
    data.tensors[0][SAMPLE] = 0
    linear = nn.Linear(5, 3, bias=False)
    nans, trainer = train(tmp_path, nn.Sequential(linear, RootOfZero()), data)
    update = update_of(data)
    assert nans.origin.update == update == trainer.run_progress.updates_completed - 1
    assert nans.origin.layer == "0" and nans.origin.parameter == "0.weight"
    assert "the gradient of the output of the layer '0' (Linear)" in nans.origin.text
    assert nans.origin.samples == [SAMPLE]


def test_a_step_of_the_optimizer(tmp_path):
    class RateExplodes(TrainerCallback):
        def on_optimizer_step_start(self, trainer):
            if trainer.run_progress.updates_completed + 1 == 5:
                trainer.optimizer.param_groups[0]["lr"] = 1e38

    def loss(outputs, targets):
        return 1000 * nn.functional.cross_entropy(outputs, targets)

    nans, _ = train(tmp_path, nn.Linear(5, 2), data_with(1.0), [RateExplodes()], loss)
    assert nans.origin.update == 5
    assert "the optimizer made 'weight' not finite" in nans.origin.text


def test_what_is_infinite_in_every_update_is_not_blamed(tmp_path):
    class Masked(nn.Module):
        """Fills with infinity, as attention does, and softmax takes it away."""

        def __init__(self):
            super().__init__()
            self.mask, self.layer = nn.Identity(), nn.Linear(5, 2)

        def forward(self, inputs):
            hidden = torch.full_like(inputs, -math.inf)
            return self.layer(inputs + self.mask(hidden).exp())

    nans, _ = train(tmp_path, Masked(), data_with(math.nan))
    assert "the batch holds nan" in nans.origin.text


def test_samples_are_those_of_the_step_under_accumulation(tmp_path):
    nans, _ = train(
        tmp_path, nn.Linear(5, 2), data_with(math.nan), per_device_batch_size=2, gradient_accumulation_steps=3
    )
    assert nans.origin.samples == [SAMPLE]


def test_nothing_changes_by_the_search(tmp_path):
    results = []
    for name, find in (("a", False), ("b", True)):
        nans, trainer = train(tmp_path / name, nn.Linear(5, 2), data_with(math.nan), find=find)
        assert (nans.origin is None) is not find
        history, progress = trainer.run_history.to_records(), vars(trainer.run_progress)
        states = sorted(path.name for path in (tmp_path / name).iterdir())
        results.append((history, progress, states, torch.get_rng_state().tolist()))
    assert results[0] == results[1]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_without_a_state_the_update_is_told_and_the_way_out(capsys):
    nans, trainer = train(None, nn.Linear(5, 2), data_with(math.nan))
    text = " ".join(capsys.readouterr().out.split())
    update = trainer.run_progress.updates_completed
    assert nans.origin is None
    assert f"of update {update} " in text and "Add SaveTrainingStateCallback" in text


def test_a_search_that_fails_is_told_and_the_run_returns(tmp_path, capsys):
    class Open(TrainerCallback):
        def __init__(self):
            self.file = Path(__file__).open()  # noqa: SIM115

    opened = Open()
    with opened.file:
        nans, trainer = train(tmp_path, nn.Linear(5, 2), data_with(math.nan), [opened])
    assert nans.origin is None and trainer.stop_reason
    assert "Open cannot be copied" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("ending", ["limit", "stop"])
def test_a_run_that_ends_otherwise_is_not_searched(tmp_path, ending, capsys):
    class Stops(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if ending == "stop":
                trainer.request_stop("enough")

    nans, _ = train(tmp_path, nn.Linear(5, 2), data_with(1.0), [Stops()])
    assert nans.origin is None and "Replaying" not in capsys.readouterr().out


def test_find_is_true_or_false():
    with pytest.raises(ConfigurationError, match=r"find is 1, but must be one of \[False, True\]"):
        TerminateOnNaNCallback(find=1)
    assert repr(TerminateOnNaNCallback(find=True)) == "TerminateOnNaNCallback(find=True)"


ON_TWO = """
    import sys
    import math
    from pathlib import Path
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveTrainingStateCallback
    from accel_core import TerminateOnNaNCallback, Trainer
    from tiny import tiny_data
    import warnings
    warnings.simplefilter("ignore")
    inputs, targets = (tensor.clone() for tensor in tiny_data(dtype=torch.float32).tensors)
    inputs[11, 0] = math.nan
    nans = TerminateOnNaNCallback(find=True)
    saver = SaveTrainingStateCallback(Path(sys.argv[1]), save_every_n_updates=1)
    torch.manual_seed(0)
    model = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, [nans, saver], seed=3)
    trainer.train(TensorDataset(inputs, targets), 2, per_device_batch_size=3)
    print(f"found {nans.origin.samples} on {trainer.data_group.index}")
"""


@pytest.mark.slow
def test_of_two_processes_the_sample_of_either_is_found(tmp_path):
    finished = launch(
        ON_TWO, processes=2, args=[tmp_path], env={"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    assert [f"found [11] on {index}" in finished.stdout for index in (0, 1)] == [True, True]


def test_a_resumed_run_that_has_not_saved_yet_goes_back_to_what_it_resumed_from(tmp_path):
    class Stops(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.run_progress.updates_completed == 2:
                trainer.request_stop("enough")

    data = data_with(math.nan)
    train(tmp_path, nn.Linear(5, 2), data, [Stops()])
    newest = latest_checkpoint(tmp_path)
    nans, trainer = train(None, nn.Linear(5, 2), data, resume_from=newest)
    assert trainer.last_checkpoint is None
    assert nans.origin.samples == [SAMPLE] and "the batch holds nan" in nans.origin.text
