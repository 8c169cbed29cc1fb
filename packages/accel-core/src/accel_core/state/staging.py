"""Files that are being written beside their final place, and how to tell those that a crash has left behind.

A name has a random part, so that of two jobs that write to one path neither touches what the other
writes, and it holds a lock on the file, which the system lets go when the process ends. What
nobody holds is a leftover.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SECONDS_OF_OTHER_HOSTS = 24 * 3600.0
"""Other machines may not see a lock, so their files have to be this old before they are leftovers."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new empty file beside `path`, and remove it afterwards if it is still there."""
    _remove_leftovers(path)
    staging = path.with_name(f"{path.name}.{host_digits()}{secrets.token_hex(4)}.incomplete")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if fcntl is not None:
            # Some network disks have no locks: then nothing there is ever taken for a leftover.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            # Windows renames no file that is open.
            os.close(descriptor)
            descriptor = -1
        yield staging
    finally:
        with contextlib.suppress(OSError):
            staging.unlink()
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Remove what a crash has left of earlier writes to `path`.

    What cannot be removed is left to the next one.
    """
    pattern = re.compile(re.escape(path.name) + r"\.([0-9a-f]{8})[0-9a-f]{8}\.incomplete")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            found = pattern.fullmatch(entry.name)
            if found is not None and entry.is_file(follow_symlinks=False):
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if found[1] == host_digits() or age > SECONDS_OF_OTHER_HOSTS:
                    _remove_unless_held(entry.path)


def _remove_unless_held(path: str) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)


def host_digits() -> str:
    """Return eight digits that stand for this machine."""
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
