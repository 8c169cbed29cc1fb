"""The run history."""

import csv
from pathlib import Path

import pytest
import torch

from accel_core import ConfigurationError, InMemoryRunHistory


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
        with pytest.raises(ConfigurationError, match=r"\['accuracy', 'loss'\]. Did you mean 'loss'"):
            ask("los")
    assert run_history.get_metric_names() == {"loss", "accuracy"}


def test_the_list_of_values_is_the_callers_own() -> None:
    """Lesson A33."""
    run_history = history()
    run_history.get_metric_values("loss").clear()
    run_history.to_records()[0]["value"] = 9.0
    assert run_history.get_metric_values("loss") == [0.5, 0.1]


def test_values_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'loss' is 'high'"):
        history().update_metric("loss", "high")


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
