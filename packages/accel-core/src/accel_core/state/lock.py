"""A lock among the processes of one machine, which the system lets go when its holder ends."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_SECONDS_BETWEEN_TRIES = 0.05


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock on the file `path`, which is made. Gives False if the disk has no locks.

    Args:
        on_wait: called once if another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        has_waited = False
        while True:
            try:
                _lock(descriptor)
                is_held = True
                break
            except (BlockingIOError, PermissionError):
                if not has_waited:
                    on_wait()
                has_waited = True
                # Not by waiting in the system, so that Ctrl-C and signals are heeded on every platform.
                time.sleep(_SECONDS_BETWEEN_TRIES)
            # Some network disks have none.
            except OSError:
                is_held = False
                break
        yield is_held
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
