"""Draw one panel of a run history: curves, the best value, and marks where values are not finite."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .history_series import Series, is_drawn_by_update

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALLER_IS_BETTER = (
    "loss",
    "error",
    "perplexity",
    "mae",
    "mse",
    "rmse",
    "wer",
    "cer",
    "nll",
    "distance",
    "divergence",
)
_MOST_MARKERS = 30
"""Values of a line with markers; more of them would hide it."""
_MANY_VALUES = 200
"""Values from which on a line is thin."""
_MOST_BESIDE_CURVES = 4
"""Lines of a legend that find room beside the curves; more of them get room above."""
_WIDTH_OF_TITLE = 34
"""Width in characters; a longer title would run into the next panel."""
_WIDTH_OF_ENTRY, _WIDTH_OF_NARROW_ENTRY = 42, 16
"""Widths in characters of what a legend says: as wide as a panel, and as half of one."""
_LINE_OF_LEGEND, _AROUND_CURVES = 0.17, 0.8
"""Heights in inches: of a line of a legend, and of title, numbers and label of a panel."""
PANEL_WIDTH, PANEL_HEIGHT = 3.6, 3.2
"""Size in inches of a panel with a small legend. Two beside each other are readable at 600 pixels."""


def draw_panel(axes: Axes, name: str, series: list[Series]) -> float:
    """Draw the metric `name`, with a line for each of `series`, and its title, axes and legend.

    Returns:
        The height in inches that the panel needs, which grows with its legend.
    """
    from matplotlib.ticker import MaxNLocator

    by_update = is_drawn_by_update(name, series)
    # The lowest point of a noisy curve by update means nothing.
    best = [] if by_update else _series_with_best(series)
    for index, member in enumerate(series):
        style = _style_by_update(member, index, len(series)) if by_update else dict(member.kind.style)
        positions = [record["update"] if by_update else member.position(record) for record in member.records]
        # Series often fail together, so each has a row of its own for the crosses of missing values.
        _draw_series(
            axes,
            member,
            positions,
            style,
            name if any(member is each for each in best) else None,
            height_of_crosses=0.03 + 0.04 * index,
        )
    if any(len(member.finite) < len(member.records) for member in series):
        # Nothing is drawn: it is an entry of the legend for the crosses of all series.
        axes.plot([], [], color="gray", marker="x", markersize=4, linestyle="none", label="not finite")
    axes.set_title(textwrap.fill(_readable(name), _WIDTH_OF_TITLE), loc="left")
    axes.set_xlabel("update" if by_update else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    values = [value for member in series for value in member.finite]
    if _smaller_is_better(name) and values and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
    else:
        # No common factor, which matplotlib would write over the title.
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return _draw_legend(axes) if not by_update or len(series) > 1 else PANEL_HEIGHT


def _draw_legend(axes: Axes) -> float:
    """Draw the legend, above the curves if it is long, and return the height that the panel then needs."""
    handles, labels = axes.get_legend_handles_labels()
    # Matplotlib leaves out labels that begin with an underscore.
    if not labels:
        return PANEL_HEIGHT
    is_narrow = max(map(len, labels)) <= _WIDTH_OF_NARROW_ENTRY
    columns = 2 if is_narrow and len(labels) > _MOST_BESIDE_CURVES else 1
    labels = [textwrap.fill(label, _WIDTH_OF_ENTRY) for label in labels]
    lines = math.ceil(sum(label.count("\n") + 1 for label in labels) / columns)
    height = PANEL_HEIGHT + _LINE_OF_LEGEND * max(0, lines - _MOST_BESIDE_CURVES)
    if lines > _MOST_BESIDE_CURVES:
        _make_room_above(axes, (lines + 1) * _LINE_OF_LEGEND / (height - _AROUND_CURVES))
    axes.legend(handles, labels, fontsize="small", framealpha=0.8, ncols=columns)
    return height


def _make_room_above(axes: Axes, part: float) -> None:
    """Leave the upper `part` of the axes, between 0 and 1, without curves."""
    low, high = axes.get_ylim()
    share = part / (1 - part)
    is_log = axes.get_yscale() == "log"
    axes.set_ylim(low, high * (high / low) ** share if is_log else high + share * (high - low))


def _style_by_update(series: Series, index: int, number: int) -> dict[str, Any]:
    from matplotlib import colormaps

    # Runs keep their colours in all panels.
    if series.run:
        return {"color": series.kind.style["color"], "marker": "o"}

    # Groups of parameters have an order, and so have these colours. The palest, at 1.0, is hard to see.
    color = "#0072B2" if number == 1 else colormaps["viridis"](0.9 * index / (number - 1))
    return {"color": color, "marker": "o"}


def _draw_series(
    axes: Axes,
    series: Series,
    positions: Sequence[float],
    style: dict[str, Any],
    best_of: str | None,
    height_of_crosses: float,
) -> None:
    values = [record["value"] if math.isfinite(record["value"]) else math.nan for record in series.records]
    if len(values) > _MOST_MARKERS and style.get("linestyle") != "none":
        # Markers only for values that no line shows: those between two that are not finite.
        style["markevery"] = _isolated(values)
    label = series.shown_label
    if best_of is not None:
        value, position = _find_best(values, positions, best_of)
        extreme = "lowest" if _smaller_is_better(best_of) else "highest"
        label += f", {extreme} {value:.4g} in epoch {math.ceil(position):,}"
        axes.plot(
            position,
            value,
            color=style["color"],
            marker="o",
            markersize=11,
            fillstyle="none",
            markeredgewidth=1.5,
        )
    elif style.get("linestyle") == "none" and len(values) == 1:
        # A single point is the result of a test, whose value nobody should have to read off an axis.
        label += f": {values[0]:.4g}"
    axes.plot(
        positions,
        values,
        label=label,
        markersize=4.5,
        linewidth=1.0 if len(values) > _MANY_VALUES else 1.5,
        **style,
    )
    missing = [position for position, value in zip(positions, values, strict=True) if math.isnan(value)]
    # The height is that of the panel, from 0 to 1, whatever the values are.
    axes.plot(
        missing,
        [height_of_crosses] * len(missing),
        color=style["color"],
        marker="x",
        markersize=4.5,
        linestyle="none",
        transform=axes.get_xaxis_transform(),
    )


def _isolated(values: Sequence[float]) -> list[int]:
    """Return the indices of numbers whose neighbours are both nan."""
    padded = [math.nan, *values, math.nan]
    return [
        index
        for index, (before, value, after) in enumerate(zip(padded, values, padded[2:], strict=False))
        if math.isnan(before) and not math.isnan(value) and math.isnan(after)
    ]


def _series_with_best(series: Sequence[Series]) -> list[Series]:
    """Return of each run the series whose best value is marked: that of evaluations, or else of training."""
    by_label = {(member.run, member.label): member for member in series if member.finite}
    chosen = [
        by_label.get((run, "evaluation"), by_label.get((run, "training")))
        for run in dict.fromkeys(member.run for member in series)
    ]
    return [member for member in chosen if member is not None]


def _find_best(values: Sequence[float], positions: Sequence[float], name: str) -> tuple[float, float]:
    choose = min if _smaller_is_better(name) else max
    best = choose(value for value in values if not math.isnan(value))
    return best, positions[list(values).index(best)]


def _smaller_is_better(name: str) -> bool:
    # By whole words, so that "glossy" has no loss.
    return any(word in _SMALLER_IS_BETTER for word in name.lower().split("_"))


def _readable(name: str) -> str:
    words = name.replace("_", " ").strip() or name
    return words[:1].upper() + words[1:]
