"""Recognising data that is a share of its process already: a share of it would leave most samples unseen."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, SubsetRandomSampler

from ..errors import AccelWarning, ConfigurationError
from ..processes.collectives import all_gather_object
from .content import digest_of
from .parts import parts_of
from .readers import name_of_data, unwrapped

PACKAGES_THAT_SHARD = ("datasets", "webdataset", "torchdata", "streaming", "litdata")
"""Packages with streams that can give each process its own share."""

WAYS_OUT = (
    "Pass the whole data set on every process, or data_is_sharded=True if each process reads its own shard."
)


def check_samplers_cover_data(loader: Any) -> None:
    """Raise if a sampler gives a shard of the data, of which accel would take a shard again."""
    for part in parts_of(loader):
        if getattr(part, "num_replicas", None) not in (None, 1) and hasattr(part, "__iter__"):
            raise ConfigurationError(
                f"The sampler is a {type(part).__name__}, which shards the data itself, as accel does too. "
                "Pass the data set alone, a sampler over all of it, or data_is_sharded=True."
            )


def check_not_shares(**loaders: Any) -> None:
    """Raise on every process if data is a part of its process: its subsets have other indices on each.

    Where a data set holds other first entries on each, that is likely but not certain: an `AccelWarning`.
    Every process takes part.
    """
    own = {
        name: (_traits_of(loader), list(_first_entries_of(loader)))
        for name, loader in loaders.items()
        if loader is not None and not loader.data_is_sharded and not loader.group.is_single
    }
    by_process = all_gather_object(own) if own else []
    for name in own:
        given = [each[name][0] for each in by_process]
        if any(traits != given[0] for traits in given):
            kind = name_of_data(loaders[name].dataset)
            raise ConfigurationError(
                f"{name} is a {kind} with different samples on each of the {len(given)} processes. It is a "
                f"shard already, and accel would shard it again. {WAYS_OUT}"
            )
        if any(each[name][1] != own[name][1] for each in by_process):
            warnings.warn(
                f"{name} is a {name_of_data(loaders[name].dataset)} whose first entries differ between the "
                "processes. It seems to be a shard already, and accel shards it again, so most samples are "
                f"never seen. {WAYS_OUT}",
                AccelWarning,
                stacklevel=2,
            )


def _first_entries_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """Yield what stands first in the attributes that have an entry a sample.

    Nothing is read by index from the data set itself: that may open a file that workers are to open.
    """
    for part in parts_of(loader.loader):
        if isinstance(part, Subset) or not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            continue
        try:
            length = len(part)
        except Exception:
            # Whatever a part raises that does not know its length.
            continue
        for name, value in getattr(part, "__dict__", {}).items():
            # Such as the tensors of a TensorDataset.
            held = value if isinstance(value, tuple) and len(value) != length else (value,)
            for each in held:
                is_column = isinstance(each, (list, tuple, np.ndarray, torch.Tensor))
                if length and is_column and getattr(each, "ndim", 1) and len(each) == length:
                    yield name, _comparable(each[0])


def _comparable(entry: Any) -> Any:
    """Return a value that is equal on two processes if `entry` is, or None for what is no plain data."""
    if isinstance(entry, (str, PurePath)):
        # Machines may keep the same files in folders of their own.
        return os.path.basename(entry)
    if isinstance(entry, (bool, int, float, bytes)):
        return repr(entry)
    is_array = isinstance(entry, (np.ndarray, np.number)) and entry.dtype != object
    is_read_at_once = isinstance(entry, torch.Tensor) and entry.device.type == "cpu"
    if is_array or (is_read_at_once and entry.layout is torch.strided):
        return digest_of(entry)
    return [_comparable(each) for each in entry] if isinstance(entry, (list, tuple)) else None


def _traits_of(loader: Any) -> list[Any]:
    """Return what has to be the same on all processes, as values that are quick to compare."""
    traits: list[Any] = []
    for part in parts_of(loader.loader):
        if isinstance(part, (Subset, SubsetRandomSampler)):
            traits.append(digest_of(part.indices))
        kind = type(part)
        if kind.__module__.partition(".")[0] == "datasets":
            # A stream says which share it is.
            share = getattr(part, "_distributed", None)
            traits.append(None if share is None else (share.rank, share.world_size))
            # Tables are compared by their ends, read without the transforms, which may draw random numbers.
            if kind.__name__ == "Dataset" and len(part):
                plain = part.with_format(None)
                traits.append(digest_of((plain[0], plain[len(part) - 1])))
    return traits


def compare_first_items(digest: bytes | None, dataset: Any) -> None:
    """Compare the first items that the processes have read of an iterable dataset. Every process takes part.

    Raises:
        ConfigurationError: they differ, and streams of this kind can shard themselves.
    """
    digests = [each for each in all_gather_object(digest) if each is not None]
    if len(set(digests)) <= 1:
        return
    message = (
        f"The first item of the {name_of_data(dataset)} differs between {len(digests)} processes. It "
        "seems to be a shard already, and accel shards it again, so most samples are never seen. "
        f"{WAYS_OUT}"
    )
    packages = {kind.__module__.partition(".")[0] for kind in type(unwrapped(dataset)).__mro__}
    if packages & set(PACKAGES_THAT_SHARD):
        raise ConfigurationError(message)
    warnings.warn(message, AccelWarning, stacklevel=2)
