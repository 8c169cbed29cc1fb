"""Ctrl-C and errors, as a person reads them in a terminal."""

import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest

from accel_core import Trainer, TrainerCallback
from launching import launch
from screens import on_terminal
from tiny import tiny_data, tiny_trainer


class Interrupt(TrainerCallback):
    """Presses Ctrl-C after an update, and may save before."""

    order = 2000

    def __init__(self, update: int, save_at: int | None = None, folder: Path | None = None) -> None:
        self.update = update
        self.save_at = save_at
        self.folder = folder

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.save_at and self.folder is not None:
            trainer.save_training_state(self.folder)
        if trainer.run_progress.updates_completed == self.update:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(*args: Any, capsys: pytest.CaptureFixture[str]) -> tuple[KeyboardInterrupt, str]:
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_trainer(callbacks=[Interrupt(*args)]).train(tiny_data(), num_epochs=3, per_device_batch_size=8)
    return caught.value, capsys.readouterr().err


def test_ctrl_c_says_where_the_run_was_and_what_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "state"
    _, text = interrupted(7, capsys=capsys)
    assert text.startswith("Stopped by Ctrl-C after update 7 (epoch 2). No state was saved.")
    assert "SIGINT" in text, "how it would be saved"
    _, text = interrupted(7, 3, folder, capsys=capsys)
    assert f"No state was saved; the newest is {folder}" in text
    _, text = interrupted(7, 7, folder.with_name("other"), capsys=capsys)
    assert f"The state of this update is {folder.with_name('other')}" in text
    assert text.count("Stopped by") == 1


def test_the_traceback_ends_at_the_line_of_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    error, _ = interrupted(2, capsys=capsys)
    frames = traceback.extract_tb(error.__traceback__)
    assert [frame.name for frame in frames] == ["interrupted"]


def test_ctrl_c_in_an_evaluation_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    class Press(TrainerCallback):
        def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(callbacks=[Press]).evaluate(tiny_data())
    assert capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_an_error_keeps_its_traceback() -> None:
    class Fail(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        tiny_trainer(callbacks=[Fail]).train(tiny_data(), num_epochs=1)
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-1] == (
        "on_optimizer_step_end"
    )


SCRIPT = """
import os, sys, time, torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_core import Trainer, TrainerCallback

class Fail(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        if sys.argv[1] == "wait":
            trainer.print("waiting", flush=True)
            time.sleep(60)
        if trainer.run_progress.updates_completed == 2:
            raise ValueError("the true cause")

model = nn.Linear(4, 1)
data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=[Fail])
try:
    trainer.train(data, num_epochs=1)
except ValueError:
    if sys.argv[1] == "catch":
        os._exit(0)
    raise
"""


@pytest.mark.slow
def test_on_two_processes_the_cause_is_the_last_thing_and_told_once() -> None:
    text = launch(SCRIPT, 2, ["fail"], check=False).stderr
    assert text.count('raise ValueError("the true cause")') == 1
    lines = [line for line in text.splitlines() if line.strip("= ")]
    assert "failed first, after update 2 (epoch 1): ValueError: the true cause" in lines[-1]
    assert lines[-2].strip() == "ValueError: the true cause"


@pytest.mark.slow
def test_an_error_that_the_script_catches_is_not_told() -> None:
    assert "true cause" not in launch(SCRIPT, 2, ["catch"]).stderr


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_sentence_and_the_line_of_the_caller(tmp_path: Path) -> None:
    shown = on_terminal(SCRIPT, tmp_path, 80, args=["wait"], interrupt_after="waiting")
    text = "\n".join(shown.lines)
    assert shown.returncode == -signal.SIGINT
    assert text.count("Stopped by Ctrl-C after update 1 (epoch 1).") == 1
    assert all(len(line) <= 80 for line in shown.lines)
    assert "trainer.train(data, num_epochs=1)" in text
    assert "accel_core" not in text, "no line of the library"
    assert shown.lines[-1] == "KeyboardInterrupt"


@pytest.mark.slow
def test_ctrl_c_on_two_processes_is_told_once(tmp_path: Path) -> None:
    shown = on_terminal(SCRIPT, tmp_path, 80, 2, args=["wait"], interrupt_after="waiting")
    text = "\n".join(shown.lines)
    assert text.count("Stopped by Ctrl-C") == 1
    assert "trainer.train(data, num_epochs=1)" not in text
