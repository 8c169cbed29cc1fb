"""Measure one loop against the hand-written one, in this process, and print the figures as JSON.

Started by run.py in a fresh process for each loop, so that no library disturbs another:

    python benchmarks/measure.py WORKLOAD LOOP ROUNDS
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from loops import LOOPS, Loop, raw, raw_distributed
from workloads import WORKLOADS, Task, Workload

MOST_RELATIVE_DIFFERENCE = 0.01


class Terminal(io.StringIO):
    """Takes what a bar draws as a terminal would, so that bars are drawn and not suppressed."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def find_loop(name: str) -> Loop:
    """The loop of this name; other libraries are imported only if one of theirs is asked for."""
    if name not in LOOPS:
        from other_loops import OTHER_LOOPS

        return OTHER_LOOPS[name]
    return LOOPS[name]


def measure(workload: Workload, loop: Loop, rounds: int) -> dict[str, Any]:
    """Chunks in pairs, in turns first; the first pair only warms up."""
    by_hand = raw_distributed if workload.processes > 1 else raw
    sides = {"raw": by_hand, "loop": loop}
    times: dict[str, list[tuple[float, float]]] = {"raw": [], "loop": []}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            seconds, losses[side] = run_chunk(workload, sides[side])
            if number:
                times[side].append(seconds)
    if abs(losses["loop"] / losses["raw"] - 1) > MOST_RELATIVE_DIFFERENCE:
        raise RuntimeError(f"The loops did not do the same work: their losses are {losses}.")
    ratios = [
        [loop / hand for loop, hand in zip(*pair, strict=True)]
        for pair in zip(times["loop"], times["raw"], strict=True)
    ]
    wall, cpu = zip(*ratios, strict=True)
    best = {side: min(seconds for seconds, _ in times[side]) * workload.unit for side in sides}
    return {
        "ratio": statistics.median(wall),
        "cpu_ratio": statistics.median(cpu),
        "best_ratio": best["loop"] / best["raw"],
        "raw_ms": best["raw"] * 1000,
        "loop_ms": best["loop"] * 1000,
        "losses": losses,
    }


def run_chunk(workload: Workload, loop: Loop) -> tuple[tuple[float, float], float]:
    """Wall and CPU seconds of a forward with all that belongs to it, and the loss in the end."""
    task = Task(workload)
    clock = task.start_clock()
    with (
        contextlib.redirect_stdout(Terminal()),
        contextlib.redirect_stderr(Terminal()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        loss = loop(task)
    _forget_accelerate()
    return clock.seconds_per_forward(), task.final_loss() if loss is None else loss


def _forget_accelerate() -> None:
    """Every chunk makes its `Accelerator` anew, with settings of its own."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state()
        GradientState._reset_state()


def main() -> None:
    name, loop_name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    if workload.processes > 1:
        from accelerate import PartialState

        found = PartialState(cpu=True).num_processes
        if found != workload.processes:
            raise RuntimeError(f"{workload.title} needs {workload.processes} processes, but found {found}.")
    figures = measure(workload, find_loop(loop_name), rounds)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(figures))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
