"""SaveBestModelCallback: what it exports, when, and what is in the model at the end."""

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
from tiny import RecordWanted, linear_of_constants

DATA = TensorDataset(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.ones(8, 1))


class Record(RecordWanted):
    """Keeps the weights of each epoch too."""

    def __init__(self, *values):
        super().__init__(*values)
        self.weights = {}

    def on_training_run_epoch_end(self, trainer):
        self.weights[trainer.run_history.current_epoch] = trainer.get_model().weight.detach().clone()
        super().on_training_run_epoch_end(trainer)


def create_trainer(*callbacks):
    model = linear_of_constants(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=1)


def train(trainer, num_epochs, **kwargs):
    def create_scheduler(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 3)

    trainer.train(DATA, num_epochs, create_scheduler_fn=create_scheduler, **kwargs)
    return trainer


@pytest.mark.parametrize(("greater_is_better", "best"), [(False, 2), (True, 3)])
def test_the_best_weights_are_in_the_model_and_in_the_file(tmp_path, greater_is_better, best):
    record = Record(3.0, 1.0, 4.0, 2.0)
    saver = SaveBestModelCallback(tmp_path / "best.pt", "wanted", greater_is_better)
    trainer = train(create_trainer(record, saver), 4)
    assert torch.equal(trainer.model.weight, record.weights[best])
    content = torch.load(tmp_path / "best.pt")
    assert torch.equal(content["model_state_dict"]["weight"], record.weights[best])
    assert not torch.equal(record.weights[best], record.weights[4])


def test_the_value_is_in_the_file_once(tmp_path):
    train(create_trainer(Record(3.0, 1.0), SaveBestModelCallback(tmp_path / "best.pt", "wanted")), 2)
    content = torch.load(tmp_path / "best.pt")
    assert set(content) == {
        "accel_origin",
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "wanted",
    }
    assert content["wanted"] == 1.0


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_the_flags_hold_for_the_first_save_as_for_any(tmp_path, num_epochs):
    saver = SaveBestModelCallback(tmp_path / "best.pt", "wanted", save_optimizer=False, save_scheduler=False)
    train(create_trainer(Record(3.0, 1.0), saver), num_epochs)
    assert set(torch.load(tmp_path / "best.pt")) == {"accel_origin", "model_state_dict", "wanted"}


def test_it_works_behind_early_stopping_too(tmp_path):
    record = Record(3.0, 2.999, 1.0)
    early = EarlyStoppingCallback(1, watch_metric="wanted")
    trainer = train(create_trainer(SaveBestModelCallback(tmp_path / "best.pt", "wanted"), early, record), 1)
    record = Record(3.0, 2.999, 1.0)
    for callbacks in (
        (record, early, SaveBestModelCallback(tmp_path / "best.pt", "wanted")),
        (SaveBestModelCallback(tmp_path / "best.pt", "wanted"), record, early),
    ):
        trainer = train(create_trainer(*callbacks), 3)
        # The epoch that was better by less than the threshold ended the run, and is the best nevertheless.
        assert trainer.stop_reason is not None
        assert torch.equal(trainer.model.weight, record.weights[2])


def test_without_a_save_nothing_is_loaded_and_that_is_reported(tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes(b"of another run")
    record = Record(float("nan"), float("nan"))
    trainer = train(create_trainer(record, SaveBestModelCallback(tmp_path / "best.pt", "wanted")), 2)
    assert torch.equal(trainer.model.weight, record.weights[2])
    assert re.search("best.pt.*not saved by this run.*last weights", capsys.readouterr().out)
    assert (tmp_path / "best.pt").read_bytes() == b"of another run"


def test_the_last_weights_stay_if_loading_is_not_wanted(tmp_path):
    record = Record(1.0, 2.0)
    trainer = train(
        create_trainer(
            record, SaveBestModelCallback(tmp_path / "b.pt", "wanted", load_saved_checkpoint=False)
        ),
        2,
    )
    assert torch.equal(trainer.model.weight, record.weights[2])


def test_the_best_value_survives_a_resume(tmp_path):
    def callbacks(record):
        return (
            record,
            SaveBestModelCallback(tmp_path / "best.pt", "wanted"),
            SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1),
        )

    first = Record(3.0, 1.0, 2.0, 1.5)
    train(create_trainer(*callbacks(first)), 3)
    second = Record(3.0, 1.0, 2.0, 1.5)
    resumed = train(create_trainer(*callbacks(second)), 4, resume_from=latest_checkpoint(tmp_path / "states"))
    assert list(second.weights) == [4]
    assert torch.load(tmp_path / "best.pt")["wanted"] == 1.0
    assert torch.equal(resumed.model.weight, first.weights[2])


def test_two_of_them_watch_two_metrics(tmp_path):
    record = Record(3.0, 1.0, 2.0)
    low = SaveBestModelCallback(tmp_path / "low.pt", "wanted", load_saved_checkpoint=False)
    high = SaveBestModelCallback(tmp_path / "high.pt", "wanted", greater_is_better=True)
    trainer = train(create_trainer(record, low, high), 3)
    assert torch.load(tmp_path / "low.pt")["wanted"] == 1.0
    assert torch.equal(trainer.model.weight, record.weights[1])


def test_safetensors_hold_the_best_weights(tmp_path):
    record = Record(1.0, 2.0)
    trainer = train(create_trainer(record, SaveBestModelCallback(tmp_path / "best.safetensors", "wanted")), 2)
    assert torch.equal(trainer.model.weight, record.weights[1])


def test_weights_that_are_not_finite_do_not_replace_the_good_ones(tmp_path):
    class Poison(TrainerCallback):
        def on_training_run_epoch_end(self, trainer):
            if trainer.run_history.current_epoch == 2:
                with torch.no_grad():
                    trainer.model.weight.fill_(float("inf"))

    record = Record(2.0, 1.0)
    with pytest.warns(AccelWarning, match="'weight' is not finite.*lower learning rate"):
        trainer = train(
            create_trainer(record, Poison(), SaveBestModelCallback(tmp_path / "best.pt", "wanted")), 2
        )
    assert torch.equal(trainer.model.weight, record.weights[1])


def test_a_metric_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(ConfigurationError, match=r"SaveBestModelCallback.*'acuracy'.*\['train_loss_epoch'\]"):
        train(create_trainer(SaveBestModelCallback(tmp_path / "best.pt", "acuracy")), 1)
    assert not (tmp_path / "best.pt").exists()


@pytest.mark.parametrize("other", [SaveBestModelCallback, ModelEmaCallback])
def test_two_exports_to_one_path_are_refused_since_each_would_overwrite_the_other(tmp_path, other):
    best = SaveBestModelCallback(tmp_path / "best.pt", "train_loss_epoch")
    with pytest.raises(ConfigurationError, match=f"save_path.*best.pt'.*{other.__name__}.*a path of its own"):
        train(create_trainer(best, other(save_path=tmp_path / "best.pt", watch_metric="wanted")), 1)


def test_a_folder_in_place_of_the_export_is_reported_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match=r"save_path.*SaveBestModelCallback.*a folder.*model\.pt"):
        train(create_trainer(record := Record(1.0), SaveBestModelCallback(tmp_path, "wanted")), 1)
    assert record.weights == {}
