"""Data sets as they are read: tensors in memory by index, single samples, and the shard of an iterable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from ..state.random import SeededRandomness, derive_seed
from .order import shard_of


def is_map_style(dataset: Any) -> bool:
    """Whether `dataset` has a length and gives samples by index."""
    return (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, IterableDataset)
    )


def indexable_tensors(dataset: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """Return the tensors on the CPU that `dataset` consists of, and the indices of a subset, or None.

    The indices are None if it has all of the tensors.

    Only for exactly a `TensorDataset`, or `Subset`s of one: a subclass may do anything in `__getitem__`.
    """
    indices: torch.Tensor | None = None
    while type(dataset) is Subset:
        own = torch.as_tensor(dataset.indices, dtype=torch.int64)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or any(tensor.device.type != "cpu" for tensor in dataset.tensors):
        return None
    return dataset.tensors, indices


class IndexedTensors(Dataset[Any]):
    """Batches of tensors in memory by one `index_select` each, instead of sample by sample."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], indices: torch.Tensor | None) -> None:
        self.tensors = tensors
        self.indices = indices

    def __getitems__(self, indices: torch.Tensor) -> list[torch.Tensor]:
        if self.indices is not None:
            indices = self.indices.index_select(0, indices)
        return [tensor.index_select(0, indices) for tensor in self.tensors]


class SampleReader(Dataset[Any]):
    """Reads samples of a map-style data set, naming the one that fails."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.read_batch = getattr(dataset, "__getitems__", None)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise self._failure(index, error) from error

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        dataset = self.dataset
        try:
            return (
                [dataset[index] for index in indices] if self.read_batch is None else self.read_batch(indices)
            )
        except Exception as error:
            for index in indices:
                self[
                    index
                ]  # Names the one that fails; if each works by itself, it is their reading together that does not.
            raise self._failure(indices, error) from error

    def _failure(self, index: Any, error: Exception) -> ConfigurationError:
        length = f" with the length {len(self.dataset)}" if hasattr(self.dataset, "__len__") else ""
        return ConfigurationError(
            f"Reading the sample {index} of a {type(self.dataset).__name__}{length} failed with "
            f"{type(error).__name__}: {error}. Try dataset[{index}] by itself; each index from 0 to the "
            "length - 1, or each that the sampler gives, must work."
        )


class SeededSampleReader(SampleReader):
    """Reads each sample with python, numpy and torch seeded for it.

    It is asked for the epoch together with the index.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        with SeededRandomness(derive_seed(self.seed, "sample", epoch, index)):
            return super().__getitem__(index)

    def __getitems__(self, key: tuple[int, list[Any]]) -> list[Any]:  # type: ignore[override]
        epoch, indices = key
        return [self[epoch, index] for index in indices]


class ShardedIterable(IterableDataset[Any]):
    """Any iterable as an `IterableDataset`, of which this process keeps its part of each global step."""

    def __init__(
        self,
        iterable: Iterable[Any],
        batch_size: int = 1,
        drop_last: bool = False,
        group: DataGroup | None = None,
    ) -> None:
        """Wrap `iterable`; without a `group` everything is kept."""
        self.iterable = iterable
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.group = group or DataGroup()
        self.num_skipped = 0
        """Samples that are read and left out at the beginning."""

    def __iter__(self) -> Iterator[Any]:
        samples = itertools.islice(self.iterable, self.num_skipped, None)
        if self.group.is_single:
            yield from samples
            return
        step_size = self.batch_size * self.group.size
        while step := list(itertools.islice(samples, step_size)):
            if len(step) == step_size or not self.drop_last:
                yield from step[shard_of(len(step), self.group)]


def unwrapped(dataset: Any) -> Any:
    """Return what the user passed: the iterable in a `ShardedIterable`, or `dataset` itself."""
    return dataset.iterable if isinstance(dataset, ShardedIterable) else dataset


def name_of_data(dataset: Any) -> str:
    """Return the class of what the user passed, for messages."""
    return type(unwrapped(dataset)).__name__


def is_ready_loader(dataset: Any) -> bool:
    """Whether `dataset` is a loader: torch's, or an iterable with a `batch_size`."""
    is_like_one = (
        hasattr(dataset, "batch_size")
        and hasattr(dataset, "__iter__")
        and not hasattr(dataset, "__getitem__")
    )
    return isinstance(dataset, DataLoader) or is_like_one
