"""TerminateOnNaNCallback: an agreed stop, with the reason."""

import math
import re
from typing import Any

import pytest
import torch

from accel_core import ConfigurationError, TerminateOnNaNCallback, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer


class Poisoned(Trainer):
    """The loss of one batch is not finite."""

    value = math.nan
    at_batch = 7
    batches = 0

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        self.batches += 1
        if self.batches == self.at_batch:
            output["loss"] = output["loss"] * self.value
        return output


def train(trainer: Trainer, **kwargs: Any) -> Any:
    return trainer.train(
        tiny_data(), **{"num_epochs": 3, "per_device_batch_size": 8, "eval_dataset": tiny_data(5), **kwargs}
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_run_stops_after_the_update_and_says_which_loss_it_was(value: float) -> None:
    """The seventh batch is the second of epoch 2: batch 1, counted from 0."""
    trainer = tiny_trainer(type("Own", (Poisoned,), {"value": value}), callbacks=[TerminateOnNaNCallback])
    history = train(trainer)
    assert re.search(f"loss.* {value} .*epoch 2, batch 1$", trainer.stop_reason)
    assert trainer.run_progress.updates_completed == 7
    assert [record["epoch"] for record in history.to_records()] == [1, 1], (
        "epoch 2 was cut short and left no record"
    )


def test_the_run_ends_in_order_and_not_by_an_exception() -> None:
    heard: list[str] = []

    class Later(TrainerCallback):
        def on_training_run_end(self, trainer: Trainer) -> None:
            heard.append("end")

        def on_exception(self, trainer: Trainer, error: BaseException) -> None:
            heard.append("exception")

        def on_run_close(self, trainer: Trainer) -> None:
            heard.append("close")

    train(tiny_trainer(Poisoned, callbacks=[TerminateOnNaNCallback, Later]))
    assert heard == ["end", "close"]


def test_without_it_the_run_goes_on() -> None:
    trainer = tiny_trainer(Poisoned)
    train(trainer)
    assert trainer.stop_reason is None
    assert trainer.run_progress.epochs_completed == 3


def test_a_loss_that_is_not_finite_within_an_accumulation_is_noticed() -> None:
    trainer = tiny_trainer(Poisoned, callbacks=[TerminateOnNaNCallback])
    train(trainer, per_device_batch_size=2, gradient_accumulation_steps=4)
    assert trainer.run_progress.updates_completed == 2
    assert re.search("loss.* nan .*epoch 1, batch 6$", trainer.stop_reason)


def test_a_first_batch_that_is_not_finite_is_an_error_about_the_data() -> None:
    trainer = tiny_trainer(type("Own", (Poisoned,), {"at_batch": 1}), callbacks=[TerminateOnNaNCallback])
    with pytest.raises(ConfigurationError, match=r"loss nan .*first batch.*finite.*Look for"):
        train(trainer)


def test_the_next_run_begins_without_the_reason() -> None:
    trainer = tiny_trainer(Poisoned, callbacks=[TerminateOnNaNCallback])
    train(trainer)
    for parameter in trainer.model.parameters():
        torch.nn.init.constant_(parameter, 0.1)
    train(trainer)
    assert trainer.stop_reason is None
    assert trainer.run_progress.epochs_completed == 3
