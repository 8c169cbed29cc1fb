"""Completes what states of earlier versions say of their progress."""

from __future__ import annotations

from typing import Any

_COUNTERS: tuple[dict[str, Any], ...] = (
    # Every call of `train` was a run.
    {
        "stage": 1,
        "stage_skipped": False,
        "epochs_before_stage": 0,
        "updates_before_stage": 0,
        "order_epoch": 0,
    },
    # A run had one evaluation set, and no evaluation at its start.
    {"eval_sets_completed": 0, "start_evaluated": False, "scheduler_values_used": 0},
    # A state from the end of an evaluation told callbacks of it once more.
    {"evaluation_told": False, "evaluation_step_due": False},
)
"""What a version added, with the values that were meant before."""


def complete_progress(state: dict[str, Any]) -> None:
    """Add the counters that a state lacks, since its version did not count them."""
    progress = state.get("run_progress")
    if not isinstance(progress, dict):
        return
    for counters in _COUNTERS:
        # A state that has some of them is a later one that was damaged.
        if progress.keys() & counters.keys():
            continue
        progress = {**progress, **counters}
        if "order_epoch" in counters:
            # Each call began at the first order, which every epoch went on from.
            progress["order_epoch"] = progress.get("epochs_completed")
    state["run_progress"] = progress
