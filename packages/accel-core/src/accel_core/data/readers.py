"""Data sets as they are read: in-memory tensors by index, samples that name the one that fails, shares of a stream."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from ..errors import ConfigurationError
from ..state.random import SeededRandomness, derive_seed


def is_map_style(dataset: Any) -> bool:
    """Whether samples are had by index and their number is known."""
    return (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, IterableDataset)
    )


def indexable_tensors(dataset: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """Tensors on the CPU that `dataset` consists of, and the indices that it selects (None for all), or None.

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


def is_ready_loader(dataset: Any) -> bool:
    """Whether `dataset` is a loader: torch's, or one that says which `batch_size` its batches have."""
    is_like_one = (
        hasattr(dataset, "batch_size")
        and hasattr(dataset, "__iter__")
        and not hasattr(dataset, "__getitem__")
    )
    return isinstance(dataset, DataLoader) or is_like_one
