"""Data loaders of one process: defaults, sharing out, batches of in-memory tensors by index, seeding of samples."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from .data_order import EpochOrder, ShardedBatchSampler, derive_seed, split_batch_sampler
from .errors import ConfigurationError

MOST_WORKERS = 8


def is_map_style(dataset: Any) -> bool:
    """Whether samples are had by index and their number is known."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


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


def default_num_workers(dataset: Any, num_local_processes: int) -> int:
    """Cores that this process may use over the processes of this machine, at most 8.

    0 for what is in memory, for iterable data, which each worker would repeat, and where workers are not forked.
    """
    in_memory = isinstance(dataset, (list, tuple, torch.Tensor)) or indexable_tensors(dataset) is not None
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if in_memory or not is_map_style(dataset) or method != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores // num_local_processes, MOST_WORKERS)


def default_dataloader_kwargs(dataset: Any, batch_size: int, shuffle: bool, accelerator: Accelerator) -> dict[str, Any]:
    """Arguments of a `DataLoader` over `dataset` where the user says nothing."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return {
        "batch_size": batch_size,
        "shuffle": shuffle,
        "num_workers": default_num_workers(dataset, num_local_processes),
        "pin_memory": accelerator.device.type == "cuda",
    }


def create_dataloader(dataset: Any, defaults: dict[str, Any], own: dict[str, Any] | None, collate_fn: Any) -> DataLoader[Any]:
    """A torch `DataLoader` over `dataset`; what the user gives wins over `defaults`. A ready one is returned as it is."""
    if isinstance(dataset, DataLoader) or (is_ready_loader(dataset)):
        return dataset  # type: ignore[no-any-return]
    kwargs = {**defaults, **({"collate_fn": collate_fn} if collate_fn is not None else {}), **(own or {})}
    if not is_map_style(dataset):
        kwargs.pop("shuffle", None)
        dataset = dataset if isinstance(dataset, IterableDataset) else Stream(dataset)
    for given, replaced in (
        ("sampler", ["shuffle"]),
        ("batch_sampler", ["shuffle", "batch_size", "drop_last", "sampler"]),
    ):
        if kwargs.get(given) is not None:
            kwargs = {key: value for key, value in kwargs.items() if key not in replaced or key in (own or {})}
    if kwargs.get("batch_sampler") is not None and "batch_size" not in (own or {}):
        kwargs.pop("batch_size", None)
    kwargs.setdefault("persistent_workers", kwargs.get("num_workers", 0) > 0)
    return DataLoader(dataset, **kwargs)


def is_ready_loader(dataset: Any) -> bool:
    """Whether `dataset` is a loader of another kind than torch's: it says which `batch_size` its batches have."""
    return hasattr(dataset, "batch_size") and hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


