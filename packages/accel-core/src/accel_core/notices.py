"""Says what the trainer has decided: by the loggers under `accel_core`, and in the terminal with the time."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any, Protocol

import torch.distributed as dist

from .screen import columns_of, wrap


class Printing(Protocol):
    """What a notice needs of a trainer."""

    @property
    def is_main_process(self) -> bool: ...
    def print(self, *args: Any, **kwargs: Any) -> None: ...


class _WithProcess(logging.LoggerAdapter):  # type: ignore[type-arg]
    """Puts the number of the process, from 0, before each message of several processes."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        # Looked up at each message: a logger may be older than the process group.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            msg = f"[process {dist.get_rank()} of {dist.get_world_size()}] {msg}"
        return msg, kwargs


@functools.cache
def logger_of(room: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger `accel_core.<room>`: `engine`, `loader`, `resume`, `saves`, `evaluations`, `run`."""
    return _WithProcess(logging.getLogger(f"accel_core.{room}"), {})


def notify(trainer: Printing, message: str, room: str = "run") -> None:
    """Log `message` at INFO. If no logger shows it, print it with the time, on the main process."""
    logger = logger_of(room)
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", message)
    elif trainer.is_main_process:
        # Whoever comes back to a long run sees when something was decided.
        trainer.print(wrap(f"{time.strftime('%H:%M:%S')} {message}", columns_of()))
