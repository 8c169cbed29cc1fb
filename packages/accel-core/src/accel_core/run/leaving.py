"""Says how a process leaves a run that others may continue with."""

from __future__ import annotations

import sys

import torch

from ..processes.lost import collective_timeout, is_unanswered, waiting_call
from ..text import counted
from .run import Run
from .run_progress import RunProgress


def report_leaving(error: BaseException, run: Run, progress: RunProgress, device: torch.device) -> None:
    """Name a `sys.exit` of this process, and note on an error of a collective what it waited for.

    Nothing communicates here: the others may be anywhere, or gone.
    """
    group = run.engine.group
    if group.is_only_process:
        return
    who = f"Process {group.process_index} of {group.num_processes}"
    where = f"{run.phase.value}, after {counted(progress.updates_completed, 'updates')}"
    if isinstance(error, SystemExit):
        # A launcher takes status 0 for success and goes on waiting for the others, so this is the only trace.
        sys.stderr.write(
            f"{who} leaves the run by sys.exit({error.code!r}), {where}. "
            "The others wait for it, and fail. Call trainer.request_stop(reason), which ends all of them "
            "after the same update.\n"
        )
        sys.stderr.flush()
        return
    if is_unanswered(error):
        error.add_note(
            f"{who} waited, {where}, in {waiting_call(error)}. Another "
            f"process has ended, hangs, or did not make the same call. {_ways_out(device)}"
        )


def _ways_out(device: torch.device) -> str:
    timeout = collective_timeout(device)
    limit = "" if timeout is None else f" of {counted(timeout.total_seconds(), 'seconds')}"
    return (
        "Look for the first error or sys.exit in the output of the others, or for a collective that not all "
        f"of them call. The limit{limit} is that of InitProcessGroupKwargs(timeout=...); "
        "TORCH_DISTRIBUTED_DEBUG=DETAIL names collectives that differ."
    )
