"""What every worker of a data loader does first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    """Let the worker outlive a SIGTERM that is meant for the whole job, and call the user's own `worker_init_fn`.

    Launchers and schedulers send it to all processes of a job. The trainer then finishes its update and
    saves, for which it needs its workers. One that its parent sends still ends the worker, as does the end of
    the parent.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_the_parent_says_so, args=[os.getppid()], daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _end_when_the_parent_says_so(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
