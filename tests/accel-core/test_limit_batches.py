"""Quick runs: LimitBatchesCallback, LimitBatches and ACCEL_LIMIT_BATCHES."""

import os
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import LIMIT_BATCHES_ENV_VAR, LimitBatches, LimitBatchesCallback, Trainer, TrainerCallback
from tiny import Stream, tiny_data, tiny_trainer

FEATURES = torch.arange(20, dtype=torch.float32).reshape(20, 1)
DATA = TensorDataset(FEATURES, torch.zeros(20, 1))


class Recording(TrainerCallback):
    """The batches that were seen, by where."""

    def __init__(self) -> None:
        self.trained: list[list[float]] = []
        self.evaluated: list[list[float]] = []
        self.intermediate: list[list[float]] = []
        self._where = self.evaluated

    def on_train_step_end(self, trainer: Trainer, batch: Any, **kwargs: Any) -> None:
        self.trained.append(batch[0].flatten().tolist())

    def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, **kwargs: Any) -> None:
        self._where = self.intermediate if is_intermediate else self.evaluated

    def on_eval_step_end(self, trainer: Trainer, batch: Any, **kwargs: Any) -> None:
        self._where.append(batch[0].flatten().tolist())


class EvaluatesInMidEpoch(TrainerCallback):
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == 1:
            trainer.run_eval_epoch(is_intermediate=True, metric_prefix="intermediate_eval")


def run(*callbacks: Any, data: Any = DATA, **arguments: Any) -> tuple[Recording, Trainer]:
    recording, model = Recording(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=[recording, *callbacks], seed=2)
    trainer.train(data, **{"num_epochs": 2, "eval_dataset": data, "per_device_batch_size": 4, **arguments})
    return recording, trainer


def test_training_and_evaluation_end_after_so_many_batches_of_each_epoch() -> None:
    """Lesson A3: the limit has an effect on evaluation too."""
    recording, trainer = run(LimitBatchesCallback(2))
    assert len(recording.trained) == 4
    assert recording.evaluated == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert trainer.run_config.num_update_steps == trainer.run_progress.updates_completed == 4
    assert trainer.run_progress.epochs_completed == 2


def test_data_without_a_length_is_limited_too() -> None:
    recording, trainer = run(LimitBatchesCallback(2), data=Stream(DATA))
    assert recording.trained == recording.evaluated == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert trainer.run_progress.epochs_completed == 2


def test_a_limit_beyond_the_data_changes_nothing() -> None:
    assert len(run(LimitBatchesCallback(99))[0].trained) == len(run()[0].trained) == 10


def test_evaluation_alone_can_be_limited() -> None:
    recording, _ = run(LimitBatchesCallback(1, eval_only=True))
    assert len(recording.trained) == 10
    assert recording.evaluated == [[0, 1, 2, 3]] * 2


def test_evaluation_in_mid_epoch_alone_can_be_limited() -> None:
    recording, _ = run(LimitBatchesCallback(1, intermediate_only=True), EvaluatesInMidEpoch())
    assert len(recording.trained) == len(recording.evaluated) == 10
    assert recording.intermediate == [[0, 1, 2, 3]]


def test_overfitting_repeats_the_same_batches_in_every_epoch() -> None:
    recording, _ = run(LimitBatchesCallback(2, overfit=True), num_epochs=3)
    assert recording.trained[:2] == recording.trained[2:4] == recording.trained[4:]
    changing, _ = run(LimitBatchesCallback(2), num_epochs=3)
    assert changing.trained[:2] != changing.trained[2:4]


def test_of_several_limits_the_smallest_counts() -> None:
    recording, _ = run(LimitBatchesCallback(1, eval_only=True), LimitBatchesCallback(3))
    assert len(recording.trained) == 6
    assert len(recording.evaluated) == 2


def test_evaluate_is_limited_too() -> None:
    recording, trainer = run(LimitBatchesCallback(1))
    recording.evaluated.clear()
    trainer.evaluate(DATA, per_device_batch_size=3)
    assert recording.evaluated == [[0, 1, 2]]


def test_runs_within_the_context_are_limited_and_those_after_it_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    with LimitBatches(3):
        with LimitBatches(1, overfit=True):
            recording, _ = run()
        assert os.environ[LIMIT_BATCHES_ENV_VAR] == "3"
    assert recording.trained[0] == recording.trained[1]
    assert len(recording.trained) == 2
    assert LIMIT_BATCHES_ENV_VAR not in os.environ
    assert len(run()[0].trained) == 10


def test_a_trainer_that_is_made_within_the_context_stays_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
    with LimitBatches(2):
        trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.run_progress.updates_completed == 2
    with LimitBatches(2):  # The same limit once more is no second one.
        trainer.train(tiny_data(), num_epochs=1)
        assert trainer.describe().count("limited to 2 batches") == 1
    trainer.callbacks.clear_callbacks()
    trainer.train(tiny_data(), num_epochs=1)
    assert trainer.run_progress.updates_completed > 2


def test_the_context_is_left_by_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, "5")
    with pytest.raises(KeyError), LimitBatches(1):
        raise KeyError
    assert os.environ[LIMIT_BATCHES_ENV_VAR] == "5"


@pytest.mark.parametrize(
    ("value", "batches", "repeats"), [("2", 4, False), ("2:overfit", 4, True), ("", 10, False)]
)
def test_the_environment_limits_runs(
    monkeypatch: pytest.MonkeyPatch, value: str, batches: int, repeats: bool
) -> None:
    monkeypatch.setenv(LIMIT_BATCHES_ENV_VAR, value)
    recording, _ = run()
    assert len(recording.trained) == batches
    assert (recording.trained[:2] == recording.trained[2:4]) is repeats


def test_a_limit_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(LimitBatchesCallback(2, overfit=True))
    (told,) = capsys.readouterr().out.splitlines()
    assert re.search("epoch.* 2 batches.*same ones", told)
    run(LimitBatchesCallback(1))
    (told,) = capsys.readouterr().out.splitlines()
    assert re.search(r"epoch.* 1 batch\b", told) and "same ones" not in told
