"""Batch norms are converted before the model is wrapped, and keep their parameters."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from accel_callbacks import ConvertSyncBatchNormCallback, ModelFreezer, UnfreezeCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from case_runner import run_as_script
from tiny import tiny_data, tiny_network, tiny_trainer


class Looking(Trainer):
    """Sees what is about to be wrapped."""

    def prepare(self) -> None:
        self.about_to_be_wrapped = [type(module).__name__ for module in self.model]
        super().prepare()


def create_model(is_frozen: bool = True) -> nn.Module:
    """On a CPU torch has SyncBatchNorm for evaluation alone, and DDP refuses it: only what is frozen is not wrapped."""
    model = nn.Sequential(nn.BatchNorm1d(5).double(), *tiny_network())
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[0].running_mean.fill_(0.5)
    return model.requires_grad_(not is_frozen)


def test_one_process_keeps_its_batch_norms_and_trains() -> None:
    trainer = tiny_trainer(callbacks=[ConvertSyncBatchNormCallback], model=create_model(is_frozen=False))
    trainer.train(tiny_data(40), num_epochs=1)
    assert type(trainer.model[0]) is nn.BatchNorm1d


# ---------------------------------------------------------------------- processes


def convert(batch_size: int) -> dict[str, Any]:
    plain = tiny_trainer(model=create_model())
    trainer = tiny_trainer(Looking, [ConvertSyncBatchNormCallback()], model=create_model())
    held = {id(parameter) for parameter in trainer.optimizer.param_groups[0]["params"]}
    losses = [each.evaluate(tiny_data(13), batch_size)["evaluation_loss"] for each in (plain, trainer)]
    return {
        "about_to_be_wrapped": trainer.about_to_be_wrapped,
        "losses": losses,
        "is_held": all(id(parameter) in held for parameter in trainer.model.parameters()),
    }


def train_on_cpu(batch_size: int) -> list[str]:
    trainer = tiny_trainer(callbacks=[ConvertSyncBatchNormCallback()], model=create_model(is_frozen=False))
    with pytest.raises(ConfigurationError) as raised:
        trainer.train(tiny_data(40), num_epochs=1, per_device_batch_size=batch_size)
    return [str(raised.value), type(trainer.model[0]).__name__]


def convert_first(batch_size: int) -> list[str]:
    """What freezes is listed before; were it called before, it would look at modules that are no longer in the model."""

    class Freezing(TrainerCallback):
        order = UnfreezeCallback.order

        def on_prepare_start(self, trainer: Trainer) -> None:
            self.kinds = [type(layer.module).__name__ for layer in ModelFreezer(trainer.model).get_layers()]

    trainer = tiny_trainer(
        callbacks=[freezing := Freezing(), ConvertSyncBatchNormCallback()], model=create_model()
    )
    trainer.evaluate(tiny_data(13), batch_size)
    return freezing.kinds


CASES = {"convert": convert, "train_on_cpu": train_on_cpu, "convert_first": convert_first}


@pytest.mark.slow
def test_lesson_15_batch_norms_are_converted_before_the_model_is_wrapped(outcome: Any) -> None:
    for result in outcome.of("convert"):
        assert result["about_to_be_wrapped"] == ["SyncBatchNorm", "Linear", "Tanh", "Linear"]


@pytest.mark.slow
def test_parameters_and_statistics_stay(outcome: Any) -> None:
    for result in outcome.of("convert"):
        assert result["losses"][0] == result["losses"][1]
        assert result["is_held"]


@pytest.mark.slow
def test_on_a_cpu_it_raises_before_anything_has_changed(outcome: Any) -> None:
    for message, kind in outcome.of("train_on_cpu"):
        assert re.search("ConvertSyncBatchNormCallback.*accelerator.*CPU", message)
        assert kind == "BatchNorm1d"


@pytest.mark.slow
def test_who_freezes_may_be_listed_before(outcome: Any) -> None:
    for kinds in outcome.of("convert_first"):
        assert kinds[0] == "SyncBatchNorm"


if __name__ == "__main__":
    run_as_script(CASES)
