"""Whether states and exports are what was written, without loading them into anything."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..checks.values import check_path
from ..errors import CheckpointError
from .checkpoint import Kind, NoState, TrainerState, examine
from .export import NO_EXPORT, read_export
from .folder import DAMAGED, entries_of, find_flaw_of

_logger = logging.getLogger("accel_core")


def verify_checkpoint(path: str | Path) -> dict[Path, str | None]:
    """Read every byte of a state, an export, or all in a folder, and return what is wrong with each.

    None stands for what is good. States and exports of older versions have no digests: of them sizes are
    compared, and that they can be read; the log names it. What is unfinished or foreign is left out.
    Nothing is changed.

    Raises:
        CheckpointError: there is nothing at `path`.
    """
    path = check_path("path", path, "Pass a training state, an export, or a folder of them.")
    if not os.path.lexists(path):
        raise CheckpointError(
            f"'{path}' does not exist. Pass a training state, an export, or a folder of them."
        )
    if path.is_file():
        return {path: _flaw_of_export(path)}
    state = examine(path)
    if not isinstance(state, NoState) or state.kind in (Kind.DAMAGED, Kind.UNKNOWN_FORMAT):
        return {path: _flaw_of_state(path, state)}
    found: dict[Path, str | None] = {}
    for name in sorted(name for name, _ in entries_of(path)):
        state = examine(path / name)
        if not isinstance(state, NoState) or state.kind in (Kind.DAMAGED, Kind.UNKNOWN_FORMAT):
            found[path / name] = _flaw_of_state(path / name, state)
    for file in sorted(path.glob("*")):
        if file.suffix in (".pt", ".safetensors") and file.is_file():
            flaw = _flaw_of_export(file)
            if flaw is None or not flaw.startswith(NO_EXPORT.format(file)):
                found[file] = flaw
    return found


def _flaw_of_state(path: Path, state: TrainerState | NoState) -> str | None:
    if isinstance(state, NoState):
        return state.reason
    flaw = find_flaw_of(path, state)
    if flaw is None and not state.get("digests"):
        _logger.warning("'%s' has no digests, so only the sizes of its files were compared.", path)
    if flaw is None and path.name.startswith(DAMAGED):
        return "was set aside, since damage was found while it was loaded"
    return flaw


def _flaw_of_export(path: Path) -> str | None:
    try:
        read_export(path)
    except CheckpointError as error:
        return str(error)
    return None
