"""Says which processes share the data, and which of them this one is.

They need not be all processes of the job: with tensor parallelism several processes hold one copy of the
model and read the same batches. The loop, the weights of losses, sums, predictions and checkpoints ask this
group.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from accelerate import Accelerator

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class DataGroup:
    """Holds how many processes share the data, and the place of this one among them."""

    size: int = 1
    """Copies of the model, each of which reads a part of the data."""
    index: int = 0
    """Number of this process's copy, counted from 0: its share of the data."""
    processes_per_copy: int = 1
    """Processes that hold one copy together and read the same batches."""
    index_in_copy: int = 0
    """Number of this process among those of its copy, counted from 0."""

    @property
    def num_processes(self) -> int:
        """Number of all processes of the job."""
        return self.size * self.processes_per_copy

    @property
    def process_index(self) -> int:
        """Number of this process among all, counted from 0."""
        return self.index * self.processes_per_copy + self.index_in_copy

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes, once for the whole job."""
        return self.process_index == 0

    @property
    def is_single(self) -> bool:
        """Whether this process reads all the data, as others of its copy may do too."""
        return self.size == 1

    @property
    def is_only_process(self) -> bool:
        """Whether there is no other process, for the same data or for another share."""
        return self.num_processes == 1

    def one_of_each_copy(self, by_process: list[T]) -> list[T]:
        """Return what one process of each copy has given, of what was gathered from all processes."""
        return by_process[:: self.processes_per_copy]


def data_group(accelerator: Accelerator) -> DataGroup:
    """Return the group of this process. Only with tensor parallelism do several processes share a copy."""
    # Versions of Accelerate differ in whether they know of it.
    config = getattr(accelerator.state, "parallelism_config", None)
    per_copy = getattr(config, "tp_size", 1) or 1
    # In the mesh of Accelerate the processes of one copy have numbers that follow each other.
    index, index_in_copy = divmod(accelerator.process_index, per_copy)
    return DataGroup(accelerator.num_processes // per_copy, index, per_copy, index_in_copy)
