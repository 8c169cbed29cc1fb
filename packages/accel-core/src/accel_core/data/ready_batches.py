"""Ready batches, from a loader that iterates in its own way: assigned to the processes round-robin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..processes.group import DataGroup
from .content import digest_of
from .readers import length_of
from .source import SequentialSource
from .workers import Workers


class ReadyBatchesSource(SequentialSource):
    """Every process iterates the whole loader and keeps one batch of each step.

    The loader is used as it is: its batches may be of any size, and its workers are its own.
    """

    def __init__(self, loader: Any, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        super().__init__(loader, seed, group)
        self.workers = Workers()
        # Of a loader of torch's everybody knows that it gives batches.
        self._is_described = isinstance(loader, DataLoader)
        self._log: Callable[[str], object] | None = None

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return True: whatever can be iterated has batches."""
        return True

    @property
    def num_steps(self) -> int | None:
        """Steps by the length of the loader, which counts its batches, or None if it has none."""
        num_batches = length_of(self.loader)
        return None if num_batches is None else -(-num_batches // self.group.size)

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        """Yield the batches; the first time, `log` is told what was taken for a batch."""
        self._log = log
        return super().read(log)

    def open_batches(self) -> Iterator[Any]:
        """Begin to iterate the loader, in whole batches."""
        # A batch cannot be cut, so one that was trained on in part is read again as a whole.
        return itertools.islice(
            self.workers.start(self.loader), self.samples_to_skip // (self.batch_size or 1), None
        )

    def take_step(self, batches: Iterator[Any]) -> list[Any]:
        """Return the batch of this process among the next ones, of which there is one for each process."""
        # The others' batches are dropped one by one, so that no more than one is held.
        taken, digest = [], None
        for number, batch in enumerate(itertools.islice(batches, self.group.size)):
            if number == 0 and not self.is_compared:
                digest = digest_of(batch)
            if number == self.group.index:
                taken.append(batch)
        self.compare_first_items(digest)
        if taken and self._log is not None and not self._is_described:
            self._is_described = True
            self._log(
                f"Each item of the {type(self.loader).__name__} is taken for a ready batch; the first one is "
                f"{describe(taken[0])}. If the items are samples, pass 'batch_size' in the loader arguments."
            )
        return taken


def describe(batch: Any) -> str:
    """Return what a batch consists of, in a few words: types, and the shapes of arrays and tensors."""
    if isinstance(batch, torch.Tensor) or hasattr(batch, "shape"):
        return f"a {type(batch).__name__} of the shape {tuple(batch.shape)}"
    parts = list(batch.items()) if isinstance(batch, Mapping) else None
    if parts is not None:
        inside = ", ".join(f"{name!r}: {describe(part)}" for name, part in parts[:4])
    elif isinstance(batch, (list, tuple)):
        inside = ", ".join(map(describe, batch[:4]))
    else:
        return f"a {type(batch).__name__}"
    more = ", and more" if len(batch) > 4 else ""
    return f"a {type(batch).__name__} of ({inside}{more})"
