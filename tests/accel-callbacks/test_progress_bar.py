"""ProgressBarCallback in a terminal, in a file, and when something fails."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import (
    LimitBatchesCallback,
    ProgressBarCallback,
    StepBasedEvaluationCallback,
    bar,
    progress_bar,
)
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import loader_of_evaluation

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_callbacks import ProgressBarCallback
from accel_core import LogMetricsCallback, Trainer, TrainerCallback
import sys

class Talking(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        if "talk" in sys.argv and trainer.run_progress.updates_completed == 3:
            trainer.print("a word in mid-epoch")

if "kernel" in sys.argv:
    sys.modules["ipykernel"] = sys

class Failing(TrainerCallback):
    def on_train_step_start(self, trainer, **kwargs):
        if "fail" in sys.argv:
            raise KeyboardInterrupt

ProgressBarCallback.seconds_between_lines = float(sys.argv[1])
model = nn.Linear(4, 1)
data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
callbacks = [ProgressBarCallback, Talking, Failing]
callbacks += [LogMetricsCallback] if "log" in sys.argv else []
trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=callbacks)
try:
    trainer.train(data, num_epochs=2, eval_dataset=data, per_device_batch_size=8)
except KeyboardInterrupt:
    print("interrupted", flush=True)
import threading
assert "tqdm_monitor" not in [thread.name for thread in threading.enumerate()]
assert "tqdm.notebook" not in sys.modules
assert "print" not in vars(trainer)
"""


def in_terminal(*args: str, columns: int = 120) -> str:
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *args], stdout=end, stderr=end, stdin=end)
    os.close(end)
    output = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(main)
    assert process.wait(60) == 0, output.decode()
    return output.decode()


def in_file(*args: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, timeout=60, check=True
    )


def test_a_terminal_shows_a_full_bar_with_loss_rate_and_speed_for_each_epoch() -> None:
    last = [line for line in in_terminal("60").split("\n") if "Epoch 2/2" in line][-1]
    drawn = re.split(r"\r", last.strip("\r"))[-1]
    assert "100%" in drawn
    assert re.search(r"Epoch 2/2  loss [\d.]+ · lr 0.01 · [\d,]+ samples/s █+ 100% 00:00", last)


def test_what_is_printed_in_mid_epoch_has_a_line_of_its_own_above_the_bar() -> None:
    output = in_terminal("60", "talk", "kernel")
    assert "\ra word in mid-epoch\r\n" in output, "the line was cleared of the bar before"
    assert re.search("Epoch 1/2 .* 100%", output.split("a word in mid-epoch")[1])


def test_a_terminal_without_a_width_shows_the_bar_too() -> None:
    assert re.search("Epoch 2/2 .* 100%", in_terminal("60", columns=0))


