"""Loading into a changed model: `load_partial_states` loads what fits, and says what it left."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import ModelEmaCallback
from accel_core import CheckpointError, ConfigurationError, Trainer
from accel_core.engines.partial_loading import parameters_held
from accel_core.engines.trained import Trained
from accel_core.state.checkpoint import read_parameters_held
from accel_core.state.shards import named_tensors
from case_runner import run_as_script, shared_folder
from tiny import assert_same_tensors

DATA = TensorDataset(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.ones(12, 1))
STEPS_IN_EPOCH = 3


class Net(nn.Module):
    """Two layers, and others between them that training uses too."""

    def __init__(self, width=5, **between):
        super().__init__()
        torch.manual_seed(len(between) + width)
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.between = nn.ModuleDict(between)
        self.out = nn.Linear(width, 1)

    def forward(self, inputs):
        hidden = self.norm(self.first(inputs))
        for layer in self.between.values():
            hidden = hidden + layer(hidden)
        return self.out(hidden)


def with_layer():
    return Net(extra=nn.Linear(5, 5))


def create_trainer(model, create_optimizer=torch.optim.AdamW, partial=True, kind=Trainer):
    optimizer = create_optimizer(model.parameters(), lr=0.01)
    trainer = kind(model, nn.functional.mse_loss, optimizer, callbacks=(), seed=0)
    trainer.load_partial_states = partial
    return trainer


def train(trainer, num_epochs=1, batch_size=4, **arguments):
    trainer.train(DATA, num_epochs, per_device_batch_size=batch_size, **arguments)
    return trainer


def save(folder, model=None, *arguments):
    """Train and save `folder/state` and `folder/model.pt`."""
    trainer = train(create_trainer(Net() if model is None else model, *arguments))
    trainer.save_training_state(folder / "state")
    trainer.save_checkpoint(folder / "model.pt")
    return trainer


def by_name(trainer):
    """The state of the optimizer by the names of the model."""
    return {name: trainer.optimizer.state[held] for name, held in trainer.get_model().named_parameters()}


def by_hand(saved, model, num_epochs):
    """The second epoch of a run, by a loop with the weights and the state of Adam of each name that fits."""
    own = model.state_dict()
    weights = {name: value for name, value in saved.get_model().state_dict().items() if name in own}
    fitting = {name: value for name, value in weights.items() if value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = by_name(saved)
    for name, parameter in model.named_parameters():
        if name in fitting:
            optimizer.state[parameter] = copy.deepcopy(dict(state[name]))
    batches = []

    class Listening(Trainer):
        def calculate_train_batch_loss(self, batch):
            batches.append(batch)
            return super().calculate_train_batch_loss(batch)

    # The order of the second epoch is that of a run of two.
    train(create_trainer(Net(), kind=Listening), num_epochs)
    for inputs, targets in batches[STEPS_IN_EPOCH:]:
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("change", [with_layer, lambda: Net(7), lambda: Net(b=nn.Linear(5, 5))])
def test_a_resumed_run_with_other_layers_equals_the_loop_by_hand(change, tmp_path, capsys):
    saved = save(tmp_path, Net(a=nn.Linear(5, 5)))
    resumed = train(create_trainer(change()), 2, resume_from=tmp_path / "state")
    assert resumed.run_progress.updates_completed == 2 * STEPS_IN_EPOCH
    assert_same_tensors(by_hand(saved, change(), 2).state_dict(), resumed.model.state_dict())
    printed = capsys.readouterr().out
    assert printed.count("was loaded in part") == 1
    assert "left out: ['between.a.bias', 'between.a.weight']" in printed


class TestALayerMore:
    def test_what_was_saved_is_loaded_and_the_new_layer_stays_as_it_is(self, tmp_path, capsys):
        saved = save(tmp_path)
        model = with_layer()
        new = copy.deepcopy(model.between.state_dict())
        trainer = create_trainer(model)
        assert trainer.load_training_state(tmp_path / "state") == {}
        assert_same_tensors(new, model.between.state_dict())
        loaded = {name: value for name, value in model.state_dict().items() if not name.startswith("between")}
        assert_same_tensors(saved.model.state_dict(), loaded)
        printed = capsys.readouterr().out
        assert "not found: ['between.extra.weight', 'between.extra.bias']" in printed
        assert "left out" not in printed and "another shape" not in printed
        assert "begins anew for ['between.extra.weight', 'between.extra.bias']" in printed

    def test_the_optimizer_goes_on_by_names(self, tmp_path):
        saved = save(tmp_path)
        trainer = create_trainer(with_layer())
        trainer.load_training_state(tmp_path / "state")
        before, after = by_name(saved), by_name(trainer)
        assert not after["between.extra.weight"]
        for name in before:
            assert torch.equal(before[name]["exp_avg"], after[name]["exp_avg"])

    def test_an_optimizer_that_makes_its_state_when_it_is_built_has_it_for_the_new_layer(self, tmp_path):
        save(tmp_path, None, torch.optim.Adagrad)
        train(create_trainer(with_layer(), torch.optim.Adagrad), 2, resume_from=tmp_path / "state")

    def test_a_group_more_keeps_its_learning_rate_and_the_scheduler_begins_anew(self, tmp_path, capsys):
        def in_groups(parameters, lr):
            *rest, weight, bias = parameters
            return torch.optim.SGD(
                [{"params": rest}, {"params": [weight, bias], "lr": 0.5}], lr=lr, momentum=0.9
            )

        def decay(optimizer):
            return torch.optim.lr_scheduler.StepLR(optimizer, 2)

        saved = create_trainer(Net(), lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9))
        train(saved, create_scheduler_fn=decay).save_training_state(tmp_path / "state")
        trainer = create_trainer(with_layer(), in_groups)
        trainer = train(trainer, 2, create_scheduler_fn=decay, resume_from=tmp_path / "state")
        assert "scheduler begins anew" in capsys.readouterr().out
        assert len(trainer.scheduler.get_last_lr()) == 2

    def test_a_state_that_names_no_parameters_lets_the_optimizer_begin_anew(
        self, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr("accel_core.engines.single.parameters_held", lambda trained, optimizer: None)
        save(tmp_path)
        assert read_parameters_held(tmp_path / "state") is None
        trainer = create_trainer(with_layer())
        trainer.load_training_state(tmp_path / "state")
        assert not any(by_name(trainer).values())
        assert "does not name the parameters" in capsys.readouterr().out


class TestALayerLess:
    def test_it_is_left_out(self, tmp_path, capsys):
        saved = save(tmp_path, with_layer())
        trainer = create_trainer(Net())
        trainer.load_training_state(tmp_path / "state")
        assert "left out: ['between.extra.bias', 'between.extra.weight']" in capsys.readouterr().out
        assert torch.equal(by_name(saved)["out.weight"]["exp_avg"], by_name(trainer)["out.weight"]["exp_avg"])
        assert_same_tensors({"w": saved.model.out.weight}, {"w": trainer.model.out.weight})


class TestAnotherShape:
    def test_it_stays_as_it_is_also_without_names_in_the_optimizer(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("accel_core.engines.single.parameters_held", lambda trained, optimizer: None)
        model = Net()
        saved = save(tmp_path, model)
        other = Net()
        other.out = nn.Linear(5, 2)
        trainer = create_trainer(other)
        trainer.load_training_state(tmp_path / "state")
        assert "another shape: ['out.weight', 'out.bias']" in capsys.readouterr().out
        assert not by_name(trainer)["out.weight"]
        assert torch.equal(
            by_name(saved)["first.weight"]["exp_avg"], by_name(trainer)["first.weight"]["exp_avg"]
        )


class TestExports:
    def test_what_fits_is_loaded(self, tmp_path, capsys):
        saved = save(tmp_path)
        trainer = create_trainer(with_layer())
        content = trainer.load_checkpoint(tmp_path / "model.pt")
        assert "optimizer_state_dict" in content
        assert torch.equal(trainer.model.first.weight, saved.model.first.weight)
        printed = capsys.readouterr().out
        assert "not found: ['between.extra.weight'" in printed
        assert "the optimizer begins anew" in printed
        train(trainer)

    def test_a_head_of_another_shape_keeps_the_optimizer_of_the_rest(self, tmp_path):
        saved = save(tmp_path)
        model = Net()
        model.out = nn.Linear(5, 2)
        trainer = create_trainer(model)
        trainer.load_checkpoint(tmp_path / "model.pt")
        assert torch.equal(by_name(saved)["first.bias"]["exp_avg"], by_name(trainer)["first.bias"]["exp_avg"])
        assert not by_name(trainer)["out.bias"]


def test_what_fits_as_a_whole_is_loaded_as_without_the_choice(tmp_path, capsys):
    save(tmp_path)
    trainers = [create_trainer(Net(), partial=partial) for partial in (True, False)]
    for trainer in trainers:
        train(trainer, 2, resume_from=tmp_path / "state")
        trainer.load_checkpoint(tmp_path / "model.pt")
    assert_same_tensors(*(trainer.model.state_dict() for trainer in trainers))
    for name in ("first.weight", "out.bias"):
        assert_same_tensors(*(by_name(trainer)[name] for trainer in trainers))
    assert "in part" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [with_layer, lambda: Net(7)])
def test_averages_of_weights_go_on_for_what_fits(change, tmp_path):
    saved = create_trainer(Net())
    saved.callbacks.add_callback(average := ModelEmaCallback(decay=0.5))
    train(saved).save_training_state(tmp_path / "state")
    resumed, model = ModelEmaCallback(decay=0.5), change()
    trainer = create_trainer(model)
    trainer.callbacks.add_callback(resumed)
    # The finished run has nothing to do but to restore the state.
    train(trainer, resume_from=tmp_path / "state")
    averages, before = resumed.ema_model.state_dict(), average.ema_model.state_dict()
    for name, value in averages.items():
        fits = name in before and before[name].shape == value.shape
        assert torch.equal(value, before[name] if fits else model.state_dict()[name]), name


def test_load_model_state_of_a_trainer_gets_a_complete_state(tmp_path):
    class Strict(Trainer):
        def load_model_state(self, model, state):
            assert set(state) == set(model.state_dict())
            super().load_model_state(model, state)

    save(tmp_path)
    create_trainer(with_layer(), kind=Strict).load_checkpoint(tmp_path / "model.pt")


class TestRefusals:
    @pytest.mark.parametrize("change", [with_layer, lambda: Net(7)])
    def test_without_the_choice_another_model_is_refused_and_the_way_out_is_named(self, change, tmp_path):
        save(tmp_path)
        trainer = create_trainer(change(), partial=False)
        before = copy.deepcopy(trainer.model.state_dict())
        way_out = r"(?s)another model than Net.*set trainer\.load_partial_states = True"
        with pytest.raises(CheckpointError, match=way_out):
            trainer.load_checkpoint(tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=way_out):
            train(trainer, 2, resume_from=tmp_path / "state")
        with pytest.raises(CheckpointError, match=way_out):
            trainer.load_training_state(tmp_path / "state")
        assert_same_tensors(before, trainer.model.state_dict())

    def test_a_state_of_which_nothing_fits_is_refused(self, tmp_path):
        save(tmp_path)
        with pytest.raises(CheckpointError, match=r"model\.pt' .*another model than Linear: no name fits"):
            create_trainer(nn.Linear(4, 1)).load_checkpoint(tmp_path / "model.pt")

    def test_engines_that_shard_are_refused_by_name(self, tmp_path, monkeypatch):
        save(tmp_path)
        trainer = create_trainer(with_layer())
        monkeypatch.setattr(type(trainer.engine), "shards_parameters", True)
        monkeypatch.setattr(type(trainer.engine), "name", "FSDP")
        with pytest.raises(ConfigurationError, match=r"load_partial_states is True, but FSDP shards"):
            trainer.load_checkpoint(tmp_path / "model.pt")
        with pytest.raises(ConfigurationError, match=r"load_partial_states is True, but FSDP shards"):
            train(trainer, 2, resume_from=tmp_path / "state")


def resume_with_a_layer_more(batch_size):
    folder = shared_folder()
    trainer = train(create_trainer(Net()), batch_size=batch_size)
    trainer.save_training_state(folder / "state")
    resumed = create_trainer(with_layer())
    train(resumed, 2, batch_size=batch_size, resume_from=folder / "state")
    # Buffers are those of each process until they are saved.
    return {name: value.detach() for name, value in resumed.get_model().named_parameters()}


CASES = {"a layer more": resume_with_a_layer_more}


@pytest.mark.slow
def test_processes_load_the_same(outcome):
    first, second = outcome.of("a layer more")
    assert_same_tensors(first, second)


if __name__ == "__main__":
    run_as_script(CASES)


def test_parameters_that_are_called_alike_are_not_taken_for_each_other():
    """`out.weight` of the model and of a module beside it: no tensor of a state takes the place of another."""
    model, beside = Net(), nn.Linear(2, 5)
    optimizer = torch.optim.AdamW([*model.parameters(), *beside.parameters()], lr=0.01)
    sum(parameter.sum() for group in optimizer.param_groups for parameter in group["params"]).backward()
    optimizer.step()
    trained = Trained({"out": beside, "optimizer": optimizer}, model, optimizer)
    trained.refresh()
    held = parameters_held(trained, optimizer)
    names = [name for name, _ in held[0]]
    assert names.count("") == 4 and len(set(names) - {""}) == len(names) - 4
    tensors, _ = named_tensors({}, optimizer.state_dict(), held)
    assert len(tensors) == 3 * len(names)
