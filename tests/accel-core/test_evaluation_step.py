"""Evaluations use the plain step unless the user's class has one of its own, and a run says so if only training has one."""

from typing import Any

import pytest
import torch

from accel_core import Trainer
from tiny import tiny_data, tiny_trainer


class TrainsOtherwise(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] * 0 + 7.0}


class Both(TrainsOtherwise):
    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return self.calculate_train_batch_loss(batch)


class OnlyEvaluation(Trainer):
    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_eval_batch_loss(batch)


class OverridesAgain(Both):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss(batch)


def sentences(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "calculate_eval_batch_loss" in line]


@pytest.mark.parametrize(
    ("trainer_class", "names"),
    [
        (TrainsOtherwise, ("TrainsOtherwise", "Trainer.")),
        (OverridesAgain, ("OverridesAgain", "Both.")),
        (Trainer, None),
        (Both, None),
        (OnlyEvaluation, None),
    ],
)
def test_a_run_says_once_that_only_training_is_overridden(
    trainer_class: type[Trainer], names: tuple[str, str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_data()
    for run in (
        lambda: tiny_trainer(trainer_class).train(data, num_epochs=2, eval_dataset=data),
        lambda: tiny_trainer(trainer_class).evaluate(data),
    ):
        run()
        found = sentences(capsys.readouterr().out)
        assert len(found) == (names is not None)
        for name in names or ():
            assert name in found[0]


def test_a_run_without_an_evaluation_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(TrainsOtherwise)
    trainer.train(tiny_data(), num_epochs=1)
    trainer.predict(tiny_data())
    assert sentences(capsys.readouterr().out) == []


def test_what_training_adds_does_not_leak_into_an_evaluation() -> None:
    trainer = tiny_trainer(TrainsOtherwise, lr=0.0)
    history = trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data())
    inputs, targets = tiny_data().tensors
    plain = torch.nn.functional.cross_entropy(trainer.model(inputs), targets).item()
    assert history.get_latest_metric("train_loss_epoch") == pytest.approx(7.0)
    assert history.get_latest_metric("eval_loss_epoch") == pytest.approx(plain, rel=1e-12)
