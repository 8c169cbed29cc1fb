"""ProgressBarCallback in a terminal, in a file, and when something fails."""

import os
import pty
import re
import subprocess
import sys
from typing import Any

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_callbacks import ProgressBarCallback
from accel_core import LogMetricsCallback, Trainer, TrainerCallback
import sys

class Failing(TrainerCallback):
    def on_train_step_start(self, trainer, **kwargs):
        if "fail" in sys.argv:
            raise KeyboardInterrupt

ProgressBarCallback.seconds_between_lines = float(sys.argv[1])
model = nn.Linear(4, 1)
data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
callbacks = [ProgressBarCallback, LogMetricsCallback, Failing]
trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=callbacks)
try:
    trainer.train(data, num_epochs=2, eval_dataset=data, per_device_batch_size=8)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def in_terminal(*args: str) -> str:
    main, end = pty.openpty()
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
    return subprocess.run([sys.executable, "-c", SCRIPT, *args], capture_output=True, text=True, timeout=60, check=True)


def test_a_terminal_shows_a_full_bar_with_loss_rate_and_speed_for_each_epoch() -> None:
    last = [line for line in in_terminal("60").split("\n") if "Epoch 2/2" in line][-1]
    shown = re.split(r"\r", last.strip("\r"))[-1]
    assert "100%" in shown
    assert "8/8" in shown
    assert "loss=" in last
    assert "lr=0.01" in last
    assert "samples/s=" in last


def test_a_log_is_not_filled() -> None:
    result = in_file("60")
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 2, "a line of metrics for each epoch, and nothing of the bar"


def test_without_a_terminal_lines_come_at_their_interval() -> None:
    result = in_file("0")
    line = result.stdout.splitlines()[0]
    assert re.match(r"Epoch 1/2: batch 1/8, loss [\d.]+, lr 0.01, samples/s [\d,]+, 00:00 remaining", line)


def test_the_bar_is_closed_when_something_fails() -> None:
    output = in_terminal("60", "fail")
    assert output.replace("\r", "\n").strip().splitlines()[-1] == "interrupted"
