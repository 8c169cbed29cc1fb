"""What a training state keeps of the order of map-style data, to have it again without the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from ..errors import CheckpointError
from .keyed_order import KeyedOrder
from .loader import ShardedDataLoader
from .map_style import MapStyleSource
from .order import ORDER_VERSION, EpochOrder
from .readers import name_of_data


def record_order(loader: ShardedDataLoader) -> dict[str, Any]:
    """Return plain values from which `order_of_epoch` gives the order; or `unknown`, with the reason."""
    source = loader.source
    name = name_of_data(loader.dataset)
    if loader.data_is_sharded:
        return {"unknown": "each process brought its own share of the data (data_is_sharded=True)"}
    if not isinstance(source, MapStyleSource):
        return {"unknown": f"{name} is read without an index, so its samples have no number"}
    order, batch_size = source.sampler.order, source.sampler.batch_size
    kind = type(order.sampler)
    if batch_size is None or order.is_users:
        return {"unknown": f"the order is chosen by {kind.__name__}, and the state does not hold its choices"}
    record = {
        "version": order.version,
        "sampler": kind.__name__,
        "num_samples": len(order),
        "batch_size": batch_size,
        "drop_last": source.sampler.drop_last,
        "max_steps": loader.max_steps,
        "repeats_first_epoch": loader.repeat_first_epoch,
    }
    if isinstance(order.sampler, RandomSampler):
        return {**record, "data": len(order.sampler.data_source), "replacement": order.sampler.replacement}
    if isinstance(order.sampler, SequentialSampler):
        return record
    # The weights or the subset may be as large as the data.
    return {"unknown": f"{kind.__name__} draws from values of its own, which the state does not hold"}


def order_of_epoch(record: Mapping[str, Any], seed: int, order_epoch: int) -> Any:
    """Return the indices of an epoch in their order: an int64 array, or a `KeyedOrder`, sliced like one.

    Raises:
        CheckpointError: the order is of a version that is not known yet.
    """
    if record["version"] > ORDER_VERSION:
        raise CheckpointError(
            f"The data was in version {record['version']} of the order, but this accel knows the versions "
            f"up to {ORDER_VERSION}. Use the version of accel that wrote the state."
        )
    sampler: Any
    if record["sampler"] == "SequentialSampler":
        sampler = SequentialSampler(range(record["num_samples"]))
    else:
        # With all samples once, torch wants no number of them.
        number = None if record["num_samples"] == record["data"] else record["num_samples"]
        sampler = RandomSampler(range(record["data"]), record["replacement"], number)
    epoch = 0 if record["repeats_first_epoch"] else order_epoch
    epoch_order = EpochOrder(sampler, seed, is_shared=False)
    epoch_order.version = record["version"]
    order = epoch_order.of_epoch(epoch)
    if isinstance(order, torch.Tensor):
        return order.numpy()
    return np.asarray(order, dtype=np.int64) if isinstance(order, (list, range)) else order


def places_of(record: Mapping[str, Any], seed: int, order_epoch: int, sample: int) -> np.ndarray[Any, Any]:
    """Return where `sample` stands in the order of an epoch: the inverse of `order_of_epoch`."""
    order = order_of_epoch(record, seed, order_epoch)
    if isinstance(order, KeyedOrder):
        return order.places_of([sample] if sample < len(order) else [])
    return np.flatnonzero(order == sample)
