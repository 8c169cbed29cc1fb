"""Which sample comes when: a function of (seed, epoch), shared out over the processes.

The global step k of an epoch takes the samples [k·B·W, (k+1)·B·W) of the order, B being the batch size of one
process and W the number of processes; each process takes its slice. What is left at the end is dealt out so
that as many processes as possible have some. The position in an epoch is a number of samples, so another B or
W goes on with the next sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from ..processes.collectives import broadcast_object, is_distributed
from ..state.random import derive_seed


def random_order(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of `range(num_samples)`, int64, that is a function of its arguments alone."""
    return torch.randperm(
        num_samples, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    )


def share_of(num_items: int, num_processes: int, process_index: int) -> slice:
    """The contiguous part of `num_items` that falls to a process.

    Sizes differ by one at most, the first have more.
    """
    size, extra = divmod(num_items, num_processes)
    start = process_index * size + min(process_index, extra)
    return slice(start, start + size + (process_index < extra))


class EpochOrder:
    """The order of the samples of an epoch, from a sampler or from (seed, epoch)."""

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def of_epoch(self, epoch: int) -> Sequence[Any] | torch.Tensor | np.ndarray[Any, Any]:
        """Indices in the order of `epoch` (from 0), the same on every process."""
        sampler: Any = self.sampler
        if type(sampler) is SequentialSampler:
            return np.arange(len(sampler))
        if (
            type(sampler) is RandomSampler
            and not sampler.replacement
            and len(sampler) == len(sampler.data_source)
        ):
            return random_order(len(sampler), self.seed, epoch)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if type(sampler) in (RandomSampler, WeightedRandomSampler, SubsetRandomSampler):
            own = sampler.generator
            sampler.generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
            try:
                return list(sampler)
            finally:
                sampler.generator = own
        # Another's sampler may draw random numbers of its own, so only the main process's order counts.
        return broadcast_object(list(sampler)) if is_distributed() else list(sampler)

    @property
    def is_function_of_epoch(self) -> bool:
        """Whether the order of an epoch can be had again after a restart."""
        known = (SequentialSampler, RandomSampler, WeightedRandomSampler, SubsetRandomSampler)
        return type(self.sampler) in known or hasattr(self.sampler, "set_epoch")
