"""Whether states and exports are what was written, without loading them into anything."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from ..checks.address import Address
from ..errors import CheckpointError, StoreError
from .checkpoint import STATE_FILE, Kind, NoState, TrainerState, examine, parse_state_file
from .export import NO_EXPORT, read_export
from .folder import DAMAGED, entries_of, find_flaw_of
from .mirrored import is_marked, list_mirrored
from .store import Store, check_place_in_reach, retried
from .transfer import find_flaw_in_store

Verified = dict[Path | str, str | None]

_EXPORTS = (".pt", ".safetensors")
_WAY_OUT = "Pass a training state, an export, or a folder of them."
_SET_ASIDE = "was set aside, since damage was found while it was loaded"

_logger = logging.getLogger("accel_core")


def verify_checkpoint(path: str | Path) -> dict[Path | str, str | None]:
    """Read every byte of a state, an export, or all in a folder, and return what is wrong with each.

    None stands for what is good. States and exports of older versions have no digests. Of these only sizes
    are compared, and whether they can be read; the log names them. What is unfinished or foreign is left out.
    Nothing is changed.

    Args:
        path: of this machine, or the address of a store, such as that of a mirror, `"s3://bucket/run1"`.
            From a store one file at a time is copied to the folder for temporary files, and removed again.

    Returns:
        What is wrong with each, by its path; by its address as text if it stands in a store.

    Raises:
        CheckpointError: there is nothing at `path`, or the store does not answer.
        ConfigurationError: `path` cannot be a path or an address.
    """
    place = check_place_in_reach("path", path, _WAY_OUT)
    if isinstance(place, Address):
        return _verify_store(place)
    return _verify_folder(place)


def _verify_folder(path: Path) -> Verified:
    if not os.path.lexists(path):
        raise CheckpointError(f"'{path}' does not exist. {_WAY_OUT}")
    if path.is_file():
        return {path: _flaw_of_export(path)}
    state = examine(path)
    if not isinstance(state, NoState) or state.kind in (Kind.DAMAGED, Kind.UNKNOWN_FORMAT):
        return {path: _flaw_of_state(path, state)}
    found: Verified = {}
    for name in sorted(name for name, _ in entries_of(path)):
        state = examine(path / name)
        if not isinstance(state, NoState) or state.kind in (Kind.DAMAGED, Kind.UNKNOWN_FORMAT):
            found[path / name] = _flaw_of_state(path / name, state)
    for file in sorted(path.glob("*")):
        if file.suffix in _EXPORTS and file.is_file():
            flaw = _flaw_of_export(file)
            if not _is_foreign(file, flaw):
                found[file] = flaw
    return found


def _verify_store(address: Address) -> Verified:
    unreadable = f"'{address}' could not be read"
    store = retried(lambda: Store(address), f"'{address}' could not be opened")
    kind = retried(store.kind, unreadable)
    if kind == "file":
        return {str(address): _flaw_of_export(address)}
    text = retried(lambda: store.read(STATE_FILE), unreadable)
    if text is not None:
        return {str(address): _flaw_of_mirrored(store, "", parse_state_file(text, was_state=True))}
    if retried(lambda: is_marked(store, ""), unreadable):
        return {str(address): _SET_ASIDE}
    contents = retried(lambda: list_mirrored(store), unreadable)
    names = retried(store.file_names, unreadable)
    if kind is None and not names and not retried(store.folders, unreadable):
        raise CheckpointError(f"'{address}' does not exist. {_WAY_OUT}")
    every: dict[str, TrainerState | NoState] = {**contents.states, **contents.unusable}
    found = {name: _flaw_of_mirrored(store, name, every[name]) for name in sorted(every)}
    for name in sorted(contents.leftovers):
        if retried(partial(is_marked, store, name), unreadable):
            found[name] = _SET_ASIDE
    for name in sorted(names):
        file = address / name
        if file.suffix in _EXPORTS and not _is_foreign(file, flaw := _flaw_of_export(file)):
            found[name] = flaw
    return {str(address / name): flaw for name, flaw in found.items()}


def _flaw_of_state(path: Path, state: TrainerState | NoState) -> str | None:
    if isinstance(state, NoState):
        return state.reason
    flaw = find_flaw_of(path, state)
    if flaw is None and path.name.startswith(DAMAGED):
        flaw = _SET_ASIDE
    return _log_if_unchecked(path, state, flaw)


def _flaw_of_mirrored(store: Store, name: str, state: TrainerState | NoState) -> str | None:
    if isinstance(state, NoState):
        return state.reason
    flaw = find_flaw_in_store(store, name, state)
    return _log_if_unchecked(store.address / name if name else store.address, state, flaw)


def _log_if_unchecked(place: Path | Address, state: TrainerState, flaw: str | None) -> str | None:
    if flaw is None and not state.get("digests"):
        _logger.warning("'%s' has no digests, so only the sizes of its files were compared.", place)
    return flaw


def _is_foreign(place: Path | Address, flaw: str | None) -> bool:
    """Whether the flaw of a file is that it is no export at all."""
    return flaw is not None and flaw.startswith(NO_EXPORT.format(place))


def _flaw_of_export(place: Path | Address) -> str | None:
    try:
        read_export(place)
    except StoreError:
        raise
    except CheckpointError as error:
        return str(error)
    return None
