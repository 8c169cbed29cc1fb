"""Processes that make different weights are found after the first update and before each save.

The file is its own script: see case_runner.
"""

import functools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.averaging import checksum
from accel_core.engines.ddp import DDP
from case_runner import run_as_script, shared_folder
from tiny import tiny_data, tiny_network


class AroundTheWrapper(Trainer):
    """Calls the model that nothing synchronises."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        outputs = self.get_model()(inputs)
        return {"loss": self.loss_func(outputs, targets), "model_outputs": outputs, "batch_size": len(inputs)}


class GlobalModel(Trainer):
    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.compute = lambda inputs: model(inputs)

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        outputs = self.compute(inputs)
        return {"loss": self.loss_func(outputs, targets), "model_outputs": outputs, "batch_size": len(inputs)}


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, outputs, targets):
        return nn.functional.cross_entropy(outputs + self.value, targets)


class Change(TrainerCallback):
    """Multiplies what `choose` returns of the trainer by `factor` after an update, on the last process only."""

    def __init__(self, update, choose, factor):
        self.update, self.choose, self.factor = update, choose, factor

    def on_optimizer_step_end(self, trainer):
        group = trainer.data_group
        if trainer.run_progress.updates_completed == self.update and group.index == group.size - 1 > 0:
            with torch.no_grad():
                self.choose(trainer).mul_(self.factor)


class Save(TrainerCallback):
    def __init__(self, *updates, export=False):
        self.updates, self.export, self.folder = updates, export, shared_folder()

    def on_optimizer_step_end(self, trainer):
        update = trainer.run_progress.updates_completed
        if update in self.updates and self.export:
            trainer.save_checkpoint(self.folder / "export.pt")
        elif update in self.updates:
            trainer.save_training_state(self.folder / str(update))


def what_happens(batch_size, kind=Trainer, lr=0.1, rank_lr=0.0, scheduler=None, callbacks=()):
    """The updates made, the error and the warnings of a run."""
    model, loss_func = tiny_network(), Shift()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_func.parameters()], lr=lr)
    trainer = kind(model, loss_func, optimizer, callbacks=[create() for create in callbacks], seed=0)
    optimizer.param_groups[0]["lr"] += rank_lr * trainer.data_group.index
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train(
                tiny_data(), num_epochs=2, per_device_batch_size=batch_size, create_scheduler_fn=scheduler
            )
        except ConfigurationError as raised:
            error = str(raised)
    told = [str(warning.message) for warning in caught if issubclass(warning.category, AccelWarning)]
    return trainer.run_progress.updates_completed, error, told


def weight(trainer):
    return trainer.get_model()[0].weight


def comparisons(batch_size):
    """The updates made, and how often the processes have compared their weights."""
    calls, compare = [], DDP.check_equal_parameters
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(DDP, "check_equal_parameters", lambda engine: calls.append(1) or compare(engine))
        made, _, _ = what_happens(batch_size)
    return made, len(calls)


WARM_UP = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda update: float(update > 2))
SAVE = functools.partial(Save, 4, 5)
CASES = {
    "around the wrapper": functools.partial(what_happens, kind=AroundTheWrapper),
    "a global model": functools.partial(what_happens, kind=GlobalModel),
    "rates": functools.partial(what_happens, rank_lr=0.1),
    "rates after warm-up": functools.partial(what_happens, rank_lr=0.1, scheduler=WARM_UP, callbacks=[SAVE]),
    "rates before an export": functools.partial(
        what_happens, rank_lr=0.1, scheduler=WARM_UP, callbacks=[functools.partial(Save, 4, export=True)]
    ),
    "beside the model": functools.partial(
        what_happens,
        callbacks=[functools.partial(Change, 3, lambda trainer: trainer.loss_func.value, 1.01), SAVE],
    ),
    "rounding": functools.partial(
        what_happens, callbacks=[functools.partial(Change, 3, weight, 1 + 1e-9), SAVE]
    ),
    "comparisons": comparisons,
    "nothing": functools.partial(what_happens, callbacks=[SAVE]),
}


@pytest.mark.parametrize(
    ("case", "updates", "name"),
    [
        ("around the wrapper", 0, "0.weight"),
        ("a global model", 0, "0.weight"),
        ("rates", 0, "0.weight"),
        ("rates after warm-up", 4, "0.weight"),
        ("rates before an export", 4, "0.weight"),
        ("beside the model", 4, "loss_func.value"),
    ],
)
def test_different_weights_are_an_error_on_all_processes_that_names_a_parameter_and_causes(
    outcome, case, updates, name
):
    for made, error, told in outcome.of(case):
        assert made == updates and not told
        assert repr(name) in error and "self.model" in error and "learning rate" in error


def test_a_difference_of_rounding_is_warned_of_once(outcome):
    for made, error, told in outcome.of("rounding"):
        assert made == 10 and error is None
        assert len(told) == 1 and "'0.weight'" in told[0]


def test_equal_weights_are_no_reason_to_say_anything(outcome):
    assert outcome.of("nothing") == [(10, None, [])] * 2


def test_weights_are_compared_after_the_first_update_and_not_after_each(outcome):
    assert outcome.of("comparisons") == [(10, 1)] * 2


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.uint8,
]


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(1, 4), max_size=3),
    position=st.integers(0, 10**6),
    seed=st.integers(0, 1000),
)
def test_a_checksum_is_that_of_the_values_and_notices_each_of_them(dtype, shape, position, seed):
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 100 + 1).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    assert 0 <= checksum(tensor) < 2**62
    other = tensor.clone().reshape(-1)
    other[position % len(other)] += 1
    assert checksum(other.reshape(shape)) != checksum(tensor)


def test_a_checksum_of_many_values_is_that_of_their_chunks_in_order():
    tensor = torch.zeros(3 * 2**20 + 5)
    found = {checksum(tensor).item()}
    for position in (0, 2**20, 2**21, len(tensor) - 1):
        other = tensor.clone()
        other[position] = 1.0
        found.add(checksum(other).item())
    assert len(found) == 5


if __name__ == "__main__":
    run_as_script(CASES)
