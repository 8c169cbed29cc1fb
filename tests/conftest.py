"""What holds for every test: one thread for each process, and no state of accelerate left behind."""

import os
from collections.abc import Iterator

# Read when torch is imported, here and in the processes that tests start: several of them share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget accelerate's singletons, as a second `Accelerator` with other settings would fail in the same process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
