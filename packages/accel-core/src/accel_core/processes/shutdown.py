"""Checks that the processes see each other, and closes the process group at exit. It stops no training."""

from __future__ import annotations

import atexit
import gc
import os
import time

import torch
import torch.distributed as dist

from ..errors import ConfigurationError

# Long enough for a thread to let go of a tensor, too short for a person to notice.
SECONDS_TO_LET_GO = 0.01


def check_processes(num_processes: int) -> None:
    """Check that the processes see each other, and close their group at exit. Every run begins with it."""
    check_processes_see_each_other(num_processes)
    close_process_group_at_exit()


def check_processes_see_each_other(num_processes: int) -> None:
    """Raise `ConfigurationError` if a launcher started several processes that do not know of each other."""
    # The launcher sets this variable also if Accelerate then starts each process by itself.
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and num_processes == 1:
        # Most often a command for GPUs on a machine without one, or beside a torch that was built for CPUs.
        found = "" if torch.accelerator.is_available() else f"torch {torch.__version__} finds no GPU here. "
        raise ConfigurationError(
            f"accelerate launch started {launched} processes, but this Accelerator does not see the others, "
            f"so each would train alone. {found}On a CPU, set ACCELERATE_USE_CPU=true and launch with "
            "--multi_gpu, as with examples/configs/two_cpu_processes.yaml."
        )


def close_process_group_at_exit() -> None:
    """Destroy the process group when the interpreter ends: gloo may abort the process otherwise."""
    # Every run is checked here, and one call at exit is enough.
    atexit.unregister(_destroy_process_group)
    atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    if dist.is_initialized():
        # A wrapper that was replaced, as after unfreezing, is part of a circle and keeps the group's threads
        # alive.
        gc.collect()
        dist.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Also where the script has destroyed the group: a thread of gloo lets go of a tensor after it has
        # woken us, and needs the interpreter for it. If that has begun to end meanwhile, the thread aborts
        # the process, which has done all its work.
        time.sleep(SECONDS_TO_LET_GO)
