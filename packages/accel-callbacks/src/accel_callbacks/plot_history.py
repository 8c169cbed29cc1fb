"""plot_history: draw the run history as a picture for a report."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel_core import ConfigurationError, RunHistory
from accel_core.extending import MetricRecord, check_choice, check_path

from .dark_figure import darken

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class _Kind:
    """A kind of metrics, known by the prefix of their names: its label and how it is drawn."""

    prefix: str
    label: str
    style: dict[str, Any]


# The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Longer prefixes come
# first, since the first that fits is taken.
_MID_EPOCH_AVERAGE = {"color": "#009E73", "marker": ".", "linestyle": ":"}
_KINDS = (
    _Kind("ema_model_intermediate_eval_", "averaged weights, mid-epoch", _MID_EPOCH_AVERAGE),
    _Kind("ema_model_intermediate_", "averaged weights, mid-epoch", _MID_EPOCH_AVERAGE),
    _Kind("ema_model_eval_", "averaged weights", {"color": "#009E73", "marker": "s"}),
    _Kind("ema_model_", "averaged weights", {"color": "#009E73", "marker": "s"}),
    _Kind("average_model_eval_", "mean of weights", {"color": "#009E73", "marker": "P"}),
    _Kind("average_model_", "mean of weights", {"color": "#009E73", "marker": "P"}),
    _Kind("intermediate_eval_", "mid-epoch", {"color": "#E69F00", "marker": ".", "linestyle": ":"}),
    _Kind("intermediate_", "mid-epoch", {"color": "#E69F00", "marker": ".", "linestyle": ":"}),
    _Kind("evaluation_", "evaluate()", {"color": "#CC79A7", "marker": "D", "linestyle": "none"}),
    _Kind("train_", "training", {"color": "#0072B2", "marker": "^", "linestyle": "--"}),
    _Kind("eval_", "evaluation", {"color": "#D55E00", "marker": "o"}),
)
_PLAIN = _Kind("", "evaluation", {"color": "#D55E00", "marker": "o"})
_OTHER_SETS = ("#56B4E9", "#CC79A7", "#F0E442", "#000000")
"""Colours of further evaluation sets."""
_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs that are compared."""
_OTHER_SET = re.compile(r"(.+?)_(?:(?:ema|average)_model_)?(?:intermediate_)?eval(?:uation)?_loss(?:_epoch)?")
"""The loss of an evaluation set with a name of its own, in an evaluation of any kind."""
_ORDER_OF_LABELS = (
    "training",
    "evaluation",
    "averaged weights",
    "mean of weights",
    "mid-epoch",
    "averaged weights, mid-epoch",
    "evaluate()",
)
_FIRST_GROUP = "first group"
_LEARNING_RATES = ("lr", "learning_rate")
"""Names of learning rates, which may be followed by the name of a parameter group."""
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
"""Entries of a legend that find room beside the curves; more of them get room above."""
_WIDTH_OF_TITLE = 44
"""Width in characters; a longer title would run into the next panel."""


