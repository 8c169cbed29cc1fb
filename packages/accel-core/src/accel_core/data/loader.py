"""The batches of one process: its share of a loader that was made for a single one."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..errors import ConfigurationError
from ..state.random import SeededRandomness, derive_seed
from .batch_sampler import ShardedBatchSampler, split_batch_sampler
from .defaults import is_plain_loader
from .iterable import ShardedIterable
from .order import EpochOrder
from .readers import IndexedTensors, SampleReader, SeededSampleReader, indexable_tensors
from .workers import start_worker

SECONDS_BETWEEN_LINES = 10.0


class ShardedDataLoader:
    """The batches of this process, on its device; built from a loader that was made for a single process.

    Map-style data of a torch `DataLoader` is read in the order of `data_order`. Everything else is a stream:
    its samples, or the batches of a loader of another kind, are dealt out in turn.
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
        self.batch_size: int | None = getattr(loader, "batch_size", None)
        """Samples in a full batch of one process, or None if that is not known."""
        self.sampler: ShardedBatchSampler | None = None
        self.state_before_batch: Any = None
        """Of a stream with a `state_dict`: its state before the batch that was fetched last."""
        self.max_steps: int | None = None
        """Steps after which an epoch ends early."""
        self.max_intermediate_steps: int | None = None
        """The same for an evaluation in the middle of an epoch."""
        self.repeat_first_epoch = False
        """The same batches in every epoch."""
        self.deals_batches = False
        """Every process iterates the whole loader and keeps every W-th batch."""
        self.seconds_waited = 0.0
        """Seconds that steps have waited for a batch since the loader was made; the loop adds to it."""
        self.torch_loader: Any = loader
        self.tell: Callable[[str], object] = _identity
        """Is given sentences on what takes long."""
        self._generator = torch.Generator()
        self._epoch = self._skip = self._skip_of_step = 0
        self._most: int | None = None
        self._is_restored = self._is_at_end = False
        is_plain, is_stream = is_plain_loader(loader), isinstance(self.dataset, IterableDataset)
        if is_plain and not is_stream and hasattr(_sampler_of(loader)[0], "__len__"):
            self._shard_samples(loader, seed_each_sample)
        elif is_plain and is_stream and loader.batch_size:
            step = (loader.batch_size, num_processes, process_index, loader.drop_last)
            # Workers may look at the data set, and divide it among themselves.
            dataset = (
                loader.dataset
                if loader.num_workers and num_processes == 1
                else ShardedIterable(loader.dataset, step)
            )
            self.torch_loader = self._rebuild(
                loader, dataset, batch_size=loader.batch_size, drop_last=loader.drop_last
            )
        else:
            self.deals_batches = num_processes > 1

    def _shard_samples(self, loader: Any, seed_each_sample: bool) -> None:
        sampler, batch_size, drop_last = _sampler_of(loader)
        if getattr(sampler, "num_replicas", 1) > 1:
            raise ConfigurationError(
                f"The sampler is a {type(sampler).__name__}, which shares out the data itself, as accel does "
                "too. Pass the data set alone, or a sampler over all of it."
            )
        tensors = (
            indexable_tensors(loader.dataset)
            if loader.collate_fn is default_collate and not loader.num_workers
            else None
        )
        dataset: Any = (
            SeededSampleReader(loader.dataset, self.seed)
            if seed_each_sample
            else SampleReader(loader.dataset)
        )
        convert: Any = _with_epoch if seed_each_sample else None
        changed = {"collate_fn": loader.collate_fn}
        kind = "batch_sampler"
        self.batch_size = batch_size
        if loader.batch_sampler is None:
            # With batch_size=None each "sample" of the data set is a ready batch.
            convert = _first_with_epoch if seed_each_sample else _first
            kind, batch_size, changed = "sampler", 1, {"batch_size": None, **changed}
        elif tensors is not None:
            dataset, convert, changed = IndexedTensors(*tensors), None, {"collate_fn": _identity}
        order = EpochOrder(sampler, self.seed)
        place = (self.num_processes, self.process_index)
        in_tensors = type(dataset) is IndexedTensors
        self.sampler = ShardedBatchSampler(order, batch_size, drop_last, *place, convert, in_tensors)
        self.torch_loader = self._rebuild(loader, dataset, **changed, **{kind: self.sampler})

    def _rebuild(self, loader: Any, dataset: Any, **changed: Any) -> DataLoader[Any]:
        kept = ["num_workers", "collate_fn", "pin_memory", "timeout", "multiprocessing_context"]
        if loader.num_workers:
            kept += ["prefetch_factor", "persistent_workers"]
            changed["worker_init_fn"] = functools.partial(start_worker, loader.worker_init_fn)
        kept += ["in_order"] if hasattr(loader, "in_order") else []
        kwargs = {name: getattr(loader, name) for name in kept}
        # A generator of its own, because a loader without one draws from the global random state at each
        # iter().
        return DataLoader(dataset, **{**kwargs, **changed}, generator=self._generator)

    @property
    def is_sized(self) -> bool:
        """Whether the steps of an epoch and the samples of each are planned beforehand."""
        return self.sampler is not None

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all processes, or None if that is not known."""
        return (
            len(self.sampler.order)
            if self.sampler is not None and self.sampler.batch_size is not None
            else None
        )

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch, the same on every process; of a stream by what its `__len__` says.

        None if that is not known.
        """
        if self.sampler is not None:
            num_items, step_size, drop_last = (
                len(self.sampler.order),
                self.sampler.step_size,
                self.sampler.drop_last,
            )
        else:
            # A stream of samples has the length of its data; any other loader says how many batches it has.
            is_stream = self.torch_loader is not self.loader
            source = getattr(self.dataset, "iterable", self.dataset) if is_stream else self.loader
            try:
                num_items = len(source)
            except (TypeError, NotImplementedError):
                return None
            step_size = ((self.batch_size or 1) if is_stream else 1) * self.num_processes
            drop_last = is_stream and self.loader.drop_last
        steps = num_items // step_size if drop_last else -(-num_items // step_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def __len__(self) -> int:
        """Steps of an epoch. Raises `TypeError` if they are not known."""
        if self.num_steps is None:
            raise TypeError(f"The number of batches of {type(self.dataset).__name__} is not known.")
        return self.num_steps

    def plan(self) -> list[tuple[int, int]] | None:
        """Samples on all processes and on this one for each step of the epoch begun, or None if that is not known."""
        plan = None if self.sampler is None else list(self.sampler.plan())
        if plan == []:
            self.check_not_empty()
        return plan

    @property
    def step_size(self) -> int:
        """Samples of a full step on all processes; batches where their size is not known."""
        return (self.batch_size or 1) * self.num_processes

    def begin_epoch(self, epoch: int, position: int = 0, max_steps: int | None = None) -> None:
        """Go to the sample `position` (counted over all processes) of `epoch` (from 0), which a stream reads up to there.

        The epoch ends after `max_steps`, counted from its beginning.
        """
        self._epoch = epoch = 0 if self.repeat_first_epoch else epoch
        self._generator.manual_seed(derive_seed(self.seed, "workers", epoch, self.process_index))
        self._skip, self._skip_of_step = divmod(position, self.step_size)
        self._most, self._is_restored, self._is_at_end = max_steps, False, False
        if self.sampler is not None:
            self.sampler.max_steps = max_steps
            self.sampler.begin_epoch(epoch, position)
            return
        sources: list[Any] = [
            self.dataset,
            getattr(self.loader, "batch_sampler", None),
            getattr(self.loader, "sampler", None),
        ]
        for source in sources:
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)

    def check_not_empty(self) -> None:
        """Raise for an epoch without a batch, unless it was begun behind its first sample."""
        if self._skip + self._skip_of_step == 0 and (self.sampler is None or not self.sampler.start):
            source = getattr(self.dataset, "iterable", self.dataset)
            raise ConfigurationError(
                f"The data, a {type(source).__name__}, gave no batch: it is empty, smaller than a batch of "
                "all processes with drop_last=True, or was read to its end before. Pass enough data, which "
                "can be read again from its beginning."
            )

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._stream() if self.sampler is None else self.torch_loader)
        if self.device.type == "cpu":
            return batches
        return (send_to_device(batch, self.device, non_blocking=True) for batch in batches)

    def close(self) -> None:
        """End the workers, but for those of a loader of the user's own."""
        iterator: Any = getattr(self.torch_loader, "_iterator", None)
        if self.torch_loader is not self.loader and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self.torch_loader = None

    @property
    def stateful_source(self) -> Any:
        """The loader or data set that saves its own position, or None."""
        for source, works in (
            (self.loader, True),
            (self.dataset, not getattr(self.loader, "num_workers", 0)),
        ):
            if works and hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
                return source
        return None

    def restore_source(self, state: Any) -> None:
        """Put the data itself at its saved place in the epoch begun, so that no batch has to be skipped."""
        self.stateful_source.load_state_dict(state["source"])
        self._skip_of_step, self._is_restored, self._is_at_end = 0, True, state["is_at_end"]

    def _stream(self) -> Iterator[Any]:
        if self._is_at_end:
            return
        start = self._skip if self._is_restored else 0
        most = None if self._most is None else max(self._most - start, 0)
        told_at = time.monotonic()
        for number, batch in enumerate(itertools.islice(self._read_own_batches(), most), start):
            if number >= self._skip:
                yield batch
            elif time.monotonic() > told_at + SECONDS_BETWEEN_LINES:
                told_at = time.monotonic()
                self.tell(f"{number + 1} of {self._skip} batches are read and left out.")

    def _read_own_batches(self) -> Iterator[Any]:
        """This process's batches.

        Who shuffles at the start draws from (seed, epoch), so that all have the same order.
        """
        dealt, own = (self.num_processes, self.process_index) if self.deals_batches else (1, 0)
        source, dataset = self.stateful_source, getattr(self.torch_loader, "dataset", None)
        rest = (
            self._skip_of_step
        )  # Of another batch size or number of processes, before the first whole step.
        if isinstance(dataset, ShardedIterable) and not self.torch_loader.num_workers:
            dataset.num_skipped, rest = rest, 0
        with SeededRandomness(derive_seed(self.seed, "order", self._epoch)):
            batches = iter(self.torch_loader)
            batches = itertools.islice(batches, rest // (self.batch_size or 1), None)
            self._remember_state(source)
            taken = [batch for number, batch in enumerate(itertools.islice(batches, dealt)) if number == own]
        while taken:
            yield taken.pop()
            self._remember_state(source)
            taken = [batch for number, batch in enumerate(itertools.islice(batches, dealt)) if number == own]
        self._remember_state(source, is_at_end=True)

    def _remember_state(self, source: Any, is_at_end: bool = False) -> None:
        # Told apart, since many a source begins anew by itself once it has come to its end.
        if source is not None:
            self.state_before_batch = {"source": copy.deepcopy(source.state_dict()), "is_at_end": is_at_end}


def _sampler_of(loader: Any) -> tuple[Any, int | None, bool]:
    """The sampler, batch size and drop_last of a loader.

    Of ready batches the batch sampler, None and False.
    """
    return split_batch_sampler(loader.sampler if loader.batch_sampler is None else loader.batch_sampler)


def _identity(batch: Any) -> Any:
    return batch


def _first(indices: list[Any], epoch: int) -> Any:
    return indices[0]


def _with_epoch(indices: list[Any], epoch: int) -> tuple[int, list[Any]]:
    """The epoch travels with the indices, since persistent workers never see a changed attribute."""
    return epoch, indices


def _first_with_epoch(indices: list[Any], epoch: int) -> tuple[int, Any]:
    return epoch, indices[0]
