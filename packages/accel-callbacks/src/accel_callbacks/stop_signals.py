"""Signals that ask a run to stop: handlers that note them, for the time of the run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from accel_core import ConfigurationError

if TYPE_CHECKING:
    from accel_core import Trainer

_NOT_ON_EVERY_PLATFORM = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGBREAK"}
_CANNOT_BE_HANDLED = {"SIGKILL", "SIGSTOP"}
SECONDS_OF_ONE_SIGNAL = 1.0
"""Time in which a worker of torchrun gets a signal to a whole job twice: itself, and from the launcher."""


class StopSignals:
    """Lets the first signal ask all processes to stop, and the second end the process.

    Handlers are set in the main thread only, and what was there before comes back.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Hold the signals. Raises `ConfigurationError` for a name that none has."""
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.numbers = _signal_numbers(names)
        self._handlers_before: dict[int, Any] = {}
        self._signalled_at: float | None = None

    def listen(self, trainer: Trainer) -> None:
        """Set the handlers, unless another callback has."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._signalled_at = None

        def handle(number: int, frame: FrameType | None) -> None:
            self._handle(trainer, number)

        handle.is_of_accel = True  # type: ignore[attr-defined]
        for number in self.numbers:
            # A stop makes every saver save, so one handler is enough for several of them.
            if not getattr(signal.getsignal(number), "is_of_accel", False):
                self._handlers_before[number] = signal.signal(number, handle)

    def close(self) -> None:
        """Give the handlers back that were there before. What came until now is raised by `train`."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers_before = {}

    def _handle(self, trainer: Trainer, number: int) -> None:
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                self._end_by_the_next()  # Also where Python itself no longer gets to run.
            name = signal.Signals(number).name
            trainer.request_stop(f"the signal {name} was received", signal_number=number)
        elif time.monotonic() > self._signalled_at + SECONDS_OF_ONE_SIGNAL:
            self._end_by_the_next()
            signal.raise_signal(number)

    def _end_by_the_next(self) -> None:
        for handled in self._handlers_before:
            is_ctrl_c = handled == signal.SIGINT
            signal.signal(handled, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)


def _signal_numbers(names: Sequence[str]) -> list[int]:
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name in _CANNOT_BE_HANDLED:
            raise ConfigurationError(
                f"save_on_signals has {name!r}, which no process can handle. Use 'SIGTERM'."
            )
        if name not in _NOT_ON_EVERY_PLATFORM and name not in signal.Signals.__members__:
            raise ConfigurationError(
                f"save_on_signals has {name!r}, but must have names of signals, such as 'SIGTERM'."
            )
    return [signal.Signals[name].value for name in names if name in signal.Signals.__members__]
