"""Compare a training state with its digests before it is loaded, all processes together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checks.values import check_path
from ..errors import CheckpointError, DamagedError
from ..notices import notify
from ..processes.collectives import all_gather_object, run_on_main
from ..state import files
from ..state.checkpoint import TrainerState, find_mismatch
from ..state.folder import open_training_state
from ..state.housekeeping import set_damaged_aside
from .machines import sees
from .trainer_parts import TrainerParts


def open_state(trainer: TrainerParts, path: Any) -> tuple[Path, TrainerState]:
    """Return a folder and what its `trainer_state.json` says, once all its files are checked.

    Every process takes part.

    The main process's choice counts, and what it finds there: disks of several machines may differ for a
    while.

    Raises:
        CheckpointError: it is no complete state, or damaged (see `check_state`).
    """
    way_out = "Pass the folder of a training state, as latest_checkpoint gives it."

    def open_chosen() -> tuple[Path, TrainerState]:
        folder = check_path("input_dir", path, way_out)
        return folder, open_training_state(folder)

    folder, state = run_on_main(open_chosen, trainer.is_main_process)
    check_state(trainer, folder, state)
    return folder, state


def check_state(trainer: TrainerParts, folder: Path, state: TrainerState) -> None:
    """Compare all files of a complete state with their digests.

    Every process takes part, and reads a part of them.

    Raises:
        CheckpointError: a file is damaged. The main process has renamed the state by then, so that a
            script that is started again continues from the one before.
    """
    names = sorted(state.get("digests", {}))
    group = trainer.engine.group
    # On machines with a disk each only some have it. The main process has read its JSON already.
    readers = [
        index for index, found in enumerate(all_gather_object(group.is_main or sees(folder, state))) if found
    ]
    own = names[readers.index(group.process_index) :: len(readers)] if group.process_index in readers else []
    with files.raising_checkpoint_error(folder, "could not be read"):
        flaw = find_mismatch(folder, state, own)
    flaw = next(filter(None, all_gather_object(flaw)), None)
    if flaw is not None:
        aside = run_on_main(lambda: _try_to_set_aside(folder), trainer.is_main_process)
        raise CheckpointError(f"'{folder}' {flaw}. {aside}")
    if not names:
        notify(
            trainer,
            f"'{folder}' was saved by an older version, without digests, so its files cannot be checked.",
            "resume",
        )


def _try_to_set_aside(folder: Path) -> str:
    """Rename a damaged state, and return the sentence on it."""
    try:
        aside = set_damaged_aside(folder)
    except OSError as error:
        return f"It could not be renamed ({error}): remove it, or resume from another state."
    return f"It is now '{aside}', so that latest_checkpoint gives the state before it."


@contextlib.contextmanager
def setting_damage_aside(trainer: TrainerParts, folder: Path) -> Iterator[None]:
    """Rename a state if damage is found while it is loaded: old states have no digests."""
    try:
        yield
    except DamagedError as error:
        # Not every process may have read the damaged file, so nothing is exchanged here.
        aside = _try_to_set_aside(folder) if trainer.is_main_process else "The main process renames it."
        raise CheckpointError(f"{error} {aside}") from error
