"""Data sets as they are read: tensors in memory by index, single samples, and the shard of an iterable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from ..processes.group import DataGroup
from ..state.random import SeededRandomness, derive_seed
from .content import digest_of
from .order import shard_of


def is_map_style(dataset: Any) -> bool:
    """Whether `dataset` has a length and gives samples by index."""
    return (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, IterableDataset)
    )


def length_of(data: Any) -> int | None:
    """Return the length of `data`, or None if it has none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def indexable_tensors(dataset: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None] | None:
    """Return the tensors on the CPU that `dataset` consists of, and the indices of a subset, or None.

    The indices are None if it has all of the tensors.

    Only for exactly a `TensorDataset`, or `Subset`s of one: a subclass may do anything in `__getitem__`.
    """
    # A Subset of a Subset selects from the selection.
    indices: torch.Tensor | None = None
    while type(dataset) is Subset:
        own = torch.as_tensor(dataset.indices, dtype=torch.int64, device="cpu")
        length = length_of(dataset.dataset)
        if length is not None:
            # Indices from the end are allowed, as in Python.
            own = own.where(own >= 0, own + length)
        indices = own if indices is None else own[indices]
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset or any(tensor.device.type != "cpu" for tensor in dataset.tensors):
        return None
    return dataset.tensors, indices


def is_in_memory(dataset: Any) -> bool:
    """Whether the samples of `dataset` are there already, so that reading one costs nothing."""
    return (
        isinstance(dataset, (list, tuple, torch.Tensor, np.ndarray)) or indexable_tensors(dataset) is not None
    )


class IndexedTensors(Dataset[Any]):
    """Batches of tensors in memory by one `index_select` each, instead of sample by sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.tensors: tuple[torch.Tensor, ...] | None = None
        self.indices: torch.Tensor | None = None
        self.renew()

    def renew(self) -> None:
        """Take the tensors and indices that the data set has now: callbacks may exchange them."""
        self.tensors, self.indices = indexable_tensors(self.dataset) or (None, None)

    def __getitems__(self, indices: torch.Tensor) -> Any:
        if self.tensors is None:
            # They have been moved to a device since.
            return default_collate([self.dataset[index] for index in indices.tolist()])
        if self.indices is not None:
            indices = self.indices.index_select(0, indices)
        return [tensor.index_select(0, indices) for tensor in self.tensors]


class SampleReader(Dataset[Any]):
    """Reads samples of a map-style data set; what the data set raises gets a note on the sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # Data sets such as those of Hugging Face read a whole batch at once, which is much faster.
        self.read_batch = getattr(dataset, "__getitems__", None)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            self._note_sample_on(error, f"the sample {index}", f"dataset[{index}]")
            raise

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        dataset = self.dataset
        index: Any = None
        try:
            if self.read_batch is not None:
                return self.read_batch(indices)  # type: ignore[no-any-return]
            # The last index stays in `index`: no sample has to be read again to find the one that failed.
            return [dataset[index := each] for each in indices]
        except Exception as error:
            if self.read_batch is not None:
                self._note_sample_on(error, f"the samples {indices}", f"dataset.__getitems__({indices})")
            else:
                self._note_sample_on(error, f"the sample {index}", f"dataset[{index}]")
            raise

    def _note_sample_on(self, error: Exception, what: str, way_out: str) -> None:
        """Add what was read to `error`, which stays the user's own; a worker sends it in the traceback."""
        num_samples = length_of(self.dataset)
        length = "" if num_samples is None else f" with the length {num_samples}"
        note = (
            f"accel was reading {what} of a {type(self.dataset).__name__}{length}. Try {way_out} on its own; "
            "each index from 0 to the length - 1, or each that the sampler gives, must work."
        )
        # A data set may raise one object again and again.
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


class SeededSampleReader(SampleReader):
    """Reads each sample with python, numpy and torch seeded for it.

    It is asked for the epoch together with the index.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        # Not the process, nor the worker: the sample is the same whoever reads it.
        with SeededRandomness(derive_seed(self.seed, "sample", epoch, index)):
            return super().__getitem__(index)

    def __getitems__(self, key: tuple[int, list[Any]]) -> list[Any]:  # type: ignore[override]
        epoch, indices = key
        return [self[epoch, index] for index in indices]


class First(NamedTuple):
    """What a process has first in an epoch, with a digest of the first item of the data."""

    value: Any
    digest: bytes | None


def collate_with_first(collate_fn: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    """Join samples; a batch with the first one keeps its digest, which may come from a worker."""
    if not isinstance(samples[0], First):
        return collate_fn(samples)
    first = samples[0]
    return First(collate_fn([first.value, *samples[1:]]), first.digest)


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
        # All processes read all samples: nothing else tells them what the others have.
        samples = itertools.islice(self.iterable, self.num_skipped, None)
        if self.group.is_single:
            yield from samples
            return
        step_size = self.batch_size * self.group.size
        digest: bytes | None = None
        is_first = True
        while step := list(itertools.islice(samples, step_size)):
            # With drop_last an incomplete step is dropped on all processes, so that they stay in step.
            if len(step) == step_size or not self.drop_last:
                digest = digest_of(step[0]) if is_first else None
                for sample in step[shard_of(len(step), self.group)]:
                    yield First(sample, digest) if is_first else sample
                    is_first = False


def unwrapped(dataset: Any) -> Any:
    """Return what the user passed: the iterable in a `ShardedIterable`, or `dataset` itself."""
    return dataset.iterable if isinstance(dataset, ShardedIterable) else dataset


def name_of_data(dataset: Any) -> str:
    """Return the class of what the user passed, for messages."""
    return type(unwrapped(dataset)).__name__


KNOWN_LOADERS = (("webdataset", "WebLoader"), ("torchdata", "Loader"), ("timm", "PrefetchLoader"))
"""Packages and classes of loaders that nothing else tells from data sets."""


def is_ready_loader(dataset: Any, dataloader_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the items of `dataset` are ready batches.

    They are if it is a `DataLoader`, a loader that is known by its name, or can only be iterated and is no
    data set of torch's. A `batch_size` in the `dataloader_kwargs` asks for batches of its items all the same.
    """
    if isinstance(dataset, DataLoader):
        return True
    if dataloader_kwargs and dataloader_kwargs.get("batch_size") is not None:
        return False
    names = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(dataset).__mro__]
    if any(name in KNOWN_LOADERS for name in names):
        return True
    is_iterable = hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    return is_iterable and not isinstance(dataset, Dataset)
