"""EarlyStoppingCallback: when it stops, and that its patience survives a resume."""

import re

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import EarlyStoppingCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import RecordWanted

DATA = TensorDataset(torch.ones(8, 2), torch.ones(8, 1))
NAN = float("nan")


class Record(RecordWanted):
    """Keeps the epochs that were seen too."""

    def __init__(self, *values):
        super().__init__(*values)
        self.epochs = []

    def on_training_run_epoch_end(self, trainer):
        self.epochs.append(trainer.run_history.current_epoch)
        super().on_training_run_epoch_end(trainer)


def create_trainer(*callbacks):
    model = torch.nn.Linear(2, 1)
    return Trainer(
        model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks
    )


def epochs_trained(values, **kwargs):
    record = Record(*values)
    trainer = create_trainer(record, EarlyStoppingCallback(watch_metric="wanted", **kwargs))
    trainer.train(DATA, len(values))
    return record.epochs, trainer.stop_reason


@pytest.mark.parametrize(
    ("values", "kwargs", "last_epoch"),
    [
        ([3, 2, 2, 1], {}, 3),
        ([3, 2, 1.995, 1], {}, 3),  # Better, but not by more than the threshold.
        ([3, 2, 1.98, 1], {}, None),
        ([3, 2, 1.99, 1], {"early_stopping_threshold": 0.0}, None),
        ([3, 2, 2.5, 1.5, 1.6, 1.7], {"early_stopping_patience": 2}, 6),
        # Small steps do not add up to an improvement of the best value until they pass the threshold
        # together.
        ([1, 0.994, 0.988, 0.98, 0.97], {"early_stopping_patience": 2}, None),
        ([1, 2, 3, 2], {"greater_is_better": True}, 4),
        ([1, NAN, 0.5], {}, 2),
        ([NAN, 1, 0.5], {"early_stopping_patience": 2}, None),
        ([float("inf"), 5, 4], {}, None),
        ([2, None, None, 1, None, 1], {}, 6),  # Epochs in which nothing was recorded say nothing.
    ],
)
def test_the_run_stops_after_the_evaluations_without_improvement(values, kwargs, last_epoch):
    epochs, reason = epochs_trained(values, **kwargs)
    assert epochs == list(range(1, (last_epoch or len(values)) + 1))
    assert (reason is None) == (last_epoch is None)


def test_the_reason_names_metric_epochs_and_best_value():
    _, reason = epochs_trained([3, 2, 4, 5], early_stopping_patience=2)
    assert re.search(r"'wanted'.* 2 evaluations.* best .*\b2$", reason)


def test_a_metric_that_a_callback_listed_later_records_is_seen_in_the_same_epoch():
    record = Record(1, 2, 3)
    create_trainer(EarlyStoppingCallback(watch_metric="wanted"), record).train(DATA, 3)
    assert record.epochs == [1, 2]


def test_a_metric_that_is_not_there_is_reported_with_those_that_are():
    message = r"EarlyStoppingCallback.*'val_loss'.*\['eval_loss_epoch', 'train_loss_epoch'\].*Did you mean 'eval_loss_epoch'\?$"
    with pytest.raises(ConfigurationError, match=message):
        create_trainer(EarlyStoppingCallback(watch_metric="val_loss")).train(DATA, 1, eval_dataset=DATA)


def test_without_evaluation_data_the_default_is_refused_before_training():
    trainer = create_trainer(EarlyStoppingCallback())
    with pytest.raises(
        ConfigurationError, match=r"'eval_loss_epoch'.*no eval_dataset.*watch_metric='train_loss_epoch'"
    ):
        trainer.train(DATA, 1)
    assert trainer.run_progress.updates_completed == 0


def test_a_patience_of_zero_is_refused():
    with pytest.raises(ConfigurationError, match=r"early_stopping_patience is 0.*at least 1.*Use 1 "):
        EarlyStoppingCallback(0)


@pytest.mark.parametrize(("reset", "epochs"), [(True, [1, 1]), (False, [1])])
def test_a_second_run_begins_anew_by_default(reset, epochs):
    record = Record(1.0)
    patience = EarlyStoppingCallback(watch_metric="wanted", reset_on_train=reset)
    trainer = create_trainer(record, patience)
    trainer.train(DATA, 1)
    trainer.train(DATA, 1)
    assert (trainer.stop_reason is None) == reset


class SaveEachEpoch(TrainerCallback):
    order = 1000

    def __init__(self, folder):
        self.folder = folder

    def on_training_run_epoch_end(self, trainer):
        trainer.save_training_state(self.folder / str(trainer.run_progress.epochs_completed))


def test_patience_goes_on_where_it_was_and_is_no_fresh_one(tmp_path):
    values = [2, 1, 3, 3, 3, 3]
    early = EarlyStoppingCallback(3, watch_metric="wanted")
    create_trainer(Record(*values), early, SaveEachEpoch(tmp_path)).train(DATA, 4)
    record = Record(*values)
    resumed = create_trainer(record, EarlyStoppingCallback(3, watch_metric="wanted"))
    resumed.train(DATA, 6, resume_from=tmp_path / "4")
    assert record.epochs == [5]
    assert re.search(r"\b3 evaluations.* best .*\b1$", resumed.stop_reason)


def test_an_exhausted_patience_stops_a_resumed_run_before_its_first_update(tmp_path):
    values = [1, 2, 3, 4]
    create_trainer(
        Record(*values), EarlyStoppingCallback(watch_metric="wanted"), SaveEachEpoch(tmp_path)
    ).train(DATA, 4)
    record = Record(*values)
    resumed = create_trainer(record, EarlyStoppingCallback(watch_metric="wanted"))
    resumed.train(DATA, 4, resume_from=tmp_path / "2")
    assert record.epochs == []
    assert resumed.run_progress.updates_completed == 2
    assert "'wanted'" in resumed.stop_reason


@pytest.mark.parametrize("threshold", [-0.1, "0.1", None, float("nan"), True])
def test_a_threshold_that_is_none_is_reported(threshold):
    with pytest.raises(
        ConfigurationError, match=r"^early_stopping_threshold is .*number.*at least 0.*Use 0\.0 "
    ):
        EarlyStoppingCallback(early_stopping_threshold=threshold)
