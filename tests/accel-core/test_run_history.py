"""The run history."""

import contextlib
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_core import ConfigurationError, InMemoryRunHistory, RunHistory
from tiny import tiny_data, tiny_trainer


def history() -> InMemoryRunHistory:
    run_history = InMemoryRunHistory()
    run_history.current_update = 4
    run_history.update_metric("loss", torch.tensor(0.5))
    run_history.current_epoch, run_history.current_update = 2, 8
    run_history.update_metric("loss", 0.1)
    run_history.update_metric("accuracy", 1)
    return run_history


def test_values_know_their_epoch_and_update() -> None:
    assert history().to_records()[1] == {"name": "loss", "value": 0.1, "epoch": 2, "update": 8}


def test_an_unknown_name_raises_and_is_not_created() -> None:
    """Lesson A33."""
    run_history = history()
    for ask in (run_history.get_metric_values, run_history.get_latest_metric, run_history.delete_metric):
        with pytest.raises(ConfigurationError, match=r"'los'.*\['accuracy', 'loss'\].*Did you mean 'loss'"):
            ask("los")
    assert run_history.get_metric_names() == {"loss", "accuracy"}


def test_the_list_of_values_is_the_callers_own() -> None:
    """Lesson A33."""
    run_history = history()
    run_history.get_metric_values("loss").clear()
    run_history.to_records()[0]["value"] = 9.0
    assert run_history.get_metric_values("loss") == [0.5, 0.1]


def test_csv_and_dataframe_hold_every_record_exactly(tmp_path: Path) -> None:
    run_history = history()
    run_history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], float(row["value"]), int(row["epoch"]), int(row["update"])) for row in rows] == [
        tuple(record.values()) for record in run_history.to_records()
    ]
    assert run_history.to_dataframe().to_dict("records") == run_history.to_records()


def test_a_state_brings_everything_back() -> None:
    run_history = InMemoryRunHistory()
    run_history.load_state_dict(history().state_dict())
    assert run_history.to_records() == history().to_records()
    assert (run_history.current_epoch, run_history.get_latest_metric("accuracy")) == (2, 1.0)


def test_the_prefix_is_put_before_names() -> None:
    run_history = history()
    run_history.set_metric_name_prefix("ema_")
    run_history.update_metric("loss", 3)
    assert run_history.get_latest_metric("ema_loss") == 3.0


def test_a_prefix_is_added_within_a_context_also_if_it_is_left_by_an_error() -> None:
    run_history = history()
    run_history.set_metric_name_prefix("own_")
    with contextlib.suppress(KeyError), run_history.added_prefix("ema_"):
        run_history.update_metric("loss", 3)
        raise KeyError
    run_history.update_metric("loss", 4)
    assert (run_history.get_latest_metric("own_ema_loss"), run_history.get_latest_metric("own_loss")) == (
        3.0,
        4.0,
    )


def test_names_are_those_with_a_value_and_a_name_can_be_deleted() -> None:
    run_history = history()
    run_history.delete_metric("loss")
    assert run_history.get_metric_names() == {"accuracy"}
    assert [record["name"] for record in run_history.to_records()] == ["accuracy"]


def test_a_reset_forgets_everything_and_begins_at_epoch_one() -> None:
    run_history = history()
    run_history.set_metric_name_prefix("ema_")
    run_history.reset()
    assert run_history.to_records() == []
    assert (run_history.current_epoch, run_history.current_update, run_history.metric_name_prefix) == (
        1,
        0,
        "",
    )


def test_values_are_plain_floats() -> None:
    run_history = InMemoryRunHistory()
    for value in (1, True, torch.tensor([2.0]), torch.tensor(3, dtype=torch.bfloat16), np.float32(0.5)):
        run_history.update_metric("x", value)
    assert [type(value) for value in run_history.get_metric_values("x")] == [float] * 5


@pytest.mark.parametrize("value", ["0.5", None, [1.0], torch.ones(2)])
def test_a_value_that_is_no_single_number_is_refused_with_its_name(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"'loss' is .*number.*several names"):
        InMemoryRunHistory().update_metric("loss", value)


def test_a_third_partys_history_gives_four_methods_and_has_all_the_others(tmp_path: Path) -> None:
    class InOneList(RunHistory):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[Any] = []

        def add_record(self, record: Any) -> None:
            self.kept.append(record)

        def get_records(self) -> Any:
            return self.kept

        def delete_metric(self, name: str) -> None:
            self.kept = [record for record in self.kept if record["name"] != name]

        def clear(self) -> None:
            self.kept = []

    own, built_in = InOneList(), InMemoryRunHistory()
    for run_history in (own, built_in):
        tiny_trainer(run_history=run_history).train(tiny_data(), num_epochs=3, eval_dataset=tiny_data(5))
    assert own.to_records() == built_in.to_records()
    assert own.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}
    assert own.get_latest_metric("eval_loss_epoch") == own.get_metric_values("eval_loss_epoch")[2]
    with pytest.raises(ConfigurationError, match=r"'no such'.*\['eval_loss_epoch', 'train_loss_epoch'\]"):
        own.get_latest_metric("no such")
    own.to_csv(tmp_path / "own.csv")
    built_in.to_csv(tmp_path / "built_in.csv")
    assert (tmp_path / "own.csv").read_bytes() == (tmp_path / "built_in.csv").read_bytes()
    again = InOneList()
    again.load_state_dict(own.state_dict())
    assert again.to_records() == own.to_records()


def test_a_run_records_each_value_with_its_epoch_and_update() -> None:
    run_history = tiny_trainer().train(
        tiny_data(), num_epochs=2, per_device_batch_size=8, eval_dataset=tiny_data(5)
    )
    places = [(record["name"], record["epoch"], record["update"]) for record in run_history.to_records()]
    assert places == [
        ("train_loss_epoch", 1, 5),
        ("eval_loss_epoch", 1, 5),
        ("train_loss_epoch", 2, 10),
        ("eval_loss_epoch", 2, 10),
    ]
