"""HistoryFileCallback: the run history on disk while the run goes on, one JSON line a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from accel_core import TrainerCallback
from accel_core.extending import check_path, notify

if TYPE_CHECKING:
    from accel_core import Trainer

NAME = "history.jsonl"


class HistoryFileCallback(TrainerCallback):
    """Write each record of the run history as a line of `history.jsonl`, on the main process.

    `tail -f` follows it, and `pandas.read_json(path, lines=True)` reads it. Lines are complete and handed to
    the system after every update, evaluation and epoch. A resumed run cuts off what its state does not know,
    so that the file is equal to that of a run that was never stopped. A file of another run is renamed to
    `history.1.jsonl`, or the next number that is free.
    """

    runs_in_replay = False
    order = 950
    """After all that record, and before what saves a state: the file never knows less than the state."""

    def __init__(self, folder: str | Path = "run") -> None:
        """Hold the folder of the run.

        Args:
            folder: may be that of `SaveTrainingStateCallback`. It is made if it is missing.

        Raises:
            ConfigurationError: it is no path.
        """
        self.folder = check_path("folder", folder, "Pass the name of a folder, such as 'run'.")
        self._file: BinaryIO | None = None
        self._written = 0
        """Records that are in the file."""
        self._is_resumed = False
        self._run_of_file: str | None = None
        """The run whose history this callback has written last."""

    @property
    def path(self) -> Path:
        """Return where the file is."""
        return self.folder / NAME

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Begin from scratch; whether the run is resumed is known later."""
        self._is_resumed = False

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """Cut off what the state does not know."""
        self._is_resumed = True
        self._close()

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Write what the update has recorded."""
        self.flush(trainer)

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Write what the evaluation has recorded."""
        self.flush(trainer)

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        """Write what the epoch has recorded."""
        self.flush(trainer)

    def on_training_run_end(self, trainer: Trainer) -> None:
        """Write what the end has recorded."""
        self.flush(trainer)

    def on_run_close(self, trainer: Trainer) -> None:
        """Close the file."""
        self._close()

    def flush(self, trainer: Trainer) -> None:
        """Write the records that are not in the file yet."""
        # Evaluations by `evaluate` belong to no run that could be resumed.
        if not trainer.is_main_process or trainer.run_id is None:
            return
        records = trainer.run_history.get_records()
        if self._file is None:
            self._open(trainer)
        elif len(records) < self._written:
            # Records were deleted, and nobody knows which.
            self._close()
            self._is_resumed = True
            self._open(trainer)
        if self._file is not None and len(records) > self._written:
            lines = [json.dumps(record) + "\n" for record in records[self._written :]]
            self._file.write("".join(lines).encode())
            self._file.flush()
            self._written = len(records)

    def _open(self, trainer: Trainer) -> None:
        """Open the file behind the records that it shares with the history of this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        known = b"".join(json.dumps(record).encode() + b"\n" for record in trainer.run_history.get_records())
        found = self.path.read_bytes() if self.path.exists() else b""
        # `evaluate` after a run adds to the history of that run.
        is_of_run = trainer.run_id == self._run_of_file
        is_own = self._is_resumed or trainer.run_progress.stage > 1 or is_of_run
        if found and not is_own:
            aside = next(
                path
                for path in (self.folder / f"history.{number}.jsonl" for number in range(1, len(found) + 2))
                if not path.exists()
            )
            self.path.rename(aside)
            notify(trainer, f"The history of another run in '{self.path}' was renamed to '{aside}'.", "saves")
            found = b""
        # A kill may also have cut the last line.
        if not known.startswith(found) or (found and not found.endswith(b"\n")):
            # Renamed into place: a reader sees the old file or the new one, and a kill leaves one of them.
            self._replace(known)
            found = known
        self._file = self.path.open("ab")
        self._run_of_file = trainer.run_id
        self._written = found.count(b"\n")

    def _replace(self, content: bytes) -> None:
        beside = self.path.with_suffix(".tmp")
        beside.write_bytes(content)
        beside.replace(self.path)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self._written = 0
