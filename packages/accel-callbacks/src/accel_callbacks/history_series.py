"""The series of a run history by panel: the values of each metric, and where they stand on its axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from accel_core.extending import MetricRecord

from .metric_kinds import FIRST_GROUP, Kind, choose_panel, find_other_sets

_RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of runs that are compared."""
_ORDER_OF_LABELS = (
    "training",
    "evaluation",
    "averaged weights",
    "mean of weights",
    "mid-epoch",
    "averaged weights, mid-epoch",
    "evaluate()",
)


@dataclass
class Series:
    """The values of one metric."""

    kind: Kind
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
        if self.run and self.label == FIRST_GROUP:
            return self.run
        return f"{self.run}, {self.label}" if self.run else self.label

    @property
    def is_by_update(self) -> bool:
        """Whether some epoch has several values."""
        return len(self.records) > len({record["epoch"] for record in self.records})

    @property
    def finite(self) -> list[float]:
        """The values without nan and infinity."""
        return [record["value"] for record in self.records if math.isfinite(record["value"])]


def sort_into_panels(runs: Mapping[str, Sequence[MetricRecord]]) -> dict[str, list[Series]]:
    """Return the series by panel: losses, then metrics by epoch, those by update, and learning rates."""
    series: dict[tuple[str, str], Series] = {}
    panels: dict[str, list[Series]] = {}
    for number, (run, records) in enumerate(runs.items()):
        position = _position_in_epochs(records)
        others = find_other_sets(records)
        for record in records:
            name = record["name"]
            if (run, name) not in series:
                panel, kind, label = choose_panel(name, others)
                if run:
                    kind = replace(kind, style={**kind.style, "color": _RUNS[number % len(_RUNS)]})
                series[run, name] = Series(kind, label, run=run, position=position)
                panels.setdefault(panel, []).append(series[run, name])
            series[run, name].records.append(record)
    for members in panels.values():
        members.sort(key=_place_in_legend)

    def order(item: tuple[str, list[Series]]) -> tuple[bool, bool, bool]:
        name, members = item
        # False sorts before True.
        return name == "learning_rate", is_drawn_by_update(name, members), name != "loss"

    return dict(sorted(panels.items(), key=order))


def _place_in_legend(series: Series) -> int:
    # Further evaluation sets, whose names are the user's, come last.
    known = _ORDER_OF_LABELS
    return known.index(series.label) if series.label in known else len(known)


def is_drawn_by_update(name: str, series: Sequence[Series]) -> bool:
    """Whether the panel `name` has an axis of updates, and not of epochs."""
    return name == "learning_rate" or all(member.is_by_update for member in series)


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
