"""Exports at an address: save_checkpoint, load_checkpoint, the best model and averages of weights."""

import logging

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import ModelEmaCallback, SaveBestModelCallback, SaveTrainingStateCallback
from accel_core import AccelWarning, CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import StoreError
from stores import Unreliable, s3_server

pytestmark = pytest.mark.usefixtures("store")

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(POINTS, POINTS.sum(1, keepdim=True))


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def create_trainer(*callbacks, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    return Trainer(
        model, torch.nn.functional.mse_loss, torch.optim.AdamW(model.parameters(), 0.05), callbacks, seed=1
    )


def train(trainer, num_epochs=2, **arguments):
    trainer.train(DATA, num_epochs, DATA, per_device_batch_size=4, **arguments)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_an_export_goes_to_an_address_and_comes_back(name, tmp_path, store):
    one, other = create_trainer(), create_trainer(seed=1)
    one.save_checkpoint(f"unreliable://runs/{name}", {"note": "mine"})
    content = other.load_checkpoint(f"unreliable://runs/{name}")
    assert torch.equal(one.model.weight, other.model.weight)
    assert "note" in content or name.endswith("safetensors")
    # The same file as on a disk, and nothing beside it.
    assert list(store.store) == [f"/runs/{name}"]
    one.save_checkpoint(tmp_path / name, {"note": "mine"})
    assert (tmp_path / name).stat().st_size == len(store.store[f"/runs/{name}"].getvalue())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_connection_that_breaks_is_tried_again(store):
    store.fails_at = {1, 2}
    create_trainer().save_checkpoint("unreliable://runs/model.pt")
    assert list(store.store) == ["/runs/model.pt"]


def test_a_store_that_fails_for_ever_leaves_what_was_there(store):
    trainer = create_trainer()
    trainer.save_checkpoint("unreliable://runs/model.pt")
    before = store.store["/runs/model.pt"].getvalue()
    store.fails_at = {None}
    with pytest.raises(
        StoreError, match=r"'unreliable://runs/model\.pt' could not be written.*ConnectionError"
    ):
        trainer.save_checkpoint("unreliable://runs/model.pt", {"more": 1})
    assert store.store["/runs/model.pt"].getvalue() == before


def test_what_is_not_there_or_damaged_is_named_by_its_address(store):
    trainer = create_trainer()
    with pytest.raises(
        CheckpointError, match=r"'unreliable://runs/model\.pt' could not be read.*FileNotFound"
    ):
        trainer.load_checkpoint("unreliable://runs/model.pt")
    trainer.save_checkpoint("unreliable://runs/model.pt")
    file = store.store["/runs/model.pt"]
    file.seek(0)
    file.write(bytes(200))
    with pytest.raises(CheckpointError, match=r"'unreliable://runs/model\.pt'.*damaged"):
        trainer.load_checkpoint("unreliable://runs/model.pt")


def test_the_best_model_is_exported_and_loaded_at_the_end(store):
    trainer = create_trainer(SaveBestModelCallback("unreliable://runs/best.pt"))
    other = create_trainer(SaveBestModelCallback("best.pt"))
    train(trainer)
    train(other)
    assert torch.equal(trainer.model.weight, other.model.weight)
    assert list(store.store) == ["/runs/best.pt"]


def test_the_average_is_exported(store):
    ema = ModelEmaCallback(save_path="unreliable://runs/ema.safetensors")
    trainer = create_trainer(ema)
    train(trainer)
    loaded = create_trainer()
    loaded.load_checkpoint("unreliable://runs/ema.safetensors")
    assert torch.equal(loaded.model.weight, ema.ema_model.weight)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: SaveBestModelCallback("unreliable://runs/best.pt"),
        lambda: ModelEmaCallback(save_path="unreliable://runs/ema.pt"),
    ],
)
def test_a_store_that_fails_never_ends_a_run(callback, store):
    store.fails_at = {None}
    trainer = create_trainer(callback())
    with pytest.warns(AccelWarning, match="could not be written; what was there is untouched"):
        train(trainer)
    assert trainer.run_progress.updates_completed == 12


def test_a_store_that_fails_at_the_end_leaves_the_last_weights(store, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "accel_core")

    def fail(self, *args, **kwargs):
        raise TimeoutError("no answer")

    class Break(TrainerCallback):
        order = 1

        def on_training_run_end(self, trainer):
            monkeypatch.setattr(Unreliable, "get_file", fail)

    trainer = create_trainer(SaveBestModelCallback("unreliable://runs/best.pt"), Break())
    train(trainer)
    assert "keeps its last weights" in caplog.text and "TimeoutError" in caplog.text


def test_a_run_goes_on_with_the_best_model_in_the_store(tmp_path):
    def callbacks():
        return SaveBestModelCallback("unreliable://runs/best.pt"), SaveTrainingStateCallback("states")

    trainer = create_trainer(*callbacks())
    train(trainer, 1)
    resumed = create_trainer(*callbacks(), seed=1)
    train(resumed, 2, resume_from=trainer.last_checkpoint)
    assert resumed.run_progress.updates_completed == 12


def test_several_of_the_best_in_a_store_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"keep is 3, but save_path is 'unreliable://best\.pt'.*Use keep=1"
    ):
        SaveBestModelCallback("unreliable://best.pt", keep=3)


@pytest.mark.parametrize("way", ["save", "load", "best", "ema"])
def test_an_address_that_nothing_knows_is_refused_by_name(way):
    ways = {
        "save": lambda address: create_trainer().save_checkpoint(address),
        "load": lambda address: create_trainer().load_checkpoint(address),
        "best": SaveBestModelCallback,
        "ema": lambda address: ModelEmaCallback(save_path=address),
    }
    name = "checkpoint_path" if way == "load" else "save_path"
    with pytest.raises(ConfigurationError, match=rf"{name} is 'nowhere://model\.pt'.*pass another address"):
        ways[way]("nowhere://model.pt")


@pytest.mark.slow
def test_exports_on_a_real_s3_server(monkeypatch):
    with s3_server(monkeypatch):
        trainer = create_trainer(SaveBestModelCallback("s3://bucket/runs/best.pt"))
        train(trainer)
        other = create_trainer(seed=1)
        other.load_checkpoint("s3://bucket/runs/best.pt")
        assert torch.equal(trainer.model.weight, other.model.weight)
        with pytest.raises(
            StoreError, match=r"'s3://no-such-bucket/model\.pt' could not be written.*FileNotFound"
        ):
            trainer.save_checkpoint("s3://no-such-bucket/model.pt")
