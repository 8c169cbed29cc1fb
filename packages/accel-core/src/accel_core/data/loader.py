"""Chooses the kind of data for a loader, and gives this process its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ..errors import ConfigurationError
from ..processes.group import DataGroup
from .counted_batches import CountedBatch
from .devices import move_to_device
from .iterable import IterableSource
from .map_style import MapStyleSource
from .order import SAMPLERS_THAT_DRAW
from .own_share import OwnShareSource
from .parts import announce_epoch
from .readers import name_of_data, unwrapped
from .ready_batches import ReadyBatchesSource
from .shares import check_samplers_cover_data
from .source import Source
from .waiting import WaitingReport

SOURCES: list[type[Source]] = [MapStyleSource, IterableSource, ReadyBatchesSource]
"""The kinds of data; the first whose `accepts(loader)` is true is chosen. The last one accepts everything."""

RANDOM_NUMBERS_OF_WORKERS = (
    "Random numbers that the data set draws in workers will differ. To repeat them, pass "
    "seed_each_sample=True to train."
)


class ShardedDataLoader:
    """The batches of this process, on its device; built from a loader that was made for a single process.

    `source` is the kind of data that was chosen; everything that depends on the kind is asked of it.
    """

    def __init__(
        self,
        loader: Any,
        seed: int,
        device: torch.device,
        group: DataGroup,
        seed_each_sample: bool = False,
        data_is_sharded: bool = False,
    ) -> None:
        """Choose the kind of `loader`; nothing is read before the first epoch. Every process takes part.

        Args:
            seed: of the order of the data.
            group: the processes that share the data.
            seed_each_sample: seed python, numpy and torch before each sample of map-style data is read.
            data_is_sharded: this process brings its own share of the data, and reads all of it.

        Raises:
            ConfigurationError: the loader shards its data already.
        """
        self.loader = loader
        self.dataset = getattr(loader, "dataset", loader)
        self.seed = seed
        self.device = device
        self.group = group
        # Nothing else asks which kind of data it is.
        kind = next(kind for kind in SOURCES if kind.accepts(loader))
        self.data_is_sharded = data_is_sharded
        self.source: Source
        if data_is_sharded:
            self.source = OwnShareSource(kind(loader, seed, DataGroup(), seed_each_sample), group)
        else:
            check_samplers_cover_data(loader)
            self.source = kind(loader, seed, group, seed_each_sample)
        self.has_own_collate = not (isinstance(loader, DataLoader) and loader.collate_fn is default_collate)
        """Something other than torch's `default_collate` joins the samples, and may drop some."""
        self.batch_size = self.source.batch_size
        """Samples in a full batch of one process, or None if that is not known."""
        self.max_steps: int | None = None
        """Steps after which an epoch ends early."""
        self.max_intermediate_steps: int | None = None
        """The same for an evaluation in the middle of an epoch."""
        self.repeat_first_epoch = False
        """The same batches in every epoch."""
        self.log: Callable[[str], object] = _ignore
        """Is given sentences about what takes long."""
        self.seconds_waited = 0.0
        """Time that the loop has waited for batches."""
        self.waiting = WaitingReport()
        """Looks at this time; that of training data reports it once."""
        self.samples_given: int | None = None
        """Samples that were joined to the batch read last, if counted there; None if not known."""
        self.batches_left_out = 0
        """Batches of the epoch begun that were None, as collate functions return it for bad samples."""
        self._position = 0
        self._epoch = 0
        self._told: set[int] = set()

    def __repr__(self) -> str:
        return f"ShardedDataLoader({type(self.source).__name__} of {name_of_data(self.dataset)})"

    # ------------------------------------------------------------------ lengths

    @property
    def is_sized(self) -> bool:
        """Whether the steps of an epoch and the samples of each are planned beforehand."""
        return self.source.is_sized

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all processes, or None if that is not known."""
        return self.source.num_samples

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch, the same on every process; of iterable data by its `__len__`.

        None if that is not known.
        """
        steps = self.source.num_steps
        if steps is None or self.max_steps is None:
            return steps
        return min(steps, self.max_steps)

    @property
    def has_certain_length(self) -> bool:
        """Whether an epoch has exactly `num_steps` steps.

        Two and more workers may divide iterable data into other batches than its `__len__` says, or read all
        of it each.
        """
        if self.is_sized or self.num_steps is None:
            return self.is_sized
        is_iterable = isinstance(unwrapped(self.dataset), IterableDataset)
        return not is_iterable or getattr(self.loader, "num_workers", 0) < 2

    @property
    def step_size(self) -> int:
        """Samples of a full step on all processes; batches if their size is not known."""
        return (self.batch_size or 1) * self.group.size

    @property
    def steps_before(self) -> int:
        """Steps of the epoch begun that lie before its position."""
        return -(-self._position // self.step_size)

    def take_size(self) -> int | None:
        """Return the samples of the next batch, if this kind of data knows them only when it is read."""
        sizes = getattr(self.source, "live_sizes", None)
        return sizes.popleft() if sizes else None

    def __len__(self) -> int:
        """Return the steps of an epoch. Raises `TypeError` if they are not known."""
        if self.num_steps is None:
            raise TypeError(
                f"The number of batches of {type(self.dataset).__name__} is not known: it has no __len__. "
                "Give it one that counts its samples."
            )
        return self.num_steps

    # ------------------------------------------------------------------ an epoch

    def begin_epoch(self, epoch: int, position: int = 0, max_steps: int | None = None) -> None:
        """Go to the sample `position` (counted over all processes) of `epoch` (from 0).

        Whatever has `set_epoch` is told, at any depth of the data and its samplers. Data without an index is
        read up to the position. The epoch ends after `max_steps`, counted from its beginning.
        """
        self._position = position
        self.batches_left_out = 0
        self._epoch = 0 if self.repeat_first_epoch else epoch
        # Workers start later, with a copy of the data that knows the epoch.
        self._told = announce_epoch(self.loader, self._epoch)
        self.source.begin_epoch(self._epoch, position, max_steps)

    def use_order(self, version: int) -> None:
        """Read map-style data in the order of a `version` of accel's: a run keeps that of its beginning."""
        if isinstance(self.source, MapStyleSource):
            self.source.sampler.order.version = version

    def announce_epoch_after(self, other: ShardedDataLoader) -> None:
        """Tell the data its epoch once more if it shares parts with `other`, which were told another one."""
        if self._told & other._told:
            announce_epoch(self.loader, self._epoch)

    def plan(self) -> Sequence[tuple[int, int]] | None:
        """Return the samples on all processes and on this one for each step of the epoch begun.

        None if that is not known.
        """
        plan = self.source.plan()
        # An epoch without a step has no loss to record.
        if plan is not None and not plan:
            self.check_not_empty()
        return plan

    def check_not_empty(self) -> None:
        """Raise for an epoch without a batch, unless it was begun behind its first sample."""
        # A run that resumes at the very end of an epoch has had its batches before.
        if self._position == 0:
            raise ConfigurationError(
                f"The data, a {name_of_data(self.dataset)}, gave no batch: it is empty, smaller than a "
                "batch of all processes with drop_last=True, or was read to its end before. Pass more "
                "data, leave drop_last out, or pass an object whose __iter__ begins again."
            )

    def __iter__(self) -> Iterator[Any]:
        # The plain iterator of the source, so that a step costs no call more.
        batches = self.source.read(self.log)
        if self.may_leave_out_batches:
            batches = self._count(batches)
        if self.device.type == "cpu":
            return batches
        # With workers torch has pinned the batches, in a thread of its own.
        pins = getattr(self.loader, "pin_memory", False) and not self.has_workers
        return (move_to_device(batch, self.device, pins) for batch in batches)

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            is_counted = type(batch) is CountedBatch
            self.samples_given = batch.num_samples if is_counted else None
            yield batch.batch if is_counted else batch

    @property
    def plan_counts_samples(self) -> bool:
        """Whether the plan has the samples of each batch, and default collation joins just these."""
        return self.is_sized and not self.has_own_collate and self.loader.batch_sampler is not None

    @property
    def may_leave_out_batches(self) -> bool:
        """Whether a batch may be None: torch's `default_collate` never makes one."""
        return self.has_own_collate or not self.is_sized

    @property
    def may_lack_batches(self) -> bool:
        """Whether a process may be without a batch in some step of the epoch begun."""
        return self.source.may_lack_batches

    def check_order(self) -> None:
        """Raise if the data is shuffled: nobody could tell which output belongs to which sample."""
        sampler = getattr(self.loader, "sampler", None)
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        for each in (sampler, getattr(batch_sampler, "sampler", None)):
            if type(each) in SAMPLERS_THAT_DRAW:
                raise ConfigurationError(
                    f"predict was given data that a {type(each).__name__} shuffles, so its outputs would not "
                    "be in the order of the data. Pass the data set itself, or a loader with shuffle=False."
                )

    def close(self) -> None:
        """End the workers, but for those of a loader of the user's own."""
        self.source.close()

    # ------------------------------------------------------------------ resuming

    @property
    def source_state(self) -> Any | None:
        """What a training state keeps of this process's data; None if the position is enough."""
        return self.source.state

    def restore_source(self, state: Any) -> None:
        """Put the data itself at its saved position in the epoch begun, so that nothing is read again."""
        self.source.restore(state)

    def limits_of_exactness(
        self, saved_position: int, saved_num_processes: int, seed_each_sample: bool
    ) -> list[str]:
        """Return sentences about the data in which a resumed run may differ from an unbroken one."""
        sentences = self.source.limits_of_exactness(saved_position, saved_num_processes)
        if self.has_workers and not seed_each_sample:
            sentences.append(RANDOM_NUMBERS_OF_WORKERS)
        return sentences

    # ------------------------------------------------------------------ the user's settings

    @property
    def has_workers(self) -> bool:
        """Whether workers of a torch loader read the data."""
        return bool(getattr(self.loader, "num_workers", 0))


def _ignore(sentence: str) -> None:
    pass
