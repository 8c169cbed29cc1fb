"""Says what a process waited for when another one did not answer, as far as torch tells, and for how long."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from .collectives import is_distributed

UNANSWERED = (
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
)
"""Words of gloo, whose errors have no class of their own. It has the same ones for an end and for a hang."""

_LIBRARIES = {"torch", "accelerate", "deepspeed", "accel_core"}


def collective_timeout(device: torch.device) -> datetime.timedelta | None:
    """Return how long a process waits for the others before it gives up.

    None on one process, or if this version of torch does not tell.
    """
    if not is_distributed():
        return None
    try:
        # torch has no public way to ask for it; 30 minutes for gloo and 10 for NCCL are only its defaults.
        timeout = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):
        return None
    return timeout if isinstance(timeout, datetime.timedelta) else None


def is_unanswered(error: BaseException) -> bool:
    """Whether a collective has failed since another process has ended or did not take part in time."""
    if not (isinstance(error, RuntimeError) and is_distributed()):
        return False
    # NCCL and the store of the launcher have classes of their own.
    return isinstance(error, dist.DistError) or any(words in str(error) for words in UNANSWERED)


def waiting_call(error: BaseException) -> str:
    """Return the call that an error of a collective came from: torch's own name, and the line that asked."""
    frames = traceback.extract_tb(error.__traceback__)
    in_torch = [frame for frame in frames if "distributed_c10d" in frame.filename]
    own = [frame for frame in frames if not _LIBRARIES & set(Path(frame.filename).parts)]
    # Gradients are reduced by torch's C++ code, which leaves no frame.
    is_in_backward = any("autograd" in Path(frame.filename).parts for frame in frames)
    what = "the reduction of gradients in backward" if is_in_backward else "a collective"
    if in_torch:
        what = f"torch.distributed.{in_torch[0].name}"
    return f"{what}, called at {own[-1].filename}:{own[-1].lineno}" if own else what
