"""Checks of what the user passes as data, made before a run changes anything."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DataLoader, Subset

from ..checks.values import check_callable, check_whole_number
from ..errors import ConfigurationError
from ..text import did_you_mean, preview
from .parts import parts_of
from .readers import is_map_style, is_ready_loader


def check_dataset(name: str, dataset: Any, num_passes: int | None = 1) -> None:
    """Raise unless samples or batches can be read from `dataset` `num_passes` times.

    Data that is known to be empty raises an error too.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoaderStateMixin):
        raise ConfigurationError(
            f"{name} is a {kind}, which Accelerate has prepared already, so it would be sharded twice. "
            "Pass the loader as it was before accelerator.prepare."
        )
    # A tensor of no dimensions has __len__ and __getitem__, which fail.
    is_scalar = isinstance(dataset, torch.Tensor) and dataset.ndim == 0
    is_data = is_map_style(dataset) or isinstance(dataset, Iterable)
    # A dictionary of tensors and a path can be iterated too, but hardly ever are the samples.
    if isinstance(dataset, (Mapping, str, bytes, type)) or is_scalar or not is_data:
        raise ConfigurationError(
            f"{name} is {preview(dataset)}, but must be a data set (with __getitem__ and __len__, or "
            "iterable) or a ready DataLoader. Put tensors into a torch.utils.data.TensorDataset."
        )
    _check_no_columns(name, dataset)
    for part in parts_of(dataset):
        if isinstance(part, Subset) and _are_boolean(part.indices):
            raise ConfigurationError(
                f"{name} has a Subset with the indices {preview(part.indices)}, which are True and False, "
                "not numbers of samples. Pass numpy.flatnonzero of them."
            )
    if is_map_style(dataset) and len(dataset) == 0:
        raise ConfigurationError(
            f"{name} is empty: its length is 0, but it must have at least one sample. Check how it is read."
        )
    if isinstance(dataset, Iterator) and num_passes is not None and num_passes > 1:
        raise ConfigurationError(
            f"{name} is an iterator ({kind}), which can be read only once, but num_epochs is {num_passes}. "
            "Use num_epochs=1, or pass an object whose __iter__ begins again."
        )


def _check_no_columns(name: str, dataset: Any) -> None:
    """Raise for inputs and targets side by side, as `(x, y)`, each of which would be taken for a sample."""
    if not isinstance(dataset, (tuple, list)) or len(dataset) < 2:
        return
    if not all(isinstance(part, (torch.Tensor, np.ndarray)) and part.ndim for part in dataset):
        return
    same_length = len({len(part) for part in dataset}) == 1
    # A list of samples may differ in shape, for a collate function that pads; hardly in their dimensions.
    kinds = {part.ndim if isinstance(dataset, list) else (part.shape, part.dtype) for part in dataset}
    if same_length and len(kinds) > 1:
        raise ConfigurationError(
            f"{name} is a {type(dataset).__name__} of {len(dataset)} arrays of the length {len(dataset[0])}, "
            f"which would be {len(dataset)} samples. Pass torch.utils.data.TensorDataset(inputs, targets), "
            "after torch.as_tensor for arrays of numpy."
        )


def _are_boolean(indices: Any) -> bool:
    first = next(iter(indices), None)
    return isinstance(first, (bool, np.bool_)) or getattr(first, "dtype", None) is torch.bool


def check_dataloader_arguments(name: str, kwargs: Any, dataset: Any) -> None:
    """Raise unless `kwargs` is None or a dictionary of arguments that torch's `DataLoader` knows.

    A `dataset` that is a loader already takes no arguments.
    """
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise ConfigurationError(
            f"{name} is {preview(kwargs)}, but must be a dictionary of arguments of torch's DataLoader. Pass "
            "dict(num_workers=2)."
        )
    check_whole_number(
        f"{name}['batch_size']",
        kwargs.get("batch_size"),
        "Use 1 for batches of single samples.",
        optional=True,
    )
    if isinstance(dataset, DataLoader) and kwargs:
        raise ConfigurationError(
            f"{name} is {preview(kwargs)}, but the data is a ready {type(dataset).__name__}, which keeps its "
            f"own settings. Leave {name} out, or pass the data set inside the loader."
        )
    if is_ready_loader(dataset, kwargs) and set(kwargs) - {"batch_size"}:
        raise ConfigurationError(
            f"{name} is {preview(kwargs)}, but the items of a {type(dataset).__name__} are taken for ready "
            "batches, so these settings have no use. Leave them out, or add 'batch_size' to have its items "
            "joined to batches."
        )


def check_known_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raise if torch's `DataLoader` does not know a key of `kwargs`.

    Loaders that a subclass of the trainer makes may know others, so this is asked when accel makes one.
    """
    # The first parameter is the data set itself.
    known = list(inspect.signature(DataLoader).parameters)[1:]
    for key in kwargs:
        if key not in known:
            hint = did_you_mean(str(key), known) or f" It knows {known}."
            raise ConfigurationError(
                f"The dataloader_kwargs have the key {key!r}, which torch's DataLoader does not know.{hint}"
            )


def check_collate_fn(collate_fn: Any, *datasets: tuple[Any, Any]) -> None:
    """Raise unless `collate_fn` is None, or a function that one of `datasets` has a use for.

    Args:
        datasets: each with its arguments of a loader.
    """
    check_callable("collate_fn", collate_fn, "Pass a function from a list of samples to a batch.")
    # One of them may be a ready loader: the function then joins the samples of the other.
    if collate_fn is not None and all(is_ready_loader(*dataset) for dataset in datasets):
        raise ConfigurationError(
            f"collate_fn is {preview(collate_fn)}, but the data is a ready {type(datasets[0][0]).__name__}, "
            "which makes its own batches. Give the loader its collate_fn, pass the data set inside it, or "
            "add 'batch_size' to the loader arguments to have its items joined to batches."
        )
