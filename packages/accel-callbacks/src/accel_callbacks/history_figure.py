"""Draw the run history as a picture for a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_core import ConfigurationError, RunHistory
from accel_core.extending import MetricRecord, check_flag

from .dark_figure import darken
from .history_panel import PANEL_HEIGHT, PANEL_WIDTH, draw_panel
from .history_series import is_drawn_by_update, sort_into_panels
from .picture import create_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_history(
    run_history: RunHistory | Sequence[RunHistory] | Mapping[str, RunHistory],
    path: str | Path | None = None,
    *,
    dark: bool = False,
) -> Figure:
    """Draw losses and metrics by epoch, with the best evaluation marked, and the learning rate by update.

    The losses have a panel, each metric has one with its values in training and evaluation, and so have the
    learning rates, if a callback recorded them as `learning_rate` or `lr`. Other metrics with several
    values in an epoch are drawn by update too. Values that are not finite leave a gap and are marked with a
    cross at the lower edge. Each evaluation set with a name of its own has a line in the panels of its
    metrics. Several runs are drawn on one axis, each in its colour. Losses and errors that span a factor of
    more than 100 are drawn on a logarithmic axis. Two panels stand beside each other, so that a page that
    shows the picture 600 pixels wide can be read.

    Needs matplotlib, but changes none of its global state, so that it works without a screen.

    Args:
        run_history: `trainer.run_history`, or what `trainer.train` returned; several of them, or a mapping
            from names to them, to compare runs.
        path: where to save the picture, in the format of its suffix (`.png`, `.pdf`, `.svg`). Missing folders
            are made. On several processes, save on one: `if trainer.is_main_process`.
        dark: light lines on a dark ground, for a page or a slide that is dark.

    Returns:
        The figure, to change or to show.

    Raises:
        ConfigurationError: matplotlib is not installed, a history has no values, or an argument cannot be
            used.
    """
    check_flag("dark", dark)
    panels = sort_into_panels(_runs(run_history))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    # A panel that stands alone has more room, and its words are still as large.
    width = 2 * PANEL_WIDTH if columns == 2 else 1.6 * PANEL_WIDTH
    figure = create_figure("plot_history", (width, PANEL_HEIGHT * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    by_epoch = [
        axes
        for axes, (name, series) in zip(grid, panels.items(), strict=False)
        if not is_drawn_by_update(name, series)
    ]
    heights = [
        draw_panel(axes, name, series) for axes, (name, series) in zip(grid, panels.items(), strict=False)
    ]
    figure.set_figheight(max(heights) * rows)
    if by_epoch:
        # The same epochs in all of these panels, so that they can be compared, with room for marks at the
        # ends.
        low, high = (
            limit(axes.dataLim.intervalx[end] for axes in by_epoch) for end, limit in enumerate((min, max))
        )
        room = max(0.25, 0.03 * high)
        for axes in by_epoch:
            axes.set_xlim(low - room, high + room)
    # A grid of two columns has a cell too many for three panels.
    for axes in grid[len(panels) :]:
        axes.remove()
    if dark:
        darken(figure)
    save_figure(figure, path)
    return figure


def _runs(given: Any) -> dict[str, list[MetricRecord]]:
    """Return the records of each run by its name, which is empty for a single one."""
    if isinstance(given, RunHistory):
        runs = {"": given}
    elif isinstance(given, Mapping):
        runs = {str(name): history for name, history in given.items()}
    else:
        several = given if isinstance(given, Iterable) else [given]
        runs = {f"run {number}": history for number, history in enumerate(several, start=1)}
    for name, history in runs.items():
        if not isinstance(history, RunHistory):
            raise ConfigurationError(
                f"run_history has {history!r}, but must have run histories. Pass trainer.run_history, or "
                "several of them in a list or a dictionary."
            )
        if not history.get_records():
            raise ConfigurationError(
                f"The run history {name or 'given'} has no values, so there is nothing to draw. Call "
                "plot_history after train."
            )
    if not runs:
        raise ConfigurationError("run_history is empty. Pass trainer.run_history, or several of them.")
    return {name: history.to_records() for name, history in runs.items()}