class Stream(IterableDataset[Any]):
    """Any iterable as an `IterableDataset`, of which a process keeps its part of each global step."""

    def __init__(self, iterable: Iterable[Any], step: tuple[int, int, int, bool] | None = None) -> None:
        self.iterable = iterable
        self.step = step
        """Batch size, number of processes, index of this process, drop_last; None to keep everything."""

    def __iter__(self) -> Iterator[Any]:
        if self.step is None:
            yield from self.iterable
            return
        batch_size, num_processes, process_index, drop_last = self.step
        samples = iter(self.iterable)
        while chunk := list(itertools.islice(samples, batch_size * num_processes)):
            if len(chunk) == batch_size * num_processes:
                yield from chunk[process_index * batch_size : (process_index + 1) * batch_size]
            elif not drop_last:
                size, extra = divmod(len(chunk), num_processes)
                start = process_index * size + min(process_index, extra)
                yield from chunk[start : start + size + (process_index < extra)]


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
    """Reads samples of a map-style data set, naming the one that fails; optionally seeds random numbers for each."""

    def __init__(self, dataset: Any, seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        epoch, index = key
        try:
            if self.seed is None:
                return self.dataset[index]
            with SeededRandomness(derive_seed(self.seed, "sample", epoch, index)):
                return self.dataset[index]
        except Exception as error:
            raise self._failure(index, error) from error

    def __getitems__(self, keys: list[tuple[int, Any]]) -> list[Any]:
        if self.seed is None and getattr(self.dataset, "__getitems__", None):
            indices = [index for _, index in keys]
            try:
                return self.dataset.__getitems__(indices)  # type: ignore[no-any-return]
            except Exception as error:
                raise self._failure(indices, error) from error
        return [self[key] for key in keys]

    def _failure(self, index: Any, error: Exception) -> ConfigurationError:
        name, length = type(self.dataset).__name__, len(self.dataset)
        return ConfigurationError(
            f"Reading the sample {index} of a {name} with the length {length} failed with {type(error).__name__}: {error}. Try "
            f"dataset[{index}] by itself, and see that every index from 0 to {length - 1} works."
        )


class SeededRandomness:
    """Within it python, numpy and torch draw from `seed`; in the main process their state is put back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = None
        if get_worker_info() is None:
            self.before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            random.setstate(self.before[0])
            np.random.set_state(self.before[1])
            torch.set_rng_state(self.before[2])


class ShardedDataLoader:
    """The batches of this process, on its device; built from a loader that was made for a single process.

    Map-style data of a plain torch `DataLoader` is read in the order of `data_order`. Everything else is a stream: its
    samples, or the batches of a loader of another kind, are dealt out in turn.
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        device: torch.device,
        num_processes: int,
        process_index: int,
        seed_each_sample: bool,
    ) -> None:
        self.loader = loader
        self.dataset = getattr(loader, "dataset", loader)
        self.device = device
        self.num_processes = num_processes
        self.process_index = process_index
        self.seed = seed
        self.sampler: ShardedBatchSampler | None = None
        self.state_before_batch: Any = None
        """Of a stream with a `state_dict`: its state before the batch that was fetched last."""
        self._generator = torch.Generator()
        self._skip = 0
        self.max_steps: int | None = None
        """Steps after which an epoch ends early."""
        self.max_intermediate_steps: int | None = None
        """The same for an evaluation in the middle of an epoch."""
        self.repeat_first_epoch = False
        """The same batches in every epoch."""
        own = type(loader) is DataLoader
        if own and loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            self._shard_samples(loader, seed_each_sample)
        elif own and isinstance(loader.dataset, IterableDataset) and num_processes > 1 and loader.batch_size:
            step = (loader.batch_size, num_processes, process_index, loader.drop_last)
            self.torch_loader: Any = self._rebuild(loader, Stream(loader.dataset, step), batch_size=loader.batch_size)
        elif own and isinstance(loader.dataset, IterableDataset):
            self.torch_loader = self._rebuild(loader, loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last)
        else:
            self.torch_loader = loader
        self.deals_batches = not own and num_processes > 1
        """Every process iterates the whole loader and keeps every W-th batch."""

    def _shard_samples(self, loader: Any, seed_each_sample: bool) -> None:
        sampler, batch_size, drop_last = split_batch_sampler(loader.batch_sampler)
        if getattr(sampler, "num_replicas", 1) > 1:
            raise ConfigurationError(
                f"The sampler is a {type(sampler).__name__}, which shares out the data itself, as accel does too. Pass the data "
                f"set alone, or a sampler over all of it."
            )
        tensors = indexable_tensors(loader.dataset) if loader.collate_fn is default_collate and not loader.num_workers else None
        dataset: Any
        convert: Any
        if tensors is not None:
            dataset, convert, collate_fn = IndexedTensors(*tensors), _as_tensor, _identity
        else:
            dataset = SampleReader(loader.dataset, self.seed if seed_each_sample else None)
            convert, collate_fn = _with_epoch, loader.collate_fn
        self.sampler = ShardedBatchSampler(
            EpochOrder(sampler, self.seed), batch_size, drop_last, self.num_processes, self.process_index, convert
        )
        self.torch_loader = self._rebuild(loader, dataset, batch_sampler=self.sampler, collate_fn=collate_fn)

    def _rebuild(self, loader: Any, dataset: Any, **changed: Any) -> DataLoader[Any]:
        kept = ["num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context"]
        if loader.num_workers:
            kept += ["prefetch_factor", "persistent_workers"]
        kwargs = {name: getattr(loader, name) for name in kept}
        # A generator of its own, because a loader without one draws from the global random state at each iter().
        return DataLoader(dataset, **{**kwargs, **changed}, generator=self._generator)

    @property
    def is_sized(self) -> bool:
        """Whether the steps of an epoch are known beforehand."""
        return self.sampler is not None

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all processes, or None if that is not known."""
        return len(self.sampler.order) if self.sampler is not None and self.sampler.batch_size is not None else None

    def __len__(self) -> int:
        """Steps of an epoch, the same on every process. Raises `TypeError` if they are not known."""
        if self.sampler is None:
            raise TypeError(f"The number of batches of {type(self.dataset).__name__} is not known.")
        steps, rest = divmod(len(self.sampler.order), self.sampler.step_size)
        steps += bool(rest) and not self.sampler.drop_last
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch of one process, or None if that is not known."""
        return self.sampler.batch_size if self.sampler is not None else getattr(self.loader, "batch_size", None)

    def plan(self) -> list[tuple[int, int]] | None:
        """Samples on all processes and on this one for each step of the epoch begun, or None if that is not known."""
        return None if self.sampler is None else list(self.sampler.plan())

    def begin_epoch(self, epoch: int, position: int = 0, steps: int = 0, max_steps: int | None = None) -> None:
        """Go to the sample `position` of `epoch` (from 0); a stream skips the first `steps` batches of this process.

        The epoch ends after `max_steps`, counted from its beginning.
        """
        epoch = 0 if self.repeat_first_epoch else epoch
        self._generator.manual_seed(derive_seed(self.seed, "workers", epoch, self.process_index))
        self._skip, self._most = steps, max_steps
        if self.sampler is not None:
            self.sampler.max_steps = max_steps
            self.sampler.begin_epoch(epoch, position)
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._stream() if self.sampler is None else self.torch_loader)
        if self.device.type == "cpu":
            return batches
        return (send_to_device(batch, self.device, non_blocking=True) for batch in batches)

    def close(self) -> None:
        """Let go of the workers."""
        self.torch_loader = None

    @property
    def stateful_source(self) -> Any:
        """The loader or data set that saves its own position, or None."""
        for source, works in ((self.loader, True), (self.dataset, not getattr(self.loader, "num_workers", 0))):
            if works and hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
                return source
        return None

    def _stream(self) -> Iterator[Any]:
        source = self.stateful_source
        batches = iter(self.torch_loader)
        if self.deals_batches:
            batches = itertools.islice(batches, self.process_index, None, self.num_processes)
        for number in itertools.count():
            if self._most is not None and number >= self._most:
                return
            if source is not None:
                self.state_before_batch = copy.deepcopy(source.state_dict())
            try:
                batch = next(batches)
            except StopIteration:
                return
            if number >= self._skip:
                yield batch


def _identity(batch: Any) -> Any:
    return batch


def _as_tensor(indices: Any, epoch: int) -> torch.Tensor:
    return torch.as_tensor(indices, dtype=torch.int64)


def _with_epoch(indices: Any, epoch: int) -> list[tuple[int, Any]]:
    """The epoch travels with the index, since persistent workers never see a changed attribute."""
    return [(epoch, index) for index in (indices.tolist() if isinstance(indices, torch.Tensor) else indices)]
