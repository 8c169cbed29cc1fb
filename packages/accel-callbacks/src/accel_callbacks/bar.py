"""One bar in a terminal or a notebook, and how it fits into the columns that there are."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from accel_core.extending import columns_of, notebook, readable_value, separator, width_of

if TYPE_CHECKING:
    from accel_core import LossTracker, Trainer

MIN_BAR = 10
"""Letters that a bar has at least, where the terminal leaves room for it and the loss."""


class Bar:
    """Draws one bar, or prints lines if there is no terminal."""

    def __init__(
        self,
        title: str,
        loss: LossTracker,
        samples_in_step: int,
        total: int | None,
        completed: int = 0,
        stays: bool = True,
        *,
        periods: tuple[float, float],
    ) -> None:
        """Open the bar.

        Args:
            periods: seconds between two draws of a bar, and between two lines without a terminal.
        """
        self.title = title
        self.loss = loss
        self.samples_in_step = samples_in_step
        self.total = total
        self.completed = completed
        self.begun_at = completed
        self.began = perf_counter()
        self.progress: Mapping[str, Any] = {}
        """Values of the user's, as a step or a callback gave them when the bar was last drawn."""
        bar_class = _bar_class()
        self.tqdm: Any = None
        seconds_between_draws, self.seconds = periods
        if bar_class is not None:
            self.seconds = seconds_between_draws
            layout, width = bar_layout(title, [], [_percent(completed, total)], self._columns(), total)
            # Where a terminal claims to have no rows, tqdm would draw nothing.
            rows = {"nrows": 20}
            self.tqdm = bar_class(
                total=total, initial=completed, leave=stays, bar_format=layout, ncols=width, **rows
            )
        self.next_time = self.began + self.seconds

    def show(self, trainer: Trainer, batch_output: Mapping[str, Any] | None = None) -> None:
        """Read the values from the device, and draw the bar or print the line."""
        now = perf_counter()
        self.next_time = now + self.seconds
        if batch_output is not None:
            self.progress = batch_output.get("progress") or {}
        values = {"loss": readable_value(self.loss.average)}
        values |= {name: readable_value(value) for name, value in self.progress.items()}
        # An evaluation has no learning rate.
        if trainer.optimizer is not None and self.loss is trainer.train_loss:
            learning_rate = trainer.optimizer.param_groups[0].get("lr")
            # Some optimizers choose it at each update, and have none to show.
            if learning_rate is not None:
                values["lr"] = f"{float(learning_rate):.3g}"
        if self.samples_in_step:
            # Only steps of this process's own time: a resumed epoch begins behind some.
            rate = (self.completed - self.begun_at) * self.samples_in_step / max(now - self.began, 1e-9)
            values["samples/s"] = f"{rate:,.0f}"
        if self.tqdm is None:
            of = f"/{self.total}" if self.total is not None else ""
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            remaining = self._remaining(now)
            text += f", {remaining} remaining" if remaining else ""
            trainer.print(f"{self.title}: batch {self.completed}{of}, {text}")
            return
        fields = [
            f"{value} {name}" if name == "samples/s" else f"{name} {value}" for name, value in values.items()
        ]
        right = [_percent(self.completed, self.total), self._remaining(now)]
        layout, width = bar_layout(self.title, fields, right, self._columns(), self.total)
        self.tqdm.bar_format, self.tqdm.ncols = layout, width
        self.tqdm.n = self.completed
        self.tqdm.refresh()

    def close(self) -> None:
        """Release the line of the terminal."""
        if self.tqdm is not None:
            self.tqdm.close()

    def _columns(self) -> int | None:
        """Return the columns of the terminal as it is now; None in a notebook, where bars have their own."""
        return columns_of(sys.stderr)

    def _remaining(self, now: float) -> str:
        steps = self.completed - self.begun_at
        if self.total is None or not steps:
            return ""
        seconds = (self.total - self.completed) * (now - self.began) / steps
        return str(tqdm.format_interval(seconds))


def bar_layout(
    title: str, fields: list[str], right: list[str], columns: int | None, total: int | None
) -> tuple[str, int | None]:
    """Return the format of a bar that fits into `columns`, and its width, for tqdm.

    The values come first, then a bar of at least ten letters, then percent and time. What does not fit is
    dropped: the time, then the values from the right, then percent. The loss, which is the first value,
    stays; for it the title loses its first word, and the bar its width.

    Args:
        total: None leaves out the bar: nobody knows how full it would be.
    """
    # The last column stays empty, so that no terminal goes to the next line.
    width = None if columns is None else max(columns - 1, 1)
    between = separator(sys.stderr)
    fields, right = list(fields), [text for text in right if text]

    def joined() -> tuple[str, str]:
        return "  ".join([title, *[between.join(fields)] * bool(fields)]), "".join(
            f" {text}" for text in right
        )

    least_bar = 0 if total is None else MIN_BAR + 1
    while width is not None and sum(map(width_of, joined())) + least_bar > width:
        if len(right) > 1:
            right.pop()
        elif len(fields) > 1:
            fields.pop()
        elif right:
            right.pop()
        elif " " in title:
            title = title.partition(" ")[2]
        else:
            break
    left, behind = (text.replace("{", "{{").replace("}", "}}") for text in joined())
    has_bar = total is not None and (width is None or sum(map(width_of, joined())) + 2 < width)
    return f"{left} {{bar}}{behind}" if has_bar else f"{left}{behind}", width


def _percent(completed: int, total: int | None) -> str:
    """Return how much is done, or how many batches if nobody knows of how many."""
    return f"batch {completed}" if total is None else f"{completed / max(total, 1):4.0%}"


class TextBar(tqdm):  # type: ignore[type-arg]
    """A bar in a terminal, without tqdm's thread: a process with threads cannot fork its workers safely."""

    monitor_interval = 0


def _bar_class() -> Any:
    """Return the class of tqdm for a notebook or a terminal, or None if a bar would only fill a log."""
    if notebook() is not None:
        # Without ipywidgets tqdm's bar for notebooks raises.
        has_widgets = importlib.util.find_spec("ipywidgets") is not None
        return importlib.import_module("tqdm.notebook").tqdm if has_widgets else TextBar
    return None if columns_of(sys.stderr) is None else TextBar