@dataclass
class _Series:
    """The values of one metric."""

    kind: _Kind
    label: str
    records: list[MetricRecord] = field(default_factory=list)
    run: str = ""
    """Name of the run where several are compared."""
    position: Callable[[MetricRecord], float] = lambda record: record["epoch"]
    """Gives a record its place on an axis of epochs."""

    @property
    def shown_label(self) -> str:
        """The label with the run before it."""
        # Of most runs there is one rate, whose name would only be noise.
        if self.run and self.label == _FIRST_GROUP:
            return self.run
        return f"{self.run}, {self.label}" if self.run else self.label

    @property
    def is_by_update(self) -> bool:
        """Whether some epoch has several values."""
        return len(self.records) > len({record["epoch"] for record in self.records})

    @property
    def finite(self) -> list[float]:
        return [record["value"] for record in self.records if math.isfinite(record["value"])]


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
    more than 100 are drawn on a
    logarithmic axis.

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
    check_choice("dark", dark, (False, True))
    panels = _sort_into_panels(_runs(run_history))
    columns = 1 if len(panels) == 1 else 2 if len(panels) <= 4 else 3
    rows = math.ceil(len(panels) / columns)
    figure = create_figure("plot_history", (1 + 4.8 * columns, 3.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    by_epoch = [
        axes
        for axes, (name, series) in zip(grid, panels.items(), strict=False)
        if not _is_by_update(name, series)
    ]
    for axes, (name, series) in zip(grid, panels.items(), strict=False):
        _draw_panel(axes, name, series)
    if by_epoch:
        # The same epochs in all of these panels, so that they can be compared, with room for marks at the
        # ends.
        low, high = (
            limit(axes.dataLim.intervalx[end] for axes in by_epoch) for end, limit in enumerate((min, max))
        )
        room = max(0.25, 0.03 * high)
        for axes in by_epoch:
            axes.set_xlim(low - room, high + room)
    # A grid of 2 by 3 has a cell too many for five panels.
    for axes in grid[len(panels) :]:
        axes.remove()
    if dark:
        darken(figure)
    save_figure(figure, path)
    return figure


def create_figure(caller: str, size: tuple[float, float]) -> Figure:
    """Return an empty figure that no window shows.

    Args:
        caller: the function that needs it, for errors.
        size: width and height in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            f"{caller} needs the package 'matplotlib', which is not installed. Install it with: "
            'pip install "accel-callbacks[matplotlib]"'
        ) from None
    # pyplot would choose a backend, and keep the figure until it is closed.
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Figure, path: str | Path | None) -> None:
    """Save `figure` as `path` if one is given, and make its folder."""
    if path is not None:
        path = check_path("path", path, "Pass the name of a picture, such as 'history.png'.")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _runs(given: Any) -> dict[str, list[MetricRecord]]:
    """Return the records of each run by its name, which is empty for a single one."""
    if isinstance(given, RunHistory):
        runs = {"": given}
    elif isinstance(given, Mapping):
        runs = {str(name): history for name, history in given.items()}
    else:
        runs = {f"run {number}": history for number, history in enumerate(given, start=1)}
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


def _sort_into_panels(runs: Mapping[str, Sequence[MetricRecord]]) -> dict[str, list[_Series]]:
    """Return the series by panel: losses, then metrics by epoch, those by update, and learning rates."""
    series: dict[tuple[str, str], _Series] = {}
    panels: dict[str, list[_Series]] = {}
    for number, (run, records) in enumerate(runs.items()):
        position = _position_in_epochs(records)
        others = _other_sets(records)
        for record in records:
            name = record["name"]
            if (run, name) not in series:
                panel, kind, label = _choose_panel(name, others)
                if run:
                    kind = replace(kind, style={**kind.style, "color": _RUNS[number % len(_RUNS)]})
                series[run, name] = _Series(kind, label, run=run, position=position)
                panels.setdefault(panel, []).append(series[run, name])
            series[run, name].records.append(record)
    for members in panels.values():
        members.sort(key=_place_in_legend)

    def order(item: tuple[str, list[_Series]]) -> tuple[bool, bool, bool]:
        name, members = item
        # False sorts before True.
        return name == "learning_rate", _is_by_update(name, members), name != "loss"

    return dict(sorted(panels.items(), key=order))


def _place_in_legend(series: _Series) -> int:
    # Further evaluation sets, whose names are the user's, come last.
    known = _ORDER_OF_LABELS
    return known.index(series.label) if series.label in known else len(known)


def _is_by_update(name: str, series: Sequence[_Series]) -> bool:
    return name == "learning_rate" or all(member.is_by_update for member in series)


def _other_sets(records: Sequence[MetricRecord]) -> list[str]:
    """Return the names of evaluation sets that have one: there is a loss `<name>_eval_loss_epoch` of each."""
    known = tuple(kind.prefix for kind in _KINDS)
    found = [
        match[1]
        for match in (_OTHER_SET.fullmatch(record["name"]) for record in records)
        if match is not None and not match[0].startswith(known)
    ]
    return list(dict.fromkeys(found))


def _choose_panel(name: str, other_sets: Sequence[str] = ()) -> tuple[str, _Kind, str]:
    """Return the panel of a metric, its kind, and its label in that panel."""
    for number, other in enumerate(other_sets):
        if name.startswith(f"{other}_"):
            metric, kind, label = _choose_panel(name.removeprefix(f"{other}_"))
            marker = "v" if label == _PLAIN.label else kind.style["marker"]
            colour = {"color": _OTHER_SETS[number % len(_OTHER_SETS)], "marker": marker}
            label = f"{label} on {other.replace('_', ' ')}"
            return metric, _Kind(other, label, {**kind.style, **colour}), label
    for rate in _LEARNING_RATES:
        if name == rate or name.startswith(f"{rate}_"):
            # TrainingStatisticsCallback names the rates of further groups `learning_rate_<name>`.
            group = name.removeprefix(rate).strip("_").replace("_", " ")
            return "learning_rate", _PLAIN, group or _FIRST_GROUP
    for kind in _KINDS:
        if name.startswith(kind.prefix):
            return name.removeprefix(kind.prefix).removesuffix("_epoch"), kind, kind.label
    return name.removesuffix("_epoch"), _PLAIN, _PLAIN.label


def _position_in_epochs(records: Sequence[MetricRecord]) -> Callable[[MetricRecord], float]:
    """Return a function from a record to its position on an axis of epochs.

    The end of epoch 3 is at 3, its middle at 2.5.
    """
    ends: dict[int, int] = {}
    for record in records:
        ends[record["epoch"]] = max(ends.get(record["epoch"], 0), record["update"])
    # The loss of training is recorded exactly at the end of an epoch, so it decides if there is one.
    ends |= {record["epoch"]: record["update"] for record in records if record["name"] == "train_loss_epoch"}

    def position(record: MetricRecord) -> float:
        epoch = record["epoch"]
        start = ends.get(epoch - 1, 0)
        length = ends[epoch] - start
        share = (record["update"] - start) / length if length > 0 else 1.0
        return epoch - 1 + min(1.0, max(0.0, share))

    return position


def _draw_panel(axes: Axes, name: str, series: list[_Series]) -> None:
    from matplotlib.ticker import MaxNLocator

    by_update = _is_by_update(name, series)
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
    if len(series) > _MOST_BESIDE_CURVES:
        _make_room_for_legend(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if not by_update or len(series) > 1:
        axes.legend(fontsize="small", framealpha=0.8, ncols=2 if len(series) > 4 else 1)


def _make_room_for_legend(axes: Axes) -> None:
    low, high = axes.get_ylim()
    share = 0.4
    is_log = axes.get_yscale() == "log"
    axes.set_ylim(low, high * (high / low) ** share if is_log else high + share * (high - low))


def _style_by_update(series: _Series, index: int, number: int) -> dict[str, Any]:
    from matplotlib import colormaps

    # Runs keep their colours in all panels.
    if series.run:
        return {"color": series.kind.style["color"], "marker": "o"}

    # Groups of parameters have an order, and so have these colours. The palest, at 1.0, is hard to see.
    color = "#0072B2" if number == 1 else colormaps["viridis"](0.9 * index / (number - 1))
    return {"color": color, "marker": "o"}


def _draw_series(
    axes: Axes,
    series: _Series,
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


def _series_with_best(series: Sequence[_Series]) -> list[_Series]:
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
