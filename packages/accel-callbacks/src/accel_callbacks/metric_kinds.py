"""Kinds of metrics, known by their names: the panel that each is drawn in, its label and its colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accel_core.extending import MetricRecord


@dataclass(frozen=True)
class Kind:
    """A kind of metrics, known by the prefix of their names: its label and how it is drawn."""

    prefix: str
    label: str
    style: dict[str, Any]


# The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Longer prefixes come
# first, since the first that fits is taken.
_MID_EPOCH_AVERAGE = {"color": "#009E73", "marker": ".", "linestyle": ":"}
_KINDS = (
    Kind("ema_model_intermediate_eval_", "averaged weights, mid-epoch", _MID_EPOCH_AVERAGE),
    Kind("ema_model_intermediate_", "averaged weights, mid-epoch", _MID_EPOCH_AVERAGE),
    Kind("ema_model_eval_", "averaged weights", {"color": "#009E73", "marker": "s"}),
    Kind("ema_model_", "averaged weights", {"color": "#009E73", "marker": "s"}),
    Kind("average_model_eval_", "mean of weights", {"color": "#009E73", "marker": "P"}),
    Kind("average_model_", "mean of weights", {"color": "#009E73", "marker": "P"}),
    Kind("intermediate_eval_", "mid-epoch", {"color": "#E69F00", "marker": ".", "linestyle": ":"}),
    Kind("intermediate_", "mid-epoch", {"color": "#E69F00", "marker": ".", "linestyle": ":"}),
    Kind("evaluation_", "evaluate()", {"color": "#CC79A7", "marker": "D", "linestyle": "none"}),
    Kind("train_", "training", {"color": "#0072B2", "marker": "^", "linestyle": "--"}),
    Kind("eval_", "evaluation", {"color": "#D55E00", "marker": "o"}),
)
_PLAIN = Kind("", "evaluation", {"color": "#D55E00", "marker": "o"})
_OTHER_SETS = ("#56B4E9", "#CC79A7", "#F0E442", "#000000")
"""Colours of further evaluation sets."""
_OTHER_SET = re.compile(r"(.+?)_(?:(?:ema|average)_model_)?(?:intermediate_)?eval(?:uation)?_loss(?:_epoch)?")
"""The loss of an evaluation set with a name of its own, in an evaluation of any kind."""
FIRST_GROUP = "first group"
"""Label of the learning rate whose name has no parameter group."""
_LEARNING_RATES = ("lr", "learning_rate")
"""Names of learning rates, which may be followed by the name of a parameter group."""


def find_other_sets(records: Sequence[MetricRecord]) -> list[str]:
    """Return the names of evaluation sets that have one: there is a loss `<name>_eval_loss_epoch` of each."""
    known = tuple(kind.prefix for kind in _KINDS)
    found = [
        match[1]
        for match in (_OTHER_SET.fullmatch(record["name"]) for record in records)
        if match is not None and not match[0].startswith(known)
    ]
    return list(dict.fromkeys(found))


def choose_panel(name: str, other_sets: Sequence[str] = ()) -> tuple[str, Kind, str]:
    """Return the panel of a metric, its kind, and its label in that panel."""
    for number, other in enumerate(other_sets):
        if name.startswith(f"{other}_"):
            metric, kind, label = choose_panel(name.removeprefix(f"{other}_"))
            marker = "v" if label == _PLAIN.label else kind.style["marker"]
            colour = {"color": _OTHER_SETS[number % len(_OTHER_SETS)], "marker": marker}
            label = f"{label} on {other.replace('_', ' ')}"
            return metric, Kind(other, label, {**kind.style, **colour}), label
    for rate in _LEARNING_RATES:
        if name == rate or name.startswith(f"{rate}_"):
            # TrainingStatisticsCallback names the rates of further groups `learning_rate_<name>`.
            group = name.removeprefix(rate).strip("_").replace("_", " ")
            return "learning_rate", _PLAIN, group or FIRST_GROUP
    for kind in _KINDS:
        if name.startswith(kind.prefix):
            return name.removeprefix(kind.prefix).removesuffix("_epoch"), kind, kind.label
    return name.removesuffix("_epoch"), _PLAIN, _PLAIN.label
