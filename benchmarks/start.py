"""What it costs to start: CPU time from the start of the process to the first forward, and the most memory, as JSON.

Started by run.py in a fresh process:

    python benchmarks/start.py LOOP
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
import warnings
from dataclasses import replace

import torch
from measure import Terminal, find_loop
from workloads import WORKLOADS, Task


class FirstForward:
    """Notes the CPU time of the process at the first forward."""

    seconds: float | None = None

    def tick(self) -> None:
        if self.seconds is None:
            self.seconds = time.process_time()


def main() -> None:
    torch.set_num_threads(1)
    loop = find_loop(sys.argv[1])
    task = Task(replace(WORKLOADS["train"], steps=200))
    clock = FirstForward()
    task.model.clock = clock  # type: ignore[assignment]
    with (
        contextlib.redirect_stdout(Terminal()),
        contextlib.redirect_stderr(Terminal()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        loop(task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"first_forward": clock.seconds, "peak_megabytes": peak}))


if __name__ == "__main__":
    main()
