"""LogMetricsCallback: what was recorded, once an epoch."""

import logging
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from accel_core import ConfigurationError, LogMetricsCallback, Trainer, TrainerCallback
from accel_core.extending import readable_name
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
    lines = capsys.readouterr().out.splitlines()
    for epoch, (line, (train, evaluation)) in enumerate(zip(lines, pairs, strict=True), start=1):
        best = " (best)" if epoch == 2 else ""
        start = f"Epoch {epoch}/2  train loss {train:.4g} · val loss {evaluation:.4g}{best} · "
        assert re.fullmatch(re.escape(start) + r"[\d,]+ samples/s · [\d.]+ s", line)


class Evaluated(TrainerCallback):
    """Records given values of a metric, and watches it."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.watched = SimpleNamespace(name="f1", greater_is_better=True)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("f1", self.values[trainer.run_history.current_epoch - 1])


def test_a_new_best_is_marked_for_what_is_watched(capsys: pytest.CaptureFixture[str]) -> None:
    values = [math.nan, 0.2, 0.1, 0.3]
    tiny_trainer(callbacks=[LogMetricsCallback, Evaluated(values)]).train(tiny_data(), num_epochs=4)
    marks = [re.search(r"f1 \S+( \(best\))?", line)[0] for line in capsys.readouterr().out.splitlines()]  # type: ignore[index]
    assert marks == ["f1 nan", "f1 0.2", "f1 0.1", "f1 0.3 (best)"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("train_loss_epoch", "train loss"),
        ("shifted_eval_loss_epoch", "shifted val loss"),
        ("ema_model_eval_loss_epoch", "ema model val loss"),
        ("top_5", "top 5"),
        ("_", "_"),
    ],
)
def test_names_are_those_of_people(name: str, shown: str) -> None:
    assert readable_name(name) == shown


def test_statistics_of_updates_are_not_in_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Statistics(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            trainer.run_history.update_metric("learning_rate", 0.1)

    tiny_trainer(callbacks=[LogMetricsCallback, Statistics]).train(tiny_data(), num_epochs=1)
    line = capsys.readouterr().out
    assert "train loss" in line
    assert "learning rate" not in line


def test_a_logger_gets_one_message_an_epoch_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("train")
    with caplog.at_level(logging.INFO, "train"):
        trainer = tiny_trainer(callbacks=[LogMetricsCallback(logger)])
        trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))
        trainer.evaluate(tiny_data(5))
    messages = [record.getMessage() for record in caplog.records if record.name == "train"]
    starts = [message.split(" ", 5)[:5] for message in messages]
    assert [" ".join(start[:4]).strip() for start in starts[:2]] == ["Epoch 1/2  train", "Epoch 2/2  train"]
    assert messages[2].startswith("evaluation loss ")
    assert capsys.readouterr().out == ""


def test_what_is_no_logger_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"logger is 'train'.*logging.getLogger"):
        LogMetricsCallback("train")  # type: ignore[arg-type]


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


def test_the_evaluation_at_the_start_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(callbacks=[LogMetricsCallback])
    trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data(5), eval_at_start=True)
    history = trainer.run_history
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"Epoch 0/1  val loss {history.get_metric_values('eval_loss_epoch')[0]:.4g}"
    trainer.train(tiny_data(), 1, tiny_data(5), eval_at_start=True, reset_run_history=False)
    line = capsys.readouterr().out.splitlines()[0]
    start = f"Epoch 1/2  val loss {history.get_metric_values('eval_loss_epoch')[2]:.4g}"
    assert line.removesuffix(" (best)") == start


def test_evaluate_of_named_sets_after_a_run_is_no_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(callbacks=[LogMetricsCallback])
    trainer.train(tiny_data(), num_epochs=1)
    capsys.readouterr()
    trainer.evaluate({"far": tiny_data(5), "near": tiny_data(3)})
    assert capsys.readouterr().out.startswith("far evaluation loss ")
    trainer.train(tiny_data(), num_epochs=1)
    assert capsys.readouterr().out.startswith("Epoch 1/1")
