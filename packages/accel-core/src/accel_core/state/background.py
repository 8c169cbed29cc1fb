"""One thread that writes what a save holds, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .digests import hashes_beside
from .snapshot import Snapshots


class BackgroundWriter:
    """Writes one save at a time. Its thread communicates with nobody and touches no object of the training.

    Python's own end waits for the thread.
    """

    def __init__(self) -> None:
        self.snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._complete: Callable[[bool], None] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None], complete: Callable[[bool], None] | None = None) -> None:
        """Let the thread call `write`, once the one before is through.

        Args:
            complete: if each process writes a part, what makes a state of the parts, or removes them, once
                all are through. The main process calls it, with whether all have written theirs.
        """
        self.wait()
        self._complete = complete

        def run() -> None:
            hashes_beside.set(False)
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

    def finish(self, are_written: bool) -> None:
        """Make a state of the parts of all processes, or remove them. The main process calls it.

        Args:
            are_written: whether all have written theirs, as far as it is known.

        Raises:
            CheckpointError: it could not be made.
        """
        complete, self._complete = self._complete, None
        if complete is not None:
            complete(are_written)
