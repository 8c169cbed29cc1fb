"""LogMetricsCallback: what was recorded, once an epoch."""

from typing import Any

import pytest

from accel_core import LogMetricsCallback, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer


class Kept(LogMetricsCallback):
    """Sends the metrics elsewhere."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log_metrics(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)


def test_each_epoch_is_one_line_of_names_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    history = tiny_trainer(callbacks=[LogMetricsCallback]).train(
        tiny_data(), num_epochs=2, eval_dataset=tiny_data(5)
    )
    pairs = zip(
        history.get_metric_values("train_loss_epoch"),
        history.get_metric_values("eval_loss_epoch"),
        strict=True,
    )
    expected = [
        f"train_loss_epoch: {train:.4g}  eval_loss_epoch: {evaluation:.4g}" for train, evaluation in pairs
    ]
    assert capsys.readouterr().out.splitlines() == expected


def test_overriding_one_method_sends_the_metrics_of_each_epoch_elsewhere() -> None:
    kept = Kept()
    history = tiny_trainer(callbacks=[kept]).train(tiny_data(), num_epochs=3, eval_dataset=tiny_data(5))
    names = ("train_loss_epoch", "eval_loss_epoch")
    assert kept.logged == [
        {name: history.get_metric_values(name)[epoch] for name in names} for epoch in range(3)
    ]


def test_metrics_of_callbacks_behind_it_in_the_list_are_logged_too() -> None:
    class Accuracy(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            trainer.run_history.update_metric("accuracy", 0.5)

    kept = Kept()
    tiny_trainer(callbacks=[kept, Accuracy]).train(tiny_data(), num_epochs=1)
    assert set(kept.logged[0]) == {"train_loss_epoch", "accuracy"}


def test_evaluate_logs_its_own_metrics_alone() -> None:
    kept = Kept()
    trainer = tiny_trainer(callbacks=[kept])
    trainer.train(tiny_data(), num_epochs=1)
    metrics = trainer.evaluate(tiny_data(5))
    assert set(metrics) == {"evaluation_loss"}
    assert kept.logged[1:] == [metrics]


def test_a_second_run_logs_nothing_of_the_first() -> None:
    kept = Kept()
    trainer = tiny_trainer(callbacks=[kept])
    trainer.train(tiny_data(), num_epochs=2)
    history = trainer.train(tiny_data(), num_epochs=1, reset_run_history=False)
    assert len(history.get_metric_values("train_loss_epoch")) == 3
    assert kept.logged[2:] == [{"train_loss_epoch": history.get_latest_metric("train_loss_epoch")}]


def test_metrics_of_an_evaluation_in_mid_epoch_are_logged_with_the_epoch() -> None:
    class Evaluating(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            if trainer.run_progress.updates_completed_in_epoch == 2:
                trainer.run_eval_epoch(metric_prefix="intermediate_eval", is_intermediate=True)

    kept = Kept()
    tiny_trainer(callbacks=[Evaluating, kept]).train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))
    assert [set(metrics) for metrics in kept.logged] == [
        {"intermediate_eval_loss_epoch", "train_loss_epoch", "eval_loss_epoch"}
    ] * 2
