"""Data loaders as for a single process, with default settings for what the user leaves open."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

from ..errors import ConfigurationError
from ..text import with_full_stop
from .readers import ShardedIterable, indexable_tensors, is_map_style, is_ready_loader

MOST_WORKERS = 8


def default_num_workers(dataset: Any, num_local_processes: int) -> int:
    """Return the cores that this process may use over the processes of this machine, at most 8.

    0 for what is in memory, for iterable data (each worker would repeat it) and if workers are not forked.
    """
    # Sending a sample from a worker takes longer than reading it from memory.
    in_memory = (
        isinstance(dataset, (list, tuple, torch.Tensor, np.ndarray)) or indexable_tensors(dataset) is not None
    )
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if in_memory or not is_map_style(dataset) or method != "fork":
        return 0
    # A container or a scheduler may allow fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // num_local_processes, MOST_WORKERS)


def default_dataloader_kwargs(
    dataset: Any, batch_size: int, shuffle: bool, accelerator: Accelerator
) -> dict[str, Any]:
    """Return the arguments of a `DataLoader` over `dataset` that hold if the user gives none."""
    # On several machines the processes of the others have cores of their own.
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "num_workers": default_num_workers(dataset, num_local_processes),
        "pin_memory": accelerator.device.type == "cuda",
    }


def create_dataloader(
    dataset: Any, defaults: dict[str, Any], own: dict[str, Any] | None, collate_fn: Any
) -> Any:
    """Return a torch `DataLoader` over `dataset`; what the user gives wins over `defaults`.

    A ready one is returned as it is.

    Raises:
        ConfigurationError: arguments that torch's `DataLoader` refuses.
    """
    if is_ready_loader(dataset):
        return dataset
    own = own or {}
    kwargs = {**defaults, "collate_fn": collate_fn, **own}
    # Torch refuses these together with what the user gives.
    replaced: tuple[str, ...] = ()
    if kwargs.get("batch_sampler") is not None:
        replaced = ("shuffle", "batch_size", "drop_last", "sampler")
    elif kwargs.get("sampler") is not None or not is_map_style(dataset):
        replaced = ("shuffle",)
    kwargs = {key: value for key, value in kwargs.items() if key not in replaced or key in own}
    # Starting the workers anew for each epoch takes seconds if the data set is large.
    kwargs.setdefault("persistent_workers", kwargs.get("num_workers", 0) > 0)
    is_torchs = is_map_style(dataset) or isinstance(dataset, IterableDataset)
    try:
        return DataLoader(dataset if is_torchs else ShardedIterable(dataset), **kwargs)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigurationError(
            f"The dataloader_kwargs {own} are refused by torch's DataLoader over a {type(dataset).__name__}: "
            f"{with_full_stop(error)} Leave out or change what it names."
        ) from error
