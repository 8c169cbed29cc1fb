"""The random numbers of a process: seeding, and putting back what was."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info


def seed_process(seed: int, process_index: int) -> None:
    """Seed python, numpy and torch: the main process with `seed` itself, others with seeds of their own."""
    own = seed if process_index == 0 else derive_seed(seed, "process", process_index)
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


@contextlib.contextmanager
def preserving_random_state(device: torch.device) -> Iterator[None]:
    """Put the random state of this process back afterwards, on the CPU and on `device`."""
    before = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(before, device)


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global generators of python, numpy, torch and `device` as plain values."""
    numpy_state = np.random.get_state(legacy=False)
    inner = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in numpy_state["state"].items()}
    state = {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": inner},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `capture_random_state` returned.

    The generator of `device` is restored only if it was saved on the same kind of device.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


class SeededRandomness:
    """Within it python, numpy and torch draw from `seed`.

    In the main process their state is put back afterwards.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = None
        if get_worker_info() is None:
            self.before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            random.setstate(self.before[0])
            np.random.set_state(self.before[1])
            torch.set_rng_state(self.before[2])


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that is a function of `parts` alone; different parts give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
