"""Defines everything that accel raises or warns with on its own account."""

from __future__ import annotations

import signal
from pathlib import Path


class AccelError(Exception):
    """All errors that accel raises itself derive from this one."""


# Also the built-in error for it, so that callers can catch it without importing accel.
class ConfigurationError(AccelError, ValueError):
    """Reports a mistake of the caller: the value, what was expected and what to do."""


class CheckpointError(AccelError, RuntimeError):
    """Reports a checkpoint that cannot be written or read: the file and what to do."""


class DamagedError(CheckpointError):
    """Reports that the content of a file is no longer what was written."""


class OtherRunError(CheckpointError):
    """Reports a folder of another run, or of a future that this run gave up. Waiting mends nothing."""


class NotFiniteError(CheckpointError):
    """Reports parameters that are nan or infinite: nothing was saved, and what was there is untouched."""


class StoreError(CheckpointError):
    """Reports a store elsewhere that does not answer, or refuses. What is on this machine is untouched."""


class AccelWarning(UserWarning):
    """Warns of something that the user should change, although training continues."""


# A SystemExit, so that an `except Exception` of a script does not swallow the signal.
class RunInterrupted(SystemExit):
    """Ends `train` after a signal: the update was finished, the state saved, everything closed.

    Unhandled it ends the process without a traceback, with the status 128 + `signal_number` that shells and
    schedulers expect. `checkpoint` is the newest complete one.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        # The exit status, which `accelerate launch` and job schedulers read.
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        """Number of the signal that stopped the run, as in the module `signal` of Python."""
        self.checkpoint = checkpoint
        """The newest complete checkpoint of the run, or None if nothing saved one."""

    def __str__(self) -> str:
        name = signal.Signals(self.signal_number).name
        saved = f"the state is in {self.checkpoint}" if self.checkpoint else "no callback saved the state"
        return f"{name} ended the run: {saved}."
