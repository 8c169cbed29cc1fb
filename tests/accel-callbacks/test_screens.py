"""What a person sees at 40, 60, 80 and 120 columns, on one process and on two, and in a notebook."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from accel_callbacks.bar import bar_layout
from accel_core.extending import join_fields, width_of, wrap
from screens import on_terminal

SCRIPT = """
import time, torch
from torch import nn
from torch.utils.data import TensorDataset
from accel_callbacks import DEFAULT_CALLBACKS, ProgressBarCallback
from accel_core import Trainer, TrainerCallback

class OwnValue(Trainer):
    def calculate_train_batch_loss(self, batch):
        time.sleep(0.001)  # Below 10,000 samples/s on any machine: one digit more does not fit 80 columns.
        return {**super().calculate_train_batch_loss(batch), "progress": {"loss_g": torch.tensor(0.5)}}

    calculate_eval_batch_loss = calculate_train_batch_loss

class Accuracy(TrainerCallback):
    def on_eval_epoch_end(self, trainer, **kwargs):
        trainer.run_history.update_metric("accuracy", 0.9)

ProgressBarCallback.seconds_between_draws = 0.0
torch.manual_seed(0)
model = nn.Linear(4, 1)
data = TensorDataset(torch.ones(64, 4), torch.ones(64, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.003)
trainer = OwnValue(model, nn.functional.mse_loss, optimizer, callbacks=[Accuracy, *DEFAULT_CALLBACKS])
trainer.train(data, num_epochs=2, eval_dataset=data, per_device_batch_size=8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_bar_and_lines_fit_the_terminal(tmp_path: Path, columns: int, processes: int) -> None:
    shown = on_terminal(SCRIPT, tmp_path, columns, processes)
    assert shown.returncode == 0, shown.lines
    text = " ".join(" ".join(shown.lines).split())
    number = r"[\d.]+"
    for epoch, best in ((1, ""), (2, r" \(best\)")):
        # Where a line is broken there is no dot.
        wanted = rf"Epoch {epoch}/2 train loss {number}( ·)? val loss {number}{best}( ·)? accuracy 0\.9( ·)? [\d,]+ samples/s( ·)? {number} s"
        assert len(re.findall(wanted, text)) == 1, text
    assert not any("█" in line for line in shown.lines), "the bars have made room for the lines"
    bars = [row for row in shown.drawn if row.startswith("Epoch")]
    assert bars
    for row in bars:
        assert re.match(rf"Epoch \d/2  loss {number}", row), row
        assert width_of(row) <= columns
    full = next(row for row in bars if "100%" in row)
    assert full.count("█") >= 10
    assert ("loss_g 0.5" in full) == (columns >= 60)
    assert ("lr 0.003 · " in full and "samples/s" in full) == (columns >= 80)


def test_a_bar_drops_from_the_right_by_measured_width_and_never_the_loss() -> None:
    fields = ["loss 0.3541", "損失 0.5", "lr 0.003", "56,060 samples/s"]
    seen = []
    for columns in range(10, 121):
        layout, width = bar_layout("Epoch 12/100", fields, [" 62%", "00:05"], columns, 80)
        text, bar, behind = layout.partition("{bar}")
        assert width == columns - 1
        assert "loss 0.3541" in text
        if columns >= 36:
            assert bar and width - width_of(text + behind) >= 10
        if columns >= 20:
            assert width_of(text + behind) <= width
        kept = [field for field in fields if field in text]
        assert kept == fields[: len(kept)], "dropped from the right"
        seen.append(len(kept))
    assert seen == sorted(seen) and set(seen) == {1, 2, 3, 4}


def test_a_bar_of_data_without_a_length_counts_batches() -> None:
    layout, _ = bar_layout("Epoch 1", ["loss 0.5"], ["batch 7"], 80, None)
    assert layout == "Epoch 1  loss 0.5 batch 7"


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_printed_lines_are_no_longer_than_the_terminal(columns: int) -> None:
    fields = [
        "train loss 1.354",
        "val loss 0.323 (best)",
        "精度 0.9",
        "a long name of a metric of somebody 0.4",
    ]
    for text in (join_fields("Epoch 1/5", fields, columns), wrap("損失 and words " * 20, columns)):
        assert all(width_of(line) <= columns for line in text.split("\n"))
    assert join_fields("Epoch 1/5", fields[:2], None) == "Epoch 1/5  train loss 1.354 · val loss 0.323 (best)"


def cell_output(cell: Any) -> str:
    return "".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/html", ""))
        for output in cell.outputs
    )


@pytest.mark.slow
def test_a_notebook_shows_a_table_with_a_row_for_each_epoch() -> None:
    """By a real kernel, whose output is read back."""
    # The semicolon: a cell shows what its last line returns, and the history is a table too.
    sources = (SCRIPT.rstrip() + ";", "trainer.train(data, 1);")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    first, again = map(cell_output, notebook.cells)
    assert first.count("<table>") == 1, "one table that was replaced, not one for each epoch"
    assert first.count("<tr>") == 3
    for column in ("epoch", "train loss", "val loss", "accuracy", "samples/s", "time"):
        assert f"<th>{column}</th>" in first
    assert "(best)" in first
    assert again.count("<tr>") == 2, "a run has a table of its own"
