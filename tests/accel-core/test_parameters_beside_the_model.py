"""A parameter belongs to the optimizer that holds it, wherever it lives: in the model, or among the attributes of the trainer.

The reference is a loop written by hand. The file is its own script: see case_runner.
"""

import functools
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import AccelWarning, CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.deepspeed import DeepSpeed
from accel_core.errors import NotFiniteError
from accel_core.processes.group import DataGroup
from case_runner import run_as_script, shared_folder

NUM_SAMPLES = 37
IN_ORDER = {"shuffle": False}
ADAM, SGD = functools.partial(torch.optim.Adam, lr=0.05), functools.partial(torch.optim.SGD, lr=1e-3)
PLACES = ("model", "loss_func", "attribute", "parameter", "tensor", "closure")


class Shift(nn.Module):
    """Shifts by a parameter; its buffer counts calls on the samples' mean, so it differs between processes."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs):
        self.mean = outputs.detach().mean()
        return outputs + self.value


class ShiftedLoss(Shift):
    def forward(self, outputs, targets):
        return ((super().forward(outputs) - targets) ** 2).mean()


def squares(outputs, targets):
    return ((outputs - targets) ** 2).mean()


class ShiftingTrainer(Trainer):
    """Shifts by what an attribute holds, wherever that is."""

    shift = None

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        outputs = self.model(inputs)
        if isinstance(self.shift, nn.Module):
            outputs = self.shift(outputs)
        elif self.shift is not None:
            outputs = outputs + self.shift
        return {"loss": self.loss_func(outputs, targets), "model_outputs": outputs, "batch_size": len(inputs)}


def data():
    inputs = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, :3] * 2 + 1)


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def build(place, create_optimizer=ADAM, callbacks=(), **kwargs):
    """A trainer whose shift lives at `place`, and the shift."""
    model, loss_func, attribute = network(), squares, None
    if place == "model":
        model.append(Shift().double())
        shift = model[-1].value
    elif place == "loss_func":
        loss_func = ShiftedLoss().double()
        shift = loss_func.value
    elif place == "attribute":
        attribute = Shift().double()
        shift = attribute.value
    else:
        shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        shift = nn.Parameter(shift.detach()) if place == "parameter" else shift
        attribute = None if place == "closure" else shift
        if place == "closure":
            loss_func = lambda outputs, targets: squares(outputs + shift, targets)  # noqa: E731
    parameters = [*model[0].parameters(), *model[2].parameters(), shift]
    trainer = ShiftingTrainer(
        model, loss_func, create_optimizer(parameters), callbacks=callbacks, seed=3, **kwargs
    )
    trainer.shift = attribute
    return trainer, shift


def by_hand(batch_size, clip_norm=None, clip_value=None, num_epochs=2, lr=0.05):
    model, shift = network(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    parameters = [*model.parameters(), shift]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    inputs, targets = data().tensors
    for _ in range(num_epochs):
        for first in range(0, NUM_SAMPLES, batch_size):
            batch = slice(first, first + batch_size)
            squares(model(inputs[batch]) + shift, targets[batch]).backward()
            if clip_value is not None:
                nn.utils.clip_grad_value_(parameters, clip_value)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            optimizer.zero_grad()
    return flat(parameters)


def flat(parameters):
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters]).clone()


def result_of(trainer, shift):
    layers = trainer.model
    return flat([*layers[0].parameters(), *layers[2].parameters(), shift])


def train(trainer, per_device_batch_size, **kwargs):
    arguments = {"num_epochs": 2, "train_dataloader_kwargs": IN_ORDER, **kwargs}
    return trainer.train(data(), per_device_batch_size=per_device_batch_size, **arguments)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(PLACES),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 3),
    clip_norm=st.none() | st.floats(0.01, 1.0),
    clip_value=st.none() | st.floats(0.01, 0.5),
)
@pytest.mark.filterwarnings("ignore::accel_core.AccelWarning")
def test_training_equals_the_loop_by_hand_wherever_a_parameter_lives(
    place, batch_size, steps, clip_norm, clip_value
):
    trainer, shift = build(place)
    clip = {"gradient_clip_norm": clip_norm, "gradient_clip_value": clip_value}
    train(trainer, batch_size, gradient_accumulation_steps=steps, **clip)
    expected = by_hand(batch_size * steps, clip_norm, clip_value)
    assert torch.allclose(result_of(trainer, shift), expected, rtol=1e-9, atol=1e-11)


class SaveAt(TrainerCallback):
    def __init__(self, update, folder):
        self.update, self.folder = update, folder

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == self.update:
            trainer.save_training_state(self.folder / "state")
            trainer.save_checkpoint(self.folder / "export.pt")


def resumed_and_undisturbed(place, folder, batch_size):
    trainer, shift = build(place, callbacks=[SaveAt(3, folder)])
    train(trainer, batch_size)
    resumed, resumed_shift = build(place)
    train(resumed, batch_size, resume_from=folder / "state")
    return result_of(resumed, resumed_shift), result_of(trainer, shift)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore::accel_core.AccelWarning")
def test_a_resumed_run_is_equal_to_the_bit_wherever_a_parameter_lives(place, tmp_path):
    resumed, undisturbed = resumed_and_undisturbed(place, tmp_path, 8)
    assert torch.equal(resumed, undisturbed)


@pytest.mark.parametrize("place", ["loss_func", "attribute", "parameter"])
def test_an_export_holds_and_loads_what_is_trained_beside_the_model(place, tmp_path):
    trainer, shift = build(place, callbacks=[SaveAt(10, tmp_path)])
    train(trainer, 8)
    name = "loss_func" if place == "loss_func" else "shift"
    content = torch.load(tmp_path / "export.pt")
    assert torch.equal(content["modules_state_dict"][name]["value"], shift.detach())
    loaded, loaded_shift = build(place)
    loaded.load_checkpoint(tmp_path / "export.pt")
    assert torch.equal(result_of(loaded, loaded_shift), result_of(trainer, shift))


def test_an_export_without_what_is_trained_beside_loads_and_says_so(tmp_path, capsys):
    trainer, _ = build("model")
    trainer.save_checkpoint(tmp_path / "export.pt")
    content = torch.load(tmp_path / "export.pt")
    assert "modules_state_dict" not in content
    plain = Trainer(network(), squares, None, callbacks=[])
    plain.save_checkpoint(tmp_path / "plain.pt")
    loaded, _ = build("loss_func")
    loaded.load_checkpoint(tmp_path / "plain.pt")
    assert "loss_func" in capsys.readouterr().out


def test_modules_that_no_optimizer_holds_are_moved_and_not_saved(tmp_path):
    trainer, _ = build("model", callbacks=[SaveAt(3, tmp_path)])
    trainer.teacher = network()
    train(trainer, 8)
    assert not (tmp_path / "state" / "attributes.pt").exists()
    other, _ = build("model")
    train(other, 8, resume_from=tmp_path / "state")


@pytest.mark.parametrize(("saved", "resumed"), [("loss_func", "attribute"), ("attribute", "loss_func")])
def test_a_state_with_other_attributes_is_refused_and_changes_nothing(saved, resumed, tmp_path):
    trainer, _ = build(saved, callbacks=[SaveAt(3, tmp_path)])
    train(trainer, 8)
    other, shift = build(resumed)
    before = result_of(other, shift)
    with pytest.raises(CheckpointError, match=r"shift|loss_func"):
        train(other, 8, resume_from=tmp_path / "state")
    assert torch.equal(result_of(other, shift), before)


def test_a_module_of_another_shape_is_refused_by_name_and_changes_nothing(tmp_path):
    trainer, _ = build("loss_func", callbacks=[SaveAt(3, tmp_path)])
    train(trainer, 8)
    other, shift = build("loss_func")
    other.loss_func.value = shift = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    other.optimizer.param_groups[0]["params"][-1] = shift
    before = result_of(other, shift)
    with pytest.raises(CheckpointError, match="loss_func"):
        train(other, 8, resume_from=tmp_path / "state")
    assert torch.equal(result_of(other, shift), before)


def test_what_is_not_finite_beside_the_model_is_not_saved(tmp_path):
    class Spoil(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.run_progress.updates_completed == 3:
                with torch.no_grad():
                    trainer.loss_func.value[1] = float("inf")

    trainer, _ = build("loss_func", callbacks=[Spoil(), SaveAt(3, tmp_path)])
    with pytest.raises(NotFiniteError, match=r"loss_func\.value"):
        train(trainer, 8)


def test_a_frozen_model_is_trained_by_what_is_beside_it():
    trainer, shift = build("loss_func", create_optimizer=functools.partial(torch.optim.SGD, lr=0.5))
    for parameter in trainer.model.parameters():
        parameter.requires_grad_(False)
    train(trainer, NUM_SAMPLES, num_epochs=60)
    inputs, targets = data().tensors
    best = (targets - trainer.model(inputs)).mean(0)
    assert torch.allclose(shift.detach(), best, atol=1e-6)


@pytest.mark.parametrize(("place", "name"), [("loss_func", "loss_func"), ("parameter", "shift")])
@pytest.mark.usefixtures("deepspeed_plugin")
def test_deepspeed_refuses_what_is_beside_the_model_by_name(place, name):
    trainer, _ = build(place)
    trainer._engine = DeepSpeed(trainer.accelerator, DataGroup())
    with pytest.raises(ConfigurationError, match=rf"trainer\.{name} .*DEEPSPEED"):
        train(trainer, 8)
    assert trainer.engine.prepared is None


# ---------------------------------------------------------------------- gradients that nobody clears


class Recorder(TrainerCallback):
    def __init__(self):
        self.gradients, self.left = [], []

    def on_optimizer_step_start(self, trainer):
        model = trainer.get_model()
        self.gradients.append(flat([parameter.grad for parameter in model[0].parameters()]))

    def on_optimizer_step_end(self, trainer):
        self.left += [
            parameter.grad for parameter in trainer.get_model().parameters() if parameter.grad is not None
        ]


def head_only(callbacks=(), freeze=False, create_optimizer=SGD):
    model = network()
    if freeze:
        model[0].requires_grad_(False)
    return Trainer(model, squares, create_optimizer(model[2].parameters()), callbacks=callbacks, seed=0)


class OwnZeroGrad(torch.optim.SGD):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("kind", [torch.optim.SGD, OwnZeroGrad])
def test_gradients_that_no_optimizer_holds_are_those_of_one_update_and_cleared_after_it(kind):
    recorder = Recorder()
    trainer = head_only([recorder], create_optimizer=functools.partial(kind, lr=0.0))
    train(trainer, 8, num_epochs=3)
    assert recorder.left == []
    assert torch.allclose(recorder.gradients[0], recorder.gradients[5], rtol=1e-12)


def test_gradients_that_no_optimizer_holds_enter_no_norm():
    found = []
    for freeze in (False, True):
        trainer = head_only(freeze=freeze)
        train(trainer, 8, gradient_clip_norm=0.1)
        found.append(flat(trainer.model.parameters()))
    assert torch.equal(*found)


def test_a_parameter_that_is_given_to_the_optimizer_later_starts_with_the_gradient_of_one_update():
    class Give(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            if trainer.run_progress.epochs_completed == 1:
                trainer.optimizer.add_param_group(
                    {"params": [*trainer.get_model()[0].parameters()], "lr": 0.5}
                )

    trainer = head_only([Give()], create_optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    train(trainer, NUM_SAMPLES)
    expected = network()
    inputs, targets = data().tensors
    squares(expected(inputs), targets).backward()
    torch.optim.SGD(expected[0].parameters(), lr=0.5).step()
    assert torch.allclose(flat(trainer.model.parameters()), flat(expected.parameters()), rtol=1e-12)


def test_a_teacher_with_gradients_collects_none():
    trainer, _ = build("attribute", create_optimizer=lambda held: torch.optim.SGD(held[:-1], lr=0.1))
    train(trainer, 8)
    assert trainer.shift.value.grad is None


def test_what_trainer_and_model_do_not_know_is_still_warned_of():
    trainer, _ = build("closure")
    with pytest.warns(AccelWarning, match="1 parameter that the model does not have"):
        train(trainer, 8)


# ---------------------------------------------------------------------- several processes


def train_at(place, batch_size, **kwargs):
    trainer, shift = build(place)
    train(trainer, batch_size, **kwargs)
    return result_of(trainer, shift)


def train_scaled(batch_size):
    class Scaling(ShiftingTrainer):
        def create_accelerator(self):
            accelerator = Accelerator(cpu=True)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            return accelerator

    trainer, shift = build("loss_func")
    trainer.__class__ = Scaling
    train(trainer, batch_size, gradient_clip_norm=0.5)
    return result_of(trainer, shift)


class GiveLater(TrainerCallback):
    def on_train_epoch_start(self, trainer):
        if trainer.run_progress.epochs_completed == 1:
            with torch.no_grad():
                # As if each process had drawn its own.
                trainer.loss_func.value += 0.0 if trainer.is_main_process else 5.0
            trainer.optimizer.add_param_group({"params": [trainer.loss_func.value]})


def give_later(batch_size):
    trainer, shift = build("loss_func", create_optimizer=lambda held: torch.optim.Adam(held[:-1], lr=0.05))
    trainer.callbacks.add_callback(GiveLater())
    train(trainer, batch_size)
    return result_of(trainer, shift)


def used_by_one_process(batch_size):
    """A parameter with a gradient only where the first sample of the epoch is; another with none anywhere."""

    class Sparse(ShiftedLoss):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.ones(()))
            self.never = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            loss = super().forward(outputs, targets)
            is_first = bool((targets == data().tensors[1][0]).all(-1).any())
            return loss + self.first / len(targets) if is_first else loss

    model, loss_func = network(), Sparse().double()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=0.05, weight_decay=0.1)
    trainer = Trainer(model, loss_func, optimizer, callbacks=[], seed=0)
    with warnings.catch_warnings():
        # One parameter has no gradient on any process, which is what is tested.
        warnings.simplefilter("ignore", AccelWarning)
        train(trainer, batch_size, max_num_train_steps=1)
    return flat([*model.parameters(), *loss_func.parameters()])


def buffers_beside(batch_size):
    trainer, _ = build("loss_func")
    train(trainer, batch_size)
    return trainer.loss_func.mean.item()


def resume(batch_size):
    resumed, undisturbed = resumed_and_undisturbed("loss_func", shared_folder(), batch_size)
    return bool(torch.equal(resumed, undisturbed))


CASES = {
    **{place: functools.partial(train_at, place) for place in ("loss_func", "attribute", "parameter")},
    "clipped": functools.partial(train_at, "loss_func", gradient_clip_norm=0.1),
    "accumulated": functools.partial(train_at, "loss_func", gradient_accumulation_steps=3),
    "scaled": train_scaled,
    "given later": give_later,
    "used by one process": used_by_one_process,
    "buffers": buffers_beside,
    "resumed": resume,
}


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("buffers", "resumed")])
def test_several_processes_train_what_is_beside_the_model_as_one(outcome, case):
    first, second = outcome.of(case)
    assert torch.equal(first, second)
    assert torch.allclose(first, outcome.alone(case), rtol=1e-7, atol=1e-9)


def test_buffers_beside_the_model_are_the_main_processs(outcome):
    first, second = outcome.of("buffers")
    assert first == second


def test_several_processes_resume_what_is_beside_the_model_to_the_bit(outcome):
    assert outcome.of("resumed") == [True, True]


def test_a_state_holds_the_attributes_that_are_trained_and_names_them(tmp_path: Path):
    trainer, _ = build("loss_func", callbacks=[SaveAt(3, tmp_path)])
    train(trainer, 8)
    assert '"loss_func"' in (tmp_path / "state" / "trainer_state.json").read_text()
    assert list(torch.load(tmp_path / "state" / "attributes.pt")["modules"]) == ["loss_func"]


if __name__ == "__main__":
    run_as_script(CASES)
