"""Training states that are written while training goes on, and what the processes know of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import AccelWarning, CheckpointError, ConfigurationError
from ..notices import logger_of
from ..processes.collectives import all_gather_object, is_distributed, run_on_main
from ..state.background import BackgroundWriter
from .run import Run, require_training
from .trainer_parts import TrainerParts

TOPIC = "background save"
STILL_WRITING = "background save goes on"


class BackgroundSaves:
    """The states that one callback has written in the background, at most one of them at a time.

    The main process copies and writes; if an engine spreads the model, each process its own part. That all is
    written reaches everyone with what the processes agree on after each update anyway, so that all of them
    hear of it at the same update.
    """

    def __init__(self) -> None:
        self.writer = BackgroundWriter()
        self.path: Path | None = None
        """Of the state that is on its way."""
        self._progress: dict[str, Any] = {}
        self._number = 0
        self._has_told = False
        self._all_write = False

    def start(self, trainer: TrainerParts) -> None:
        """Make ready for a run. Every process takes part.

        Raises:
            ConfigurationError: the engine writes files of its own, by all processes together.
        """
        if not trainer.engine.writes_in_background:
            raise ConfigurationError(
                f"in_background is True, but {trainer.engine.name} spreads the model over the processes, "
                "which communicate while they write it, and training would communicate at the same time. "
                "Leave in_background out, or use FSDP2."
            )
        self._all_write = trainer.engine.shards_parameters
        for topic in (TOPIC, STILL_WRITING):
            trainer.agreement.register(topic)
        self._has_told = False

    @contextlib.contextmanager
    def taking_saves(self, trainer: TrainerParts) -> Iterator[None]:
        """Let what is saved within be written in the background. Every process takes part.

        It waits for the state before.
        """
        self.finish(trainer)
        run, _ = require_training(trainer._run, "SaveTrainingStateCallback.save")
        run.background = self
        try:
            yield
        finally:
            run.background = None

    def begun(self, path: Path, progress: dict[str, Any]) -> None:
        """Note that a state is on its way."""
        self.path, self._progress = path, progress
        self._number += 1

    def has_arrived(self, trainer: TrainerParts) -> bool:
        """Whether all processes know that the state was written, or could not be. Call it at safe points."""
        if self.path is None:
            return False
        # The number, since a word on the state before may still be on its way.
        agreed = trainer.agreement.agreed
        if agreed.get(TOPIC) == self._number and agreed.get(STILL_WRITING) != self._number:
            return True
        if self._all_write or trainer.is_main_process:
            if not self.writer.is_busy:
                trainer.agreement.flag(TOPIC, self._number)
            elif self._all_write:
                # The largest number counts, so one that is not through holds all up.
                trainer.agreement.flag(STILL_WRITING, self._number)
        return False

    def warn_of_waiting(self) -> None:
        """Say once in a run that a save comes due before the one before is written. One process calls it."""
        if self.path is not None and self.writer.is_busy and not self._has_told:
            self._has_told = True
            warnings.warn(
                f"A save is due, but '{self.path.name}' is still being written, so training waits for it. "
                "Save less often, or to a faster disk.",
                AccelWarning,
                stacklevel=2,
            )

    def finish(self, trainer: TrainerParts) -> Path | None:
        """Wait for the state on its way, tell everyone that it stands, and return it.

        If there is none, wait for what `tidy` has begun. Every process takes part.

        Raises:
            CheckpointError: it could not be written, on every process.
        """
        if self.path is None:
            failed = self.writer.wait()
            if failed is not None:
                raise failed
            return None
        path, self.path = self.path, None
        error: Exception | None = None

        def wait() -> str | None:
            nonlocal error
            error = self.writer.wait()
            return None if error is None else _failure(error, path)

        # As text, since not every error survives the way to another process.
        failure = (
            self._finish_parts(trainer, wait(), path)
            if self._all_write
            else run_on_main(wait, trainer.is_main_process)
        )
        if failure is not None:
            raise CheckpointError(failure) from error
        _note(trainer, trainer._run, path, self._progress)
        trainer.callbacks.on_checkpoint_saved(trainer, path=path)  # type: ignore[arg-type]
        return path

    def _finish_parts(self, trainer: TrainerParts, failure: str | None, path: Path) -> str | None:
        """Make a state of the parts once all processes are through, and return what has failed on any.

        Every process takes part.
        """
        failures = {index: text for index, text in enumerate(all_gather_object(failure)) if text is not None}

        def complete() -> str | None:
            try:
                self.writer.finish(not failures)
            except Exception as error:
                return _failure(error, path)
            return None

        failure = run_on_main(complete, trainer.is_main_process)
        return " ".join(f"Process {index}: {text}" for index, text in failures.items()) or failure

    def tidy(self, act: Callable[[], None]) -> None:
        """Let the writer remove states while training goes on: of large ones it takes as long as the copies.

        One process calls it.

        Args:
            act: looks at the folder and removes. What it uses is its own until `finish` has waited for it.
        """

        def act_quietly() -> None:
            # If the folder cannot be listed, the check before the next save says so on all processes.
            with contextlib.suppress(CheckpointError):
                act()

        self.writer.start(act_quietly)

    def close(self, trainer: TrainerParts) -> Path | None:
        """Wait for the state on its way after an error, without messages to other processes; return it."""
        if self.path is None:
            self.writer.wait()
            return None
        path, self.path = self.path, None
        error = self.writer.wait()
        if self._all_write and trainer.is_main_process:
            try:
                self.writer.finish(error is None)
            except Exception as failed:
                error = failed
        if error is not None:
            warnings.warn(_failure(error, path), AccelWarning, stacklevel=2)
            return None
        if not trainer.is_main_process:
            # It does not know whether the main process has written.
            return None
        _note(trainer, trainer._run, path, self._progress)
        if not is_distributed():
            trainer.callbacks.on_checkpoint_saved(trainer, path=path)  # type: ignore[arg-type]
        return path


def bytes_to_copy(model: torch.nn.Module, optimizer: Any) -> int:
    """Return the size of the parameters, the buffers and what the optimizer holds by now, in bytes."""
    held = [tensor for state in getattr(optimizer, "state", {}).values() for tensor in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, held)]
    return sum(tensor.nbytes for tensor in tensors)


def _note(trainer: TrainerParts, run: Run | None, path: Path, progress: dict[str, Any]) -> None:
    logger_of("saves").info("The state of update %s is saved: %s", progress["updates_completed"], path)
    if run is not None:
        run.known_states[path] = progress
    trainer.last_checkpoint = path


def _failure(error: Exception, path: Path) -> str:
    reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    return f"The training state was not saved to '{path}' in the background. {reason}"
