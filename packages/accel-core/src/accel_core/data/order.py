"""Which sample comes when: a function of (seed, epoch), sharded over the processes.

What surprises every reader: torch's own samplers are recognised and replaced by the order of accel, not
iterated. `shuffle=True` is a permutation drawn from (seed, epoch); a sampler that draws with weights, from
a subset or with replacement does so from a generator seeded by (seed, epoch), whatever generator it was
made with. Only samplers of the user's own are iterated as they are.

The global step k of an epoch takes the samples [k·B·W, (k+1)·B·W) of the order, B being the batch size of
one process and W the number of processes; each process takes its slice. What is left at the end is divided
so that as many processes as possible have some. The position in an epoch is a number of samples, so another
B or W continues with the next sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from ..processes.collectives import broadcast_object, is_distributed
from ..processes.group import DataGroup
from ..state.random import derive_seed
from .keyed_order import KeyedOrder

# Exactly these classes: a subclass may do anything in __iter__.
SAMPLERS_THAT_DRAW = (RandomSampler, WeightedRandomSampler, SubsetRandomSampler)

ORDER_VERSION = 2
"""Version of the function from seed and epoch to the order of the samples; training states name it.

In version 1 a shuffle of any length is drawn. A run that was begun with it continues with it.
"""

KEYED_FROM = 2**20
"""Samples from which on a shuffle is computed place by place. Fewer are drawn in some 30 ms."""


def random_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return a permutation of `range(num_samples)`, int64, that depends on nothing but its arguments."""
    return torch.randperm(num_samples, generator=_generator_of(seed, epoch), device="cpu")


def shard_of(num_items: int, group: DataGroup) -> slice:
    """Return the contiguous part of `num_items` that falls to this process.

    Sizes differ by one at most, the first processes have more.
    """
    size, extra = divmod(num_items, group.size)
    start = group.index * size + min(group.index, extra)
    return slice(start, start + size + (group.index < extra))


class EpochOrder:
    """The order of the samples of an epoch, from a sampler or from (seed, epoch)."""

    def __init__(self, sampler: Iterable[Any], seed: int, is_shared: bool = True) -> None:
        """Take the order of `sampler`.

        Args:
            is_shared: a sampler of the user's own gives all processes the order of the main one.
        """
        self.sampler = sampler
        self.seed = seed
        self.is_shared = is_shared
        self.version = ORDER_VERSION
        """Another one if the state of a run was saved by an earlier version."""

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def of_epoch(self, epoch: int) -> Sequence[Any] | torch.Tensor | KeyedOrder:
        """Return the indices in the order of `epoch` (from 0), the same on every process.

        Samplers with `set_epoch` have been told the epoch before.
        """
        sampler: Any = self.sampler
        if type(sampler) is SequentialSampler:
            return range(len(sampler))
        if _is_permutation(sampler):
            if self.version > 1 and len(sampler) >= KEYED_FROM:
                return KeyedOrder(len(sampler), derive_seed(self.seed, "order", epoch))
            return random_order(len(sampler), self.seed, epoch)
        if type(sampler) in SAMPLERS_THAT_DRAW:
            # It is put back: the sampler may serve the user elsewhere.
            users_generator = sampler.generator
            sampler.generator = _generator_of(self.seed, epoch)
            try:
                # The generator is on the CPU, whatever the default device is.
                with torch.device("cpu"):
                    return list(sampler)
            finally:
                sampler.generator = users_generator
        # Another's sampler may draw random numbers of its own, so only the main process's order counts.
        return broadcast_object(list(sampler)) if self.is_shared and is_distributed() else list(sampler)

    @property
    def is_users(self) -> bool:
        """Whether a sampler of the user's own gives the order, which may depend on anything."""
        return type(self.sampler) not in (SequentialSampler, *SAMPLERS_THAT_DRAW)

    @property
    def is_function_of_epoch(self) -> bool:
        """Whether an epoch has the same order after a restart."""
        is_torchs = type(self.sampler) in (SequentialSampler, *SAMPLERS_THAT_DRAW)
        return is_torchs or hasattr(self.sampler, "set_epoch")


def _is_permutation(sampler: Any) -> bool:
    """Whether `sampler` is what `shuffle=True` makes: each sample once, in a random order."""
    if type(sampler) is not RandomSampler or sampler.replacement:
        return False
    return len(sampler) == len(sampler.data_source)


def _generator_of(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(derive_seed(seed, "order", epoch))
