"""Data of which each process brings its own share, of any length: nothing is sharded again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..processes.collectives import all_gather_object
from ..processes.group import DataGroup
from .map_style import MapStyleSource
from .source import Source


class OwnShareSource:
    """The share of this process, of any kind, read as a single process would.

    The processes agree before each step, as for data without a length: one whose share has ended repeats its
    latest batch with weight zero.
    """

    is_sized = False

    def __init__(self, own: Source, group: DataGroup) -> None:
        """Take the data `own` of this process. Every process takes part.

        Args:
            own: built for a group of this process alone.
        """
        self.own = own
        if isinstance(own, MapStyleSource):
            # A step is a batch of each process, whose samples the others do not count.
            own.count_batches()
        self.group = group
        shares = all_gather_object((own.num_samples, own.num_steps)) if not group.is_single else []
        self._lengths = shares or [(own.num_samples, own.num_steps)]

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        """Return False: only the user knows that data is a share."""
        return False

    @property
    def batch_size(self) -> int | None:
        """Samples in a full batch of this process, or None if that is not known."""
        return self.own.batch_size

    @property
    def num_samples(self) -> int | None:
        """Samples of all shares together, or None if one of them does not know."""
        known = [samples for samples, _ in self._lengths if samples is not None]
        return sum(known) if len(known) == len(self._lengths) else None

    @property
    def num_steps(self) -> int | None:
        """Steps of the longest share, or None if one of them does not know."""
        known = [steps for _, steps in self._lengths if steps is not None]
        return max(known) if len(known) == len(self._lengths) else None

    @property
    def may_lack_batches(self) -> bool:
        """Whether there are others: any share may end before theirs."""
        return not self.group.is_single

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        """Go to `position`, of which each process has had its even part in steps."""
        self.own.begin_epoch(epoch, position // self.group.size, max_steps)

    def plan(self) -> None:
        """Return None: the processes ask each other before every step."""
        return None

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        """Return an iterator over the batches of this process's share."""
        return self.own.read(log)

    @property
    def state(self) -> Any | None:
        """What the share itself keeps."""
        return self.own.state

    def restore(self, state: Any) -> None:
        """Continue the share from its state."""
        self.own.restore(state)

    def limits_of_exactness(self, saved_position: int, saved_num_processes: int) -> list[str]:
        """Return those of the share, and that another number of processes has other shares."""
        size = self.group.size
        sentences = self.own.limits_of_exactness(saved_position // size, 1)
        if saved_num_processes != size:
            sentences.append(
                f"Each process reads its own shard (data_is_sharded=True), but {saved_num_processes} "
                f"processes saved the state and {size} continue, so samples of this epoch may come twice or "
                "not at all."
            )
        return sentences

    def close(self) -> None:
        """End the workers."""
        self.own.close()
