"""Says which processes share the data, and which of them this one is.

They need not be all processes of the job: with tensor parallelism several processes hold one copy of the
model and read the same batches. The loop, the weights of losses, sums, predictions and checkpoints ask this
group.
"""

from __future__ import annotations

import dataclasses

from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class DataGroup:
    """Holds how many processes share the data, and the place of this one among them."""

    size: int = 1
    index: int = 0
    """Number of this process, counted from 0."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes, once for the whole job."""
        return self.index == 0

    @property
    def is_single(self) -> bool:
        """Whether this process has all the data to itself."""
        return self.size == 1


def data_group(accelerator: Accelerator) -> DataGroup:
    """Return the group of this process. Every process of a job has a part of the data."""
    return DataGroup(accelerator.num_processes, accelerator.process_index)
