"""The protocol of a kind of data, and what the kinds share that are read from their beginning on.

A kind of data is one class in one file, registered in `SOURCES` of loader.py. Units: a *step* is one batch
on each process of the data group; a *position* is a number of samples of the epoch, counted over all
processes.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader

from ..processes.group import DataGroup
from ..state.random import SeededRandomness, derive_seed
from ..text import counted
from .exact_streams import restores_exactly
from .readers import name_of_data, unwrapped
from .shares import compare_first_items

SECONDS_BETWEEN_MESSAGES = 10.0


class Source(Protocol):
    """The batches of this process from one kind of data.

    Every process of the data group builds its own over the whole data and keeps its shard; what is answered
    about steps, lengths and plans is the same on all of them.
    """

    def __init__(self, loader: Any, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        """Build the batches of this process from `loader`, which was made for a single process.

        Args:
            seed: of the order of the data.
            seed_each_sample: seed python, numpy and torch before each sample is read, if this kind can.

        Raises:
            ConfigurationError: the loader is of this kind, but cannot be sharded.
        """

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return whether `loader` is of this kind; the first kind in `SOURCES` that accepts it is chosen."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch of one process, or None if that is not known."""
        ...

    @property
    def is_sized(self) -> bool:
        """Whether `plan` knows the steps of an epoch and the samples of each beforehand."""
        ...

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch on all processes, or None if that is not known."""
        ...

    @property
    def num_steps(self) -> int | None:
        """Steps of an epoch, the same on every process, or None if that is not known."""
        ...

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        """Go to the sample `position` of `epoch` (from 0), which ends after `max_steps` steps in all.

        What has `set_epoch` has been told before. Callbacks may still change the data until it is planned or
        read.
        """

    def plan(self) -> Sequence[tuple[int, int]] | None:
        """Return the samples on all processes and on this one for each step of the epoch begun.

        Returns None if `is_sized` is false: the processes then ask each other before every step.
        """
        ...

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        """Return an iterator over the batches of the epoch begun, on the CPU, from the position on.

        A process without samples in a step gets no batch for it. If it would get none at all in a planned
        epoch, it gets one of the others', to take part with weight zero. `log` is given sentences about
        what takes long.
        """
        ...

    @property
    def may_lack_batches(self) -> bool:
        """Whether a process may be without a batch in some step of the epoch begun."""
        ...

    @property
    def state(self) -> Any | None:
        """Values from which `restore` continues after the batch read last; None if nothing is saved."""
        ...

    def restore(self, state: Any) -> None:
        """Continue the epoch begun from `state`, so that nothing is read again; without one, do nothing."""

    def limits_of_exactness(self, saved_position: int, saved_num_processes: int) -> list[str]:
        """Return sentences on what a run that resumes at `saved_position` cannot promise for this data.

        Workers are the business of the loader: they draw random numbers whatever the kind of data.
        """
        ...

    def close(self) -> None:
        """End the workers that this source has started; a loader of the user's own keeps its own."""


def is_plain_loader(loader: Any) -> bool:
    """Whether `loader` iterates as torch's own `DataLoader` does, whatever its constructor may be.

    Only then may another loader with the same settings replace it.
    """
    if not isinstance(loader, DataLoader):
        return False
    return all(
        getattr(type(loader), name) is getattr(DataLoader, name) for name in ("__iter__", "_get_iterator")
    )


