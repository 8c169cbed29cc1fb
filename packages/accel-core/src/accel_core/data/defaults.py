"""Data loaders as for a single process, with default settings for what the user leaves open."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigurationError
from ..text import with_full_stop
from .dataset_checks import check_known_arguments
from .devices import can_be_pinned
from .parts import flattened, parts_of
from .readers import ShardedIterable, is_map_style, is_ready_loader


def default_dataloader_kwargs(
    dataset: Any, batch_size: int, shuffle: bool, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the arguments of a `DataLoader` over `dataset` that hold if the user gives none.

    As torch's own there are no workers: forked ones share the files that a data set has opened before.
    """
    return {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "num_workers": 0,
        "pin_memory": accelerator.device.type == "cuda" and _can_be_pinned(dataset),
    }


def _can_be_pinned(dataset: Any) -> bool:
    """Whether `dataset` holds no tensor that is on a device already, or sparse: torch pins neither."""
    for part in parts_of(dataset):
        values = [part, *vars(part).values()] if hasattr(part, "__dict__") else [part]
        for value in flattened(values):
            if isinstance(value, torch.Tensor) and not can_be_pinned(value):
                return False
    return True


def create_dataloader(
    dataset: Any, defaults: dict[str, Any], own: dict[str, Any] | None, collate_fn: Any
) -> Any:
    """Return a torch `DataLoader` over `dataset`; what the user gives wins over `defaults`.

    One of ready batches is returned as it is.

    Raises:
        ConfigurationError: arguments that torch's `DataLoader` refuses.
    """
    if is_ready_loader(dataset, own):
        return dataset
    own = own or {}
    check_known_arguments(own)
    kwargs = {**defaults, "collate_fn": collate_fn, **own}
    # Torch refuses these together with what the user gives.
    replaced: tuple[str, ...] = ()
    if kwargs.get("batch_sampler") is not None:
        replaced = ("shuffle", "batch_size", "drop_last", "sampler")
    elif kwargs.get("sampler") is not None or not is_map_style(dataset):
        replaced = ("shuffle",)
    kwargs = {key: value for key, value in kwargs.items() if key not in replaced or key in own}
    is_torchs = is_map_style(dataset) or isinstance(dataset, IterableDataset)
    try:
        return DataLoader(dataset if is_torchs else ShardedIterable(dataset), **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigurationError(
            f"The dataloader_kwargs {own} are refused by torch's DataLoader over a {type(dataset).__name__}: "
            f"{with_full_stop(error)} Leave out or change what it names."
        ) from error
