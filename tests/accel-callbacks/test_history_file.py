"""`history.jsonl`: followed while the run goes on, and equal after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest

from accel_callbacks import HistoryFileCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import SaveAt, tiny_data, tiny_trainer


class Record(TrainerCallback):
    """Records at each update, and ends the run by an error at one."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.fails_at:
            raise ValueError("killed")
        trainer.run_history.update_metric("at", trainer.run_progress.updates_completed / 3)


class Follow(TrainerCallback):
    """Reads the file after each update, as somebody outside would."""

    order = 999

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        lines = self.path.read_bytes().split(b"\n")
        assert lines.pop() == b"", "the last line is complete"
        assert [json.loads(line) for line in lines] == trainer.run_history.to_records()


def train(folder: Path, *callbacks: TrainerCallback, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=[HistoryFileCallback(folder), *callbacks])
    trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5), **kwargs)
    return trainer


def test_the_file_holds_all_records_after_every_update(tmp_path: Path) -> None:
    trainer = train(tmp_path, Record(), Follow(tmp_path / "history.jsonl"))
    table = pandas.read_json(tmp_path / "history.jsonl", lines=True)
    values = [record["value"] for record in trainer.run_history.get_records()]
    assert table["value"].tolist() == pytest.approx(values)


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "torn"])
@pytest.mark.parametrize("fails_at", [4, 7, 9])
def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(
    tmp_path: Path, fails_at: int, torn: bool
) -> None:
    train(tmp_path / "whole", Record())
    folder, state = tmp_path / "run", tmp_path / "state"
    with pytest.raises(ValueError, match="killed"):
        train(folder, Record(fails_at), SaveAt(3, state))
    path = folder / "history.jsonl"
    if torn:
        path.write_bytes(path.read_bytes()[:-5])
    train(folder, Record(), resume_from=state)
    assert path.read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["history.jsonl"]


def test_another_run_sets_the_file_aside(tmp_path: Path) -> None:
    train(tmp_path, Record())
    first = (tmp_path / "history.jsonl").read_bytes()
    train(tmp_path)
    train(tmp_path)
    assert (tmp_path / "history.1.jsonl").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "history.1.jsonl",
        "history.2.jsonl",
        "history.jsonl",
    ]


def test_a_later_stage_goes_on_in_the_file(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.train(tiny_data(), num_epochs=1, reset_run_history=False)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.run_history.to_records()
    shutil.rmtree(tmp_path)


def test_a_folder_that_is_no_path_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="folder is 3"):
        HistoryFileCallback(3)  # type: ignore[arg-type]


def test_evaluate_after_a_run_adds_to_the_file_of_that_run(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.evaluate(tiny_data(5))
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.run_history.to_records()
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]
    trainer.train(tiny_data(), num_epochs=1)
    assert len(list(tmp_path.iterdir())) == 2, "another run"
