"""Several evaluation sets by name: their names, and arguments that may be given for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigurationError
from ..text import did_you_mean, preview

RESERVED_NAMES = ("train", "eval", "intermediate", "ema_model", "average_model", "evaluation")
"""Begin or end the names of other metrics in the run history, so no evaluation set may be called so."""


def named_sets(dataset: Any) -> dict[str, Any]:
    """Return data sets by name: the data itself is called `""`; there are none for None."""
    if dataset is None:
        return {}
    return dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}


def prefix_of(name: str) -> str:
    """Return what comes before the names of all metrics of an evaluation set."""
    return f"{name}_" if name else ""


def label_of(argument: str, name: str) -> str:
    """Return how an error calls the part of `argument` for one set."""
    return f"{argument}[{name!r}]" if name else argument


def check_named_sets(argument: str, dataset: Any) -> None:
    """Raise for a list of data sets, and for names of sets whose metrics could not be distinguished."""
    if isinstance(dataset, (list, tuple)):
        _refuse_list(argument, dataset)
    if not isinstance(dataset, Mapping):
        return
    way_out = "Pass {'': main, 'shifted': other}, for example."
    if not dataset:
        raise ConfigurationError(f"{argument} is empty, but must have at least one data set. {way_out}")
    for name, value in dataset.items():
        if not isinstance(name, str):
            raise ConfigurationError(
                f"{argument} has the name {preview(name)}, but names must be strings. {way_out}"
            )
        if isinstance(value, (torch.Tensor, np.ndarray)):
            raise ConfigurationError(
                f"{argument}[{name!r}] is a {type(value).__name__}, but each value must be a whole "
                "evaluation set. Put the tensors into a torch.utils.data.TensorDataset."
            )
        reserved = next((word for word in RESERVED_NAMES if f"_{name}".endswith(f"_{word}")), None)
        if reserved is not None:
            raise ConfigurationError(
                f"{argument} has the name {name!r}, but {reserved!r} stands in the names of other metrics, "
                f"so they could not be told apart. Use another name, such as {f'{name}_set'!r}."
            )


def _refuse_list(argument: str, datasets: Sequence[Any]) -> None:
    # Samples are seldom data sets. Those of the library datasets have __getitems__, as torch asks for it.
    if datasets and all(
        isinstance(item, (Dataset, DataLoader)) or hasattr(item, "__getitems__") for item in datasets
    ):
        raise ConfigurationError(
            f"{argument} is a {type(datasets).__name__} of {len(datasets)} data sets, whose metrics would "
            "have no names. Pass a dictionary, such as {'': main, 'shifted': other}, or join them by "
            "torch.utils.data.ConcatDataset."
        )


def for_each_set(argument: str, value: Any, names: Sequence[str], is_by_name: bool) -> dict[str, Any]:
    """Return the value of an argument for each set: the same for all, or what a dictionary has for its name.

    Args:
        value: a set that a dictionary leaves out gets None.
        is_by_name: `value` is a dictionary by name.

    Raises:
        ConfigurationError: the dictionary has a name that no set has.
    """
    if not is_by_name:
        return dict.fromkeys(names, value)
    for name in value:
        if name not in names:
            raise ConfigurationError(
                f"{argument} has the name {name!r}, but the evaluation sets are called {list(names)}."
                f"{did_you_mean(str(name), names)} Use the names of eval_dataset."
            )
    return {name: value.get(name) for name in names}


def loader_arguments(argument: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the loader arguments of each set; they may be given by name."""
    # No argument of a DataLoader is a dictionary, so one that holds dictionaries goes by name.
    is_by_name = isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values())
    return for_each_set(argument, value, names, is_by_name)


def batch_sizes(argument: str, value: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the batch size of each set; they may be given by name."""
    return for_each_set(argument, value, names, isinstance(value, Mapping))
