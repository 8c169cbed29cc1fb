"""One thread that writes what a save holds, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .snapshot import Snapshots


class BackgroundWriter:
    """Writes one save at a time. Its thread communicates with nobody and touches no object of the training.

    Python's own end waits for the thread.
    """

    def __init__(self) -> None:
        self.snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None]) -> None:
        """Let the thread call `write`, once the one before is through."""
        self.wait()

        def run() -> None:
            try:
                self.snapshots.wait()
                write()
            # Raised in the main thread, at the next safe point.
            except Exception as error:
                self._error = error

        # No daemon: a thread that Python drops at its end would leave half a state.
        self._thread = threading.Thread(target=run, name="accel-save")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the save that is on its way, and return what it has raised, once."""
        if self._thread is not None:
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        return error
