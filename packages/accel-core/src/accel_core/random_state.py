"""The random numbers of a process: seeding, and putting back what was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from .data_order import derive_seed
from .training_state import random_state, restore_random_state


def seed_process(seed: int, process_index: int) -> None:
    """Seed python, numpy and torch: the main process with `seed` itself, each other with a stream of its own."""
    own = seed if process_index == 0 else derive_seed(seed, "process", process_index)
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


@contextlib.contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Put the random state of this process back afterwards, on the CPU and on `device`."""
    before = random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)
