"""How long training waits for its data, and the one sentence about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import IterableDataset

from ..text import counted
from .readers import is_in_memory, is_map_style

MOST_WORKERS = 8
"""More than these are rarely of use, and each takes memory."""

SECONDS_BEFORE_REPORT = 30.0
SHARE_WORTH_A_REPORT = 0.2
SECONDS_WORTH_A_REPORT = 0.1
"""Less waiting in all is not worth the start of a worker."""

NEVER = float("inf")
AT_ONCE = float("-inf")


class WaitingReport:
    """Reports once if training spends more than a fifth of its time waiting for data.

    The time is looked at after the first epoch, or after half a minute if that is earlier.
    """

    due_at = NEVER
    """When to look next, in the seconds of `time.perf_counter`."""

    def __init__(self, loader: Any = None, is_own: bool = False, num_local_processes: int = 1) -> None:
        """Watch a loader as for a single process; without one nothing is ever reported.

        Args:
            is_own: the user has passed the loader itself as the data.
            num_local_processes: processes of this machine, which share its cores.
        """
        self.loader = loader
        self.is_own = is_own
        self.num_local_processes = num_local_processes
        self._began_at: float | None = None
        self._waited_before = 0.0

    def begin(self, now: float, seconds_waited: float) -> None:
        """Begin to measure, in the first epoch."""
        if self.loader is None or self._began_at is not None:
            return
        if getattr(self.loader, "num_workers", 0):
            # Starting workers takes long once; what counts is how they keep up after the first batch.
            self.due_at = AT_ONCE
        else:
            self._began_at, self._waited_before = now, seconds_waited
            self.due_at = now + SECONDS_BEFORE_REPORT

    def look(self, now: float, seconds_waited: float, log: Callable[[str], object]) -> None:
        """Give `log` a sentence if the waiting was worth one."""
        if self.due_at == NEVER:
            return
        if self._began_at is None:
            self._began_at, self._waited_before = now, seconds_waited
            self.due_at = now + SECONDS_BEFORE_REPORT
            return
        self.due_at = NEVER
        waited = seconds_waited - self._waited_before
        share = waited / max(now - self._began_at, 1e-9)
        way_out = self._way_out()
        if way_out and share > SHARE_WORTH_A_REPORT and waited > SECONDS_WORTH_A_REPORT:
            log(f"{share * 100:.0f} % of the time was spent waiting for data; {way_out}")

    def _way_out(self) -> str | None:
        dataset = getattr(self.loader, "dataset", self.loader)
        # Sending a sample from a worker takes longer than reading it from memory.
        if is_in_memory(dataset):
            return None
        # A container or a scheduler may allow fewer cores than the machine has.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        useful = max(min(cores // self.num_local_processes, MOST_WORKERS), 1)
        present = getattr(self.loader, "num_workers", 0)
        if present >= useful:
            return (
                f"its {counted(present, 'workers')} cannot keep up, so make the reading of a sample cheaper"
            )
        if isinstance(dataset, IterableDataset):
            return "workers help if each reads a part of its own: see torch.utils.data.get_worker_info"
        if not is_map_style(dataset):
            return f"let your {type(dataset).__name__} read ahead"
        if self.is_own:
            return f"try num_workers={useful} in your {type(self.loader).__name__}"
        return f"try train_dataloader_kwargs={{'num_workers': {useful}}}"
