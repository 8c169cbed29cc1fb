"""Optimizers with a train mode and an eval mode, and modules in eval mode, against loops written by hand."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from accel_callbacks import ModelFreezer, StepBasedEvaluationCallback, UnfreezeCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.single import SingleProcess
from case_runner import run_as_script, shared_folder
from schedule_free import ScheduleFreeSGD
from tiny import SaveAt, tiny_data, tiny_network, tiny_trainer, weights_of

DATA = tiny_data(24, torch.float32)


def with_modes(trainer_class=Trainer, callbacks=(), model=None, **kwargs):
    model = tiny_network(torch.float32) if model is None else model
    optimizer = ScheduleFreeSGD(model.parameters())
    return trainer_class(model, nn.functional.cross_entropy, optimizer, callbacks=callbacks, seed=3, **kwargs)


def train(trainer, num_epochs=3, **kwargs):
    order = {"shuffle": False}
    arguments = {"eval_dataset": DATA, "per_device_batch_size": 4, "train_dataloader_kwargs": order, **kwargs}
    return trainer.train(DATA, num_epochs=num_epochs, **arguments)


def by_hand(num_epochs=3, evaluates=True):
    """The model and the optimizer after training by hand, and the losses of the evaluations."""
    model = tiny_network(torch.float32)
    optimizer = ScheduleFreeSGD(model.parameters())
    losses = []
    for _ in range(num_epochs):
        optimizer.train()
        for inputs, targets in DataLoader(DATA, batch_size=4):
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        if evaluates:
            optimizer.eval()
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(model(DATA.tensors[0]), DATA.tensors[1]).item())
    return model, optimizer, losses


def test_an_optimizer_with_modes_is_evaluated_as_by_hand():
    history = train(with_modes())
    assert history.get_metric_values("eval_loss_epoch") == pytest.approx(by_hand()[2], rel=1e-5)


def test_evaluations_leave_training_as_it_is_to_the_bit():
    undisturbed = with_modes()
    train(undisturbed, eval_dataset=None)
    disturbed = with_modes(callbacks=[StepBasedEvaluationCallback(2)])
    train(disturbed)
    assert torch.equal(weights_of(undisturbed), weights_of(disturbed))
    model, *_ = by_hand(evaluates=False)
    assert torch.equal(
        weights_of(undisturbed), torch.cat([value.detach().flatten() for value in model.parameters()])
    )


def test_exports_hold_the_weights_of_eval_mode_and_training_goes_on_as_without(tmp_path):
    class Export(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            trainer.save_checkpoint(tmp_path / f"{trainer.run_progress.updates_completed}.pt")

    trainer, other = with_modes(callbacks=[Export]), with_modes()
    train(trainer)
    train(other)
    assert torch.equal(weights_of(trainer), weights_of(other))
    export = torch.load(tmp_path / "18.pt", weights_only=True)
    model, optimizer, _ = by_hand()
    optimizer.eval()
    torch.testing.assert_close(export["model_state_dict"], model.state_dict())
    assert not export["optimizer_state_dict"]["param_groups"][0]["train_mode"]


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_loaded_export_is_evaluated_as_the_run_that_wrote_it(tmp_path, is_training, with_optimizer):
    trainer = with_modes()
    train(trainer)
    trainer.save_checkpoint(tmp_path / "export.pt")
    loss = trainer.evaluate(DATA)["evaluation_loss"]
    other = with_modes()
    train(other, num_epochs=1)
    other.model.train(is_training)
    other.load_checkpoint(tmp_path / "export.pt", load_optimizer=with_optimizer)
    assert other.optimizer.param_groups[0]["train_mode"] == is_training
    assert other.evaluate(DATA)["evaluation_loss"] == pytest.approx(loss, rel=1e-5)
    if with_optimizer and is_training:
        torch.testing.assert_close(weights_of(other), weights_of(trainer))


def test_an_export_that_does_not_fit_leaves_weights_and_mode(tmp_path):
    tiny_trainer().save_checkpoint(tmp_path / "other.pt")
    trainer = with_modes(model=nn.Linear(5, 2))
    train(trainer)
    before = weights_of(trainer).clone()
    with pytest.raises(Exception, match="another model"):
        trainer.load_checkpoint(tmp_path / "other.pt")
    assert torch.equal(before, weights_of(trainer))
    assert trainer.optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize("is_training", [True, False])
def test_after_evaluate_and_predict_an_optimizer_is_in_the_mode_of_the_model(is_training):
    trainer = with_modes()
    train(trainer)
    assert trainer.optimizer.param_groups[0]["train_mode"], "as the model, after train"
    trainer.model.train(is_training)
    loss = trainer.evaluate(DATA)["evaluation_loss"]
    assert trainer.optimizer.param_groups[0]["train_mode"] == is_training
    outputs = trainer.predict(DATA)
    assert trainer.optimizer.param_groups[0]["train_mode"] == is_training
    assert nn.functional.cross_entropy(outputs, DATA.tensors[1]).item() == pytest.approx(loss, rel=1e-5)
    assert loss == pytest.approx(by_hand()[2][-1], rel=1e-5)


def test_a_fine_tuned_optimizer_in_eval_mode_is_evaluated_with_its_average():
    """Trained by hand before, and in eval mode, though the model is in train mode."""
    model, optimizer, losses = by_hand()
    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=())
    assert trainer.evaluate(DATA)["evaluation_loss"] == pytest.approx(losses[-1], rel=1e-5)


@settings(deadline=None, max_examples=10)
@given(update=st.integers(1, 17), evaluates=st.booleans())
def test_resuming_with_modes_ends_with_the_same_bits(update, evaluates):
    evaluation = {"eval_dataset": DATA if evaluates else None}
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = with_modes(callbacks=[SaveAt(update, Path(folder, "state"))])
        train(undisturbed, **evaluation)
        resumed = with_modes()
        train(resumed, resume_from=Path(folder, "state"), **evaluation)
    assert torch.equal(weights_of(undisturbed), weights_of(resumed))
    assert undisturbed.run_history.get_metric_names() == resumed.run_history.get_metric_names()
    if evaluates:
        losses = [one.run_history.get_metric_values("eval_loss_epoch") for one in (undisturbed, resumed)]
        assert losses[0] == losses[1]


def test_a_state_that_is_saved_in_eval_mode_is_that_of_train_mode(tmp_path):
    trainer = with_modes()
    train(trainer, num_epochs=1)
    trained = weights_of(trainer).clone()
    trainer.save_training_state(tmp_path / "in_train_mode")
    trainer.model.eval()
    trainer.evaluate(DATA)
    averaged = weights_of(trainer).clone()
    trainer.save_training_state(tmp_path / "in_eval_mode")
    assert torch.equal(averaged, weights_of(trainer)), "the user's choice of the mode stays"
    for name in ("in_train_mode", "in_eval_mode"):
        other = with_modes()
        other.load_training_state(tmp_path / name)
        torch.testing.assert_close(weights_of(other), trained)


def test_a_run_that_fails_at_its_beginning_leaves_the_mode():
    model, optimizer, _ = by_hand()
    before = copy.deepcopy(model.state_dict())

    class Failing(TrainerCallback):
        def on_train_step_start(self, trainer, batch):
            raise RuntimeError("at the beginning")

    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=[Failing])
    with pytest.raises(RuntimeError, match="at the beginning"):
        train(trainer)
    assert not optimizer.param_groups[0]["train_mode"]
    torch.testing.assert_close(model.state_dict(), before)


def test_further_optimizers_of_the_trainer_follow_too():
    seen = []

    class TwoOptimizers(Trainer):
        def calculate_train_batch_loss(self, batch):
            seen.append(self.other_optimizer.param_groups[0]["train_mode"])
            return super().calculate_train_batch_loss(batch)

        def calculate_eval_batch_loss(self, batch):
            seen.append(self.other_optimizer.param_groups[0]["train_mode"])
            return super().calculate_eval_batch_loss(batch)

    trainer = tiny_trainer(TwoOptimizers, model=tiny_network(torch.float32))
    other = nn.Linear(2, 2)
    trainer.other_optimizer = ScheduleFreeSGD(other.parameters())
    trainer.other_optimizer.train()
    other(torch.ones(1, 2)).sum().backward()
    trainer.other_optimizer.step()
    train(trainer, num_epochs=1, per_device_batch_size=24)
    assert seen == [True, False]


def test_an_engine_with_weights_of_its_own_refuses_an_optimizer_with_modes(monkeypatch):
    monkeypatch.setattr(SingleProcess, "steps_in_backward", True)
    with pytest.raises(ConfigurationError, match=r"ScheduleFreeSGD.*Use DDP or FSDP"):
        train(with_modes())


# ---------------------------------------------------------------- modules


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Tanh()))
        self.head = nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(self.body(self.stem(inputs)))


class Modes(TrainerCallback):
    """Keeps the names of the modules in eval mode at each step of training."""

    def __init__(self):
        self.seen = []

    def on_train_step_start(self, trainer, batch):
        self.seen.append(in_eval(trainer.get_model(keep_torch_compile=False)))

    def on_eval_step_start(self, trainer, batch):
        assert not any(module.training for module in trainer.get_model().modules())


def in_eval(model):
    return {name for name, module in model.named_modules() if not module.training}


NAMES = [name for name, _ in Layered().named_modules() if name]


@settings(deadline=None, max_examples=10)
@given(kept=st.sets(st.sampled_from(NAMES)), sleeps=st.booleans())
def test_modules_in_eval_mode_stay_so(kept, sleeps):
    """Also if a callback puts all of the model in eval mode between two epochs, to look at what it does."""

    class Sleeps(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if sleeps:
                trainer.model.eval()

    model, modes = Layered(), Modes()
    for name in kept:
        model.get_submodule(name).training = False
    trainer = tiny_trainer(model=model, callbacks=[modes, Sleeps])
    train(trainer, num_epochs=2, per_device_batch_size=8)
    assert modes.seen == [kept] * 6


def test_a_frozen_batch_norm_keeps_its_statistics_as_by_hand(capsys):
    model, other = Layered(), Layered()
    for one in (model, other):
        one.stem[1].eval()
        one.stem[2].eval()
    before = model.stem[1].running_mean.clone()
    train(tiny_trainer(model=model), num_epochs=1)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for inputs, targets in DataLoader(DATA, batch_size=4):
        nn.functional.cross_entropy(other(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.stem[1].running_mean, before)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert (
        "2 modules of the model are in eval mode and stay in it during training: 'stem.1', 'stem.2'"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("compiles", [False, True])
def test_a_model_in_eval_mode_is_trained_as_a_whole(compiles):
    model, modes = Layered().eval(), Modes()
    if compiles:
        model = torch.compile(model, backend="eager")
    train(tiny_trainer(model=model, callbacks=[modes]), num_epochs=2)
    assert modes.seen == [set()] * 12


@pytest.mark.parametrize("is_training", [True, False])
def test_what_the_freezer_puts_in_eval_mode_stays_so_without_a_callback(is_training, capsys):
    model, modes = Layered().train(is_training), Modes()
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(0, 0, set_modules_as_eval=True)
    before = model.stem[1].running_mean.clone()
    train(tiny_trainer(model=model, callbacks=[modes]), num_epochs=1)
    frozen = {"stem", "stem.0", "stem.1", "stem.2"}
    assert modes.seen == [frozen] * 6
    assert torch.equal(model.stem[1].running_mean, before)
    assert "eval mode" not in capsys.readouterr().out, "it was asked for"
    copied = copy.deepcopy(model)
    freezer.unfreeze()
    train(tiny_trainer(model=model, callbacks=[modes]), num_epochs=1)
    assert modes.seen[6:] == [set()] * 6
    train(tiny_trainer(model=copied, callbacks=[modes]), num_epochs=1)
    assert modes.seen[12:] == [frozen] * 6, "a copy is frozen too"


def test_a_schedule_of_unfreezing_ends_the_eval_mode():
    modes = Modes()
    schedule = UnfreezeCallback({2: 0}, freeze_batch_norms=True, set_modules_as_eval=True)
    train(tiny_trainer(model=Layered(), callbacks=[schedule, modes]), num_epochs=2)
    assert modes.seen == [{"stem", "stem.0", "stem.1", "stem.2"}] * 6 + [set()] * 6


# ---------------------------------------------------------------- on two processes


def optimizer_on_processes(batch_size):
    folder = shared_folder()
    trainer = with_modes(callbacks=[SaveAt(2, folder / "state")], accelerator=Accelerator())
    history = train(trainer, num_epochs=2, per_device_batch_size=batch_size)
    trainer.save_checkpoint(folder / "export.pt")
    resumed = with_modes(accelerator=Accelerator())
    train(resumed, num_epochs=2, per_device_batch_size=batch_size, resume_from=folder / "state")
    return {
        "losses": history.get_metric_values("eval_loss_epoch"),
        "export": torch.load(folder / "export.pt", weights_only=True)["model_state_dict"],
        "is_exact": torch.equal(weights_of(trainer), weights_of(resumed)),
    }


def modules_on_processes(batch_size):
    seen = []
    for is_training in (True, False):
        model, modes = Layered().train(is_training), Modes()
        model.stem[2].eval()
        freezer = ModelFreezer(model)
        freezer.freeze(1, 1, set_modules_as_eval=True)
        trainer = tiny_trainer(model=model, callbacks=[modes], accelerator=Accelerator())
        train(trainer, num_epochs=2, per_device_batch_size=batch_size)
        assert modes.seen == [modes.seen[0]] * len(modes.seen)
        seen.append(sorted(modes.seen[0]))
    return seen


CASES = {"optimizer": optimizer_on_processes, "modules": modules_on_processes}


@pytest.mark.slow
def test_an_optimizer_with_modes_gives_the_same_on_two_processes(outcome):
    expected = outcome.alone("optimizer")
    for result in outcome.of("optimizer"):
        assert result["is_exact"]
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        torch.testing.assert_close(result["export"], expected["export"])


@pytest.mark.slow
def test_modules_keep_their_modes_on_two_processes(outcome):
    frozen = ["body", "body.0", "body.1", "body.1.1"]
    for result in [*outcome.of("modules"), outcome.alone("modules")]:
        assert result == [[*frozen, "stem.2"], frozen]


if __name__ == "__main__":
    run_as_script(CASES)
