"""The best model is the best of this run: what stands in an export, and what is loaded at the end."""

import re

import pytest
import torch

from accel_callbacks import ModelEmaCallback, SaveBestModelCallback, SaveTrainingStateCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
from accel_core.extending import read_origin
from states import flip_last_bit
from tiny import RecordWanted, tiny_data, tiny_network, weights_of

DATA = tiny_data(24)


class Weights(TrainerCallback):
    """Keeps the weights of each epoch."""

    def __init__(self):
        self.by_epoch = {}

    def on_training_run_epoch_end(self, trainer):
        self.by_epoch[trainer.run_history.current_epoch] = weights_of(trainer).clone()


def create_trainer(*callbacks, seed=3):
    model = tiny_network()
    return Trainer(
        model,
        torch.nn.functional.cross_entropy,
        torch.optim.Adam(model.parameters(), lr=0.01),
        callbacks,
        seed=seed,
    )


def train(path, *values, callbacks=(), num_epochs=None, seed=3, resume_from=None, **kwargs):
    """Three updates an epoch, after each of which a given value is recorded. Returns trainer, saver and weights."""
    best, weights = SaveBestModelCallback(path, "wanted", **kwargs), Weights()
    trainer = create_trainer(RecordWanted(*values), weights, *callbacks, best, seed=seed)
    trainer.train(DATA, num_epochs or len(values), resume_from=resume_from)
    return trainer, best, weights.by_epoch


@pytest.mark.parametrize("name", ["best.pt", "best.safetensors"])
def test_the_export_of_another_run_that_came_between_is_not_loaded(name, tmp_path, capsys):
    class OtherRun(TrainerCallback):
        order = 950

        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                train(tmp_path / name, 0.5, seed=9)

    trainer, _, weights = train(tmp_path / name, 1.0, 2.0, 3.0, callbacks=[OtherRun()])
    assert torch.equal(weights_of(trainer), weights[3])
    told = capsys.readouterr().out
    assert re.search(
        rf"{name}' is of the run .*0\.5.*not of the run '{trainer.run_id}', update 3, with wanted 1.*last weights",
        told,
    )


@pytest.mark.parametrize("name", ["best.pt", "best.safetensors"])
def test_a_new_run_replaces_the_export_of_an_older_one_at_its_first_best_value(name, tmp_path):
    train(tmp_path / name, 0.1)
    trainer, _, weights = train(tmp_path / name, 2.0, 1.0, 3.0, seed=9)
    assert torch.equal(weights_of(trainer), weights[2])
    origin = read_origin(tmp_path / name)
    assert (origin["run_id"], origin["update"], origin["values"]["wanted"]) == (trainer.run_id, 6, 1.0)


def test_what_was_exported_after_the_state_that_goes_on_is_not_claimed(tmp_path, capsys):
    class Killed(TrainerCallback):
        order = 950

        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 3:
                raise KeyboardInterrupt

    def saver():
        return SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)

    values = (2.0, 3.0, 1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "best.pt", *values, callbacks=[Killed(), saver()])
    state = latest_checkpoint(tmp_path / "states")
    _, best, _ = train(tmp_path / "best.pt", *values, num_epochs=2, callbacks=[saver()], resume_from=state)
    assert best.best_metric == 2.0
    assert re.search(
        "update 9, with wanted 1, and not .*update 3, with wanted 2, so the model keeps its last weights",
        capsys.readouterr().out,
    )
    _, best, _ = train(tmp_path / "best.pt", *values, callbacks=[saver()], resume_from=state)
    assert best.best_metric == 1.0
    assert re.search("Loaded the best weights, of epoch 3", capsys.readouterr().out)


def test_a_damaged_export_is_not_loaded(tmp_path, capsys):
    class Damage(TrainerCallback):
        order = 950

        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                flip_last_bit(tmp_path / "best.safetensors")

    trainer, _, weights = train(tmp_path / "best.safetensors", 1.0, 2.0, callbacks=[Damage()])
    assert torch.equal(weights_of(trainer), weights[2])
    assert re.search(r"best\.safetensors' is damaged.*keeps its last weights", capsys.readouterr().out)


@pytest.mark.parametrize(("load_optimizer", "steps"), [(False, 9), (True, 3)])
def test_the_optimizer_is_restored_only_if_asked(load_optimizer, steps, tmp_path):
    trainer, _, weights = train(tmp_path / "best.pt", 1.0, 2.0, 3.0, load_optimizer=load_optimizer)
    assert torch.equal(weights_of(trainer), weights[1])
    assert trainer.optimizer.state_dict()["state"][0]["step"] == steps


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_others_of_the_best_stand_beside_it_with_their_update(suffix, tmp_path):
    values = (5.0, 3.0, 4.0, 1.0, 2.0, 9.0)
    trainer, best, weights = train(tmp_path / f"best{suffix}", *values, keep=3)
    names = {"best": 4, "best-update_00000006": 2, "best-update_00000015": 5}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}{suffix}" for name in names}
    for name, epoch in names.items():
        other = create_trainer()
        other.load_checkpoint(tmp_path / f"{name}{suffix}", load_optimizer=False)
        assert torch.equal(weights_of(other), weights[epoch])
        assert read_origin(tmp_path / f"{name}{suffix}")["values"]["wanted"] == values[epoch - 1]
    assert torch.equal(weights_of(trainer), weights[4])
    assert best.best_metric == 1.0


def test_the_others_are_known_again_after_a_resume(tmp_path):
    values = (5.0, 3.0, 4.0, 1.0, 2.0, 9.0)
    for stop in (3, 6):
        saver = SaveTrainingStateCallback(tmp_path / "states")
        state = latest_checkpoint(tmp_path / "states")
        path = tmp_path / "models" / "best.pt"
        trainer, best, weights = train(
            path, *values, keep=2, num_epochs=stop, callbacks=[saver], resume_from=state
        )
    assert {path.name for path in path.parent.iterdir()} == {"best.pt", "best-update_00000015.pt"}
    assert [each["update"] for each in best.exported] == [12, 15]
    assert torch.equal(weights_of(trainer), weights[4])


def test_the_average_says_of_which_run_it_is_and_if_it_is_another_ones(tmp_path, capsys):
    class OtherRun(TrainerCallback):
        order = 950

        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 3:
                run(9)

    def run(seed, *callbacks):
        values = RecordWanted(1.0, 2.0, 3.0)
        values.order = -1
        ema = ModelEmaCallback(0.5, save_path=tmp_path / "ema.pt", watch_metric="wanted")
        trainer = create_trainer(values, ema, *callbacks, seed=seed)
        trainer.train(DATA, 3, eval_dataset=DATA)
        return trainer

    trainer = run(3)
    origin = read_origin(tmp_path / "ema.pt")
    assert (origin["run_id"], origin["update"], origin["values"]["wanted"]) == (trainer.run_id, 3, 1.0)
    assert "ema.pt" not in capsys.readouterr().out
    run(3, OtherRun())
    assert re.search(r"best average of ModelEmaCallback .*ema\.pt' is of the run ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep is 0.*at least 1.*Use 1"),
        ({"save_path": ""}, "save_path is ''.*Pass"),
        ({"save_path": 5}, "save_path is 5.*Pass"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        SaveBestModelCallback(**arguments)
