"""One call that writes a checkpoint folder: what fails on a process is raised on all, and leaves nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import AccelError, CheckpointError, ConfigurationError
from .checkpoint import RunState
from .housekeeping import being_written, remove_checkpoint


@dataclasses.dataclass
class OneSave:
    """One call of `save_folder`."""

    path: Path
    state: RunState
    process_index: int
    gather: Callable[[Any], Sequence[Any]]
    staging: Path = Path()
    """The folder that is being filled, once it is there."""

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.process_index == 0

    def on_all(self, action: Callable[[], Any], takes_part: bool = True) -> list[Any]:
        """Act on this process if it takes part. What fails is raised on all, after the folder is removed."""
        try:
            failure = f"The training state was not saved to '{self.path}'."
            return _run_on_all(action, self.gather, failure, takes_part)
        except AccelError:
            if self.is_main and self.staging != Path():
                self.give_up()
            raise

    def give_up(self) -> None:
        """Remove what was written. The main process calls it."""
        being_written.discard(self.staging)
        remove_checkpoint(self.staging)


def _run_on_all(
    action: Callable[[], Any], gather: Callable[[Any], Sequence[Any]], failure: str, takes_part: bool
) -> list[Any]:
    """Act on this process if it takes part, and return what all have returned. A failure is raised on all."""
    outcome = None
    cause = None
    try:
        outcome = action() if takes_part else None
    except Exception as error:
        cause = error
    message = cause and (str(cause) if isinstance(cause, AccelError) else f"{type(cause).__name__}: {cause}")
    gathered = gather((outcome, message, isinstance(cause, ConfigurationError)))
    failed = {
        f"Process {index}: {text}": is_users
        for index, (_, text, is_users) in enumerate(gathered)
        if text is not None
    }
    if not failed:
        return [outcome for outcome, _, _ in gathered]
    kind = ConfigurationError if all(failed.values()) else CheckpointError
    raise kind(f"{failure} {' '.join(failed)}") from cause