class SequentialSource:
    """Data that is read from its beginning on, in an order of its own, and may end at any time.

    A subclass opens the data in `open_batches` and takes this process's batch of a step in `take_step`.
    """

    is_sized = False
    num_samples = None

    def __init__(self, loader: Any, seed: int, group: DataGroup) -> None:
        self.loader = loader
        self.dataset = getattr(loader, "dataset", loader)
        self.seed = seed
        self.group = group
        self.batch_size: int | None = getattr(loader, "batch_size", None)
        self._kept_state: Any = None
        self._is_open = False
        self._batches: Iterator[Any] = iter(())
        self._peeked: list[Any] | None = None
        """The batch after the latest, if it has been read to save a state."""
        self.samples_to_skip = 0
        """Samples before the first whole step, if the state was saved with another batch size or group."""
        self._epoch = 0
        self._steps_to_skip = 0
        self._max_steps: int | None = None
        self._is_restored = False
        self._is_at_end = False
        self.is_compared = group.is_single
        """Nothing is left to compare with the other processes."""

    @property
    def step_size(self) -> int:
        """Samples of a full step on all processes; batches if their size is not known."""
        return (self.batch_size or 1) * self.group.size

    @property
    def may_lack_batches(self) -> bool:
        """Whether there are others: any process may come to its end before them."""
        return not self.group.is_single

    @property
    def stateful(self) -> Any:
        """The loader or data set that saves its own position and restores it exactly, or None."""
        # Workers read copies of the data set, so its state in this process stands still.
        has_workers = getattr(self.loader, "num_workers", 0)
        candidates = [self.loader] if has_workers else [self.loader, unwrapped(self.dataset)]
        return next(filter(restores_exactly, candidates), None)

    @property
    def state(self) -> Any | None:
        """Values from which `restore` continues after the batch read last, or None.

        The loop has read no further when a state is saved.
        """
        stateful = self.stateful
        if stateful is None or not self._is_open:
            return self._kept_state
        if self._peeked is not None:
            return self._kept_state
        # Copied, since many a state_dict returns the live object, which goes on to change.
        state = copy.deepcopy(stateful.state_dict())
        # From a state alone nobody can tell whether the next batch is of this epoch: many a data set begins
        # again by itself. No update comes before this batch, so it is due.
        self._peeked = self.take_step(self._batches)
        if not self._peeked:
            state = copy.deepcopy(stateful.state_dict())
        self._kept_state = {"source": state, "is_at_end": not self._peeked}
        return self._kept_state

    def open_batches(self) -> Iterator[Any]:
        """Begin to read, leaving out `samples_to_skip`."""
        raise NotImplementedError

    def take_step(self, batches: Iterator[Any]) -> list[Any]:
        """Read the next step and return a list of this process's batch, empty if there is none."""
        raise NotImplementedError

    def compare_first_items(self, digest: bytes | None) -> None:
        """Compare the first item that was read with those of the others, once. Every process takes part.

        Args:
            digest: of the first item; None if there is none, or its content is not known.
        """
        if not self.is_compared:
            self.is_compared = True
            compare_first_items(digest, self.dataset)

    def plan(self) -> None:
        """Return None: what comes is known once it is read."""
        return None

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        """Go to `position`."""
        self._epoch = epoch
        self._steps_to_skip, self.samples_to_skip = divmod(position, self.step_size)
        self._max_steps = max_steps
        self._is_open = False
        self._kept_state = None
        # A training state is restored after the epoch has been begun.
        self._is_restored = False
        self._is_at_end = False

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        """Yield the batches from the position on.

        Those before it are read and left out, unless the data was restored at its position.
        """
        # It was saved after the last batch: reading would begin the next epoch.
        if self._is_at_end:
            return
        first = self._steps_to_skip if self._is_restored else 0
        # An epoch is limited from its beginning, so the steps before the position count.
        most = None if self._max_steps is None else max(self._max_steps - first, 0)
        last_message = time.monotonic()
        for number, batch in enumerate(itertools.islice(self._own_batches(), most), start=first):
            if number >= self._steps_to_skip:
                yield batch
            elif time.monotonic() > last_message + SECONDS_BETWEEN_MESSAGES:
                last_message = time.monotonic()
                log(f"Skipped {number + 1} of {counted(self._steps_to_skip, 'batches')}.")

    def _own_batches(self) -> Iterator[Any]:
        # Data that shuffles at its start draws from (seed, epoch), so that all processes have one order.
        with SeededRandomness(derive_seed(self.seed, "order", self._epoch)):
            batches = self.open_batches()
            taken = self.take_step(batches)
        self._batches, self._peeked = batches, None
        self._is_open = True
        while taken:
            yield taken.pop()  # Popped, so that no batch is held here while the next one is read.
            taken = self.take_step(batches) if self._peeked is None else self._peeked
            self._peeked = None
        self._is_open = False
        stateful = self.stateful
        if stateful is not None:
            self._kept_state = {"source": copy.deepcopy(stateful.state_dict()), "is_at_end": True}

    def restore(self, state: Any) -> None:
        """Put the data itself at its saved position; without a state of its own, it is read up to there."""
        stateful = self.stateful
        if stateful is None:
            return
        stateful.load_state_dict(state["source"])
        self._kept_state = state
        self.samples_to_skip = 0
        self._is_restored = True
        self._is_at_end = state["is_at_end"]

    def limits_of_exactness(self, saved_position: int, saved_num_processes: int) -> list[str]:
        """Return what is read again, what comes twice, and what is drawn again."""
        steps, rest = divmod(saved_position, self.step_size)
        # The state of another process is about another shard.
        has_position = self.stateful is not None and saved_num_processes == self.group.size
        name = name_of_data(self.dataset)
        sentences = []
        if steps and not has_position:
            sentences.append(
                f"Reading and skipping {counted(steps, 'batches')} of {name}, on which the run has trained "
                "already."
            )
        if rest and not has_position and getattr(self.loader, "num_workers", 0):
            sentences.append(
                f"Up to {counted(rest, 'samples')} of {name} may come twice, since workers read whole "
                "batches."
            )
        if steps:
            sentences.append(f"Random numbers that {name} draws while it is read will differ.")
        return sentences

    def close(self) -> None:
        """Leave the loader as it is: it is the user's own."""
