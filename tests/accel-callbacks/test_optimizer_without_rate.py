"""An optimizer whose learning rate is None, since it chooses the rate itself, breaks no callback."""

from pathlib import Path
from typing import Any

import pytest
import torch

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    ProgressBarCallback,
    TrackerCallback,
    TrainingStatisticsCallback,
    find_learning_rate,
    plot_history,
)
from accel_core import ConfigurationError, Trainer
from tiny import tiny_data, tiny_network


class SelfPaced(torch.optim.SGD):
    """Chooses its rate as Adafactor does: None stands in the groups."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step()
        for group in self.param_groups:
            group["lr"] = None


def trainer_with(*callbacks: Any) -> Trainer:
    model = tiny_network()
    return Trainer(
        model, torch.nn.functional.cross_entropy, SelfPaced(model.parameters()), callbacks=callbacks, seed=0
    )


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_progress_is_shown_without_a_rate(seconds: float, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(ProgressBarCallback, "seconds_between_lines", seconds)
    trainer_with(*DEFAULT_CALLBACKS).train(tiny_data(), num_epochs=1)
    shown = capsys.readouterr().out
    assert "Epoch 1/1" in shown and "lr" not in shown


def test_statistics_are_recorded_without_a_rate() -> None:
    history = trainer_with(TrainingStatisticsCallback(1)).train(tiny_data(16), num_epochs=1)
    assert len(history.get_metric_values("updates_per_second")) == 2
    assert "learning_rate" not in history.get_metric_names()
    plot_history(history)


def test_a_tracker_gets_the_loss_without_a_rate(tmp_path: Path) -> None:
    sent: list[dict[str, float]] = []

    class Listening(TrackerCallback):
        def _open(self, trainer: Trainer) -> None:
            super()._open(trainer)
            self.tracker.log = lambda values, step: sent.append(values)

    tracker = Listening("tensorboard", "project", logging_dir=tmp_path, log_every_n_updates=1)
    trainer_with(tracker).train(tiny_data(16), num_epochs=1)
    assert sum("train_loss" in values for values in sent) == 2
    assert not any("learning_rate" in values for values in sent)


def test_a_rate_in_some_groups_is_recorded() -> None:
    trainer = trainer_with(TrainingStatisticsCallback(1))
    first, second, *rest = trainer.optimizer.param_groups[0]["params"]
    trainer.optimizer.param_groups[0]["params"] = [first, *rest]
    trainer.optimizer.add_param_group({"params": [second], "lr": 0.5})
    trainer.optimizer.step = lambda closure=None: None
    assert trainer.train(tiny_data(8), num_epochs=1).get_latest_metric("learning_rate_1") == 0.5


def test_finding_a_rate_says_that_there_is_none() -> None:
    with pytest.raises(ConfigurationError, match=r"SelfPaced is None.*find_learning_rate.*number as lr"):
        find_learning_rate(trainer_with(), tiny_data())
