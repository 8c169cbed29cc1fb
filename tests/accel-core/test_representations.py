"""What `print` shows of trainers, callbacks, history and config."""

from typing import Any

import pytest
import torch
from torch import nn

from accel_callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from accel_core import ConfigurationError, InMemoryRunHistory, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer


class Mine(TrainerCallback):
    """Keeps one argument under a private name, and one nowhere."""

    def __init__(self, model: Any = None, number: float = 0.5, gone: int = 3) -> None:
        self._model = model
        self.number = number


@pytest.mark.parametrize(
    ("callback", "shown"),
    [
        (Mine(), "Mine()"),
        (Mine(nn.Linear(2, 2), 0.1, 7), "Mine(model=Linear, number=0.1)"),
        (Mine(torch.ones(3)), "Mine(model=a tensor of shape (3,) and torch.float32)"),
        (StepBasedEvaluationCallback(5), "StepBasedEvaluationCallback(eval_every_n_updates=5)"),
        (
            EarlyStoppingCallback(3, watch_metric="f1", greater_is_better=True),
            "EarlyStoppingCallback(early_stopping_patience=3, watch_metric='f1', greater_is_better=True)",
        ),
        (ModelEmaCallback(0.9), "ModelEmaCallback(decay=0.9)"),
        (
            SaveTrainingStateCallback(save_every_n_updates=2, save_on_signals="SIGINT"),
            "SaveTrainingStateCallback(save_every_n_updates=2, save_on_signals=('SIGINT',))",
        ),
        (SaveTrainingStateCallback(), "SaveTrainingStateCallback()"),
    ],
)
def test_a_callback_shows_the_arguments_that_differ_from_the_defaults(
    callback: TrainerCallback, shown: str
) -> None:
    assert repr(callback) == shown


def test_errors_show_callbacks_so_too() -> None:
    with pytest.raises(ConfigurationError, match=r"callbacks is Mine\(number=2\)"):
        tiny_trainer(callbacks=Mine(number=2))


def test_a_trainer_is_short_and_looking_at_it_makes_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(callbacks=[Mine])
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "create_accelerator", lambda self: pytest.fail("made an accelerator"))
        assert repr(trainer) == (
            "Trainer(model=Sequential, optimizer=SGD, trained 0 updates in 0 epochs, callbacks=[Mine()])"
        )
    trainer.train(tiny_data(), num_epochs=2)
    assert "trained 10 updates in 2 epochs" in repr(trainer)
    assert repr(trainer.callbacks) == "CallbackList([Mine()])"
    config = repr(trainer.run_config)
    assert config.startswith("TrainerRunConfig(num_epochs=2, ")
    assert "None" not in config and "gradient_clip_norm" not in config


def test_a_history_counts_and_gives_epochs() -> None:
    history = InMemoryRunHistory()
    assert history, "also an empty history is one"
    assert repr(history) == "InMemoryRunHistory(0 epochs, 0 updates: no metrics yet)"
    for epoch in (1, 2):
        history.current_epoch, history.current_update = epoch, 5 * epoch
        history.update_metric("loss", 9.0)
        history.update_metric("loss", 1.0 / epoch)
    assert len(history) == len(list(history)) == 2
    assert list(history) == [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    assert repr(history) == "InMemoryRunHistory(2 epochs, 10 updates: loss)"
    assert history._repr_html_().count("<tr>") == 3