def test_an_evaluation_with_data_of_its_own_leaves_the_bar_of_the_epoch_open() -> None:
    bar, open_bars = ProgressBarCallback(), []

    class EvaluateInBetween(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 2:
                trainer.run_eval_epoch(trainer.train_dataloader, "intermediate_eval", is_intermediate=True)
                open_bars.extend((each.title, each.completed) for each in bar._bars)

    model = nn.Linear(4, 1)
    data = TensorDataset(torch.ones(32, 4), torch.ones(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=[bar, EvaluateInBetween])
    trainer.train(data, num_epochs=1)
    assert open_bars == [("Epoch 1/1", 2)]


def test_a_log_is_not_filled() -> None:
    result = in_file("60", "log")
    assert result.stderr == ""
    epochs, metrics = result.stdout.splitlines()[::2], result.stdout.splitlines()[1::2]
    assert epochs == ["Epoch 1/2", "Epoch 2/2"]
    starts = [line.split(" · ")[0].rsplit(" ", 1)[0] for line in metrics]
    assert starts == ["Epoch 1/2  train loss", "Epoch 2/2  train loss"], "and nothing of the bar"


def test_without_a_terminal_lines_come_at_their_interval() -> None:
    result = in_file("0")
    line = result.stdout.splitlines()[1]
    assert re.match(r"Epoch 1/2: batch 1/8, loss [\d.]+, lr 0.01, samples/s [\d,]+, 00:00 remaining", line)


REASON = "Training ended after 3 updates and 1 complete epoch: three are enough"


@pytest.mark.parametrize(("num_epochs", "printed"), [(2, [REASON]), (1, [])])
def test_a_run_that_is_stopped_prints_why(
    num_epochs: int, printed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    class StopInTheSecondEpoch(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            if trainer.run_progress.updates_completed == 2:
                trainer.request_stop("three are enough")

    model = nn.Linear(4, 1)
    data = TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(
        model, nn.functional.mse_loss, optimizer, callbacks=[ProgressBarCallback, StopInTheSecondEpoch]
    )
    trainer.train(data, num_epochs=num_epochs, per_device_batch_size=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"Epoch {epoch}/{num_epochs}" for epoch in range(1, num_epochs + 1)] + printed


def test_the_bar_is_closed_when_something_fails() -> None:
    output = in_terminal("60", "fail")
    assert output.replace("\r", "\n").strip().splitlines()[-1] == "interrupted"


def test_a_step_with_the_bar_makes_no_call_more_than_without() -> None:
    """The event is called in any case; what is shown is read when it is drawn."""

    def calls_of_steps(callbacks: Any, num_steps: int) -> int:
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=callbacks)
        data = TensorDataset(torch.ones(num_steps, 4), torch.ones(num_steps, 1))
        calls = 0

        def profile(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call" and "accel_c" in frame.f_code.co_filename

        sys.setprofile(profile)
        try:
            trainer.train(data, num_epochs=1, per_device_batch_size=1)
        finally:
            sys.setprofile(None)
        return calls

    with_bar, without = (
        calls_of_steps(callbacks, 60) - calls_of_steps(callbacks, 20)
        for callbacks in ([ProgressBarCallback], [])
    )
    assert with_bar == without


def test_progress_that_is_no_dictionary_is_refused_at_the_first_step() -> None:
    class Wrong(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            return {**super().calculate_train_batch_loss(batch), "progress": 0.5}

    model = nn.Linear(4, 1)
    trainer = Wrong(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=[])
    data = TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    with pytest.raises(ConfigurationError, match=r"0\.5 as 'progress'.*dictionary"):
        trainer.train(data, num_epochs=1)


def test_the_bar_of_an_evaluation_is_full_at_its_end_whatever_set_it_is_on(monkeypatch):
    bars = []

    class Noted(bar.Bar):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(progress_bar, "Bar", Noted)
    model = nn.Linear(4, 1)
    data, other, third = (TensorDataset(torch.ones(n, 4), torch.ones(n, 1)) for n in (64, 24, 40))
    callbacks = [ProgressBarCallback, StepBasedEvaluationCallback(5, third)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks=callbacks)
    trainer.train(data, 1, {"": data, "other": other}, per_device_batch_size=8)
    trainer.evaluate(third, per_device_batch_size=4)
    trainer.evaluate({"": third, "other": other}, per_device_batch_size=4)
    found = [(each.total, each.completed) for each in bars if each.title == "Evaluation"]
    assert found == [(steps, steps) for steps in (5, 8, 3, 10, 10, 6)]
    bars.clear()
    trainer.callbacks.add_callback(LimitBatchesCallback(2, intermediate_only=True))
    trainer.train(data, 1, data, per_device_batch_size=8)
    found = [(each.total, each.completed) for each in bars if each.title == "Evaluation"]
    assert found == [(2, 2), (8, 8)]


def test_an_evaluation_within_another_leaves_the_outer_one_its_loader():
    found = []

    class Nested(TrainerCallback):
        def on_eval_epoch_end(self, trainer, is_intermediate, metric_prefix):
            before = loader_of_evaluation(trainer)
            if metric_prefix == "evaluation":
                trainer.run_eval_epoch(TensorDataset(torch.ones(8, 4), torch.ones(8, 1)), "nested")
                found.append(loader_of_evaluation(trainer) is before is not None)

    model = nn.Linear(4, 1)
    trainer = Trainer(model, nn.functional.mse_loss, None, callbacks=[Nested])
    trainer.evaluate(TensorDataset(torch.ones(16, 4), torch.ones(16, 1)), 8)
    assert found == [True] and loader_of_evaluation(trainer) is None
