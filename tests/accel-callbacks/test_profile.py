"""ProfileCallback: a trace with named ranges, a table of ten lines, and nothing before or after."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from accel_callbacks import ProfileCallback
from accel_callbacks.profile_ranges import RANGES
from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import EvaluateInMidEpoch, SaveAt, tiny_data, tiny_trainer


def ranges_in(folder: Path) -> list[str]:
    events = json.loads((folder / "trace_0.json").read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_a_trace_has_each_part_of_the_updates_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = ProfileCallback(tmp_path, wait=2, warmup=1, active=3, memory=True)
    trainer = tiny_trainer(callbacks=[profile, EvaluateInMidEpoch(), SaveAt(5, tmp_path / "state")])
    trainer.train(tiny_data(80), 1, tiny_data(5), per_device_batch_size=4, gradient_accumulation_steps=2)
    names = ranges_in(tmp_path)
    assert set(RANGES) <= set(names)
    assert names.count("forward") == names.count("backward") == 6, "two steps in each of three updates"
    assert names.count("evaluation") >= 3
    assert names.count("saving") == 1
    assert abs(names.count("data") - 6) <= 1
    lines = profile.table.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("3 updates")
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:]]
    assert shares[-1] == 100.0
    assert sum(shares[:-1]) == pytest.approx(100.0, abs=1.0)
    assert (tmp_path / "table_0.txt").read_text() == profile.table + "\n"
    assert profile.table in capsys.readouterr().out


def test_ranges_are_set_only_while_the_profile_is_taken(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        order = 3000

        def __init__(self) -> None:
            self.set: list[bool] = []

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            self.set.append("run_train_step" in vars(trainer))

    look = Look()
    trainer = tiny_trainer(callbacks=[look, ProfileCallback(tmp_path, wait=1, warmup=1, active=1)])
    before = dict(vars(trainer.callbacks))
    trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=8)
    assert look.set == [True, True, False, False, False]
    assert dict(vars(trainer.callbacks)) == before
    assert not {"run_train_step", "backward_step", "run_eval_epoch"} & set(vars(trainer))


def test_training_is_the_same_with_a_profile(tmp_path: Path) -> None:
    histories = [
        tiny_trainer(callbacks=callbacks).train(tiny_data(), num_epochs=2).to_records()
        for callbacks in ([], [ProfileCallback(tmp_path, 1, 1, 2)])
    ]
    assert histories[0] == histories[1]


def test_a_short_run_says_that_there_is_nothing_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_trainer(callbacks=[ProfileCallback(tmp_path, 1, 5, 5)]).train(tiny_data(), max_num_train_steps=3)
    assert "made 3 updates, but it records from update 7 on" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_step_outside_of_the_profile_makes_no_call_more() -> None:
    def calls_of(callbacks: Any, num_steps: int) -> int:
        trainer = tiny_trainer(callbacks=callbacks)
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call" and "accel_c" in frame.f_code.co_filename

        sys.setprofile(count)
        try:
            trainer.train(tiny_data(num_steps * 8), num_epochs=1, gradient_accumulation_steps=num_steps)
        finally:
            sys.setprofile(None)
        return calls

    # One update, of few and of many steps.
    with_it, without = (
        calls_of(callbacks, 60) - calls_of(callbacks, 20)
        for callbacks in ([ProfileCallback("unused", wait=100)], [])
    )
    assert with_it == without


@pytest.mark.parametrize(("name", "value"), [("wait", -1), ("warmup", 0), ("active", 0)])
def test_counts_that_cannot_be_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is {value}"):
        ProfileCallback("profile", **{name: value})
