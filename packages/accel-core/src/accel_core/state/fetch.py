"""Downloads the newest state of a mirror: complete or absent, by one process of each machine."""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path

from ..checks.address import Address
from ..errors import OtherRunError
from . import files
from .checkpoint import STATE_FILE, Kind, NoState, TrainerState, examine, find_mismatch, is_sharded
from .folder import find_flaw_of, list_states, newest_state, raise_nothing_usable
from .lock import locked
from .mirrored import age, list_mirrored, name_on_disk
from .publishing import give_name
from .staging import host_digits
from .store import Store, retried

DOWNLOADS = ".accel_download"
"""Folder inside the cache for the lock and what is being downloaded."""

_logger = logging.getLogger("accel_core.resume")


def fetch_newest(address: Address, cache: Path, verify: bool) -> Path | None:
    """Return the newest state of a mirror on the disk of this machine; None if there is none anywhere.

    Any process may call it at any time: nothing is exchanged between them but by the disk.

    Raises:
        OtherRunError: the cache holds states of another run than the mirror.
        CheckpointError: the store does not answer, or none of its states can be used.
    """
    folder = cache / DOWNLOADS
    with files.raising_checkpoint_error(folder, "could not be made"):
        files.make_folder(folder)

    def tell() -> None:
        _logger.info("Waiting for another process that downloads a state into '%s'.", cache)

    with locked(folder / f"{host_digits()}.lock", tell) as is_alone:
        if is_alone:
            for leftover in folder.glob(f"{host_digits()}_*"):
                shutil.rmtree(leftover, ignore_errors=True)
        store = retried(
            lambda: Store(address), f"'{address}' could not be opened; pass the address of a mirror"
        )
        return _fetch_newest(store, cache, verify)


def _fetch_newest(store: Store, cache: Path, verify: bool) -> Path | None:
    contents = retried(
        lambda: list_mirrored(store),
        f"'{store.address}' could not be listed, so the newest state is not known (to resume from what this "
        f"machine has, pass latest_checkpoint('{cache}'))",
    )
    itself = f"'{store.address}' could not be read"
    if not contents.states and retried(lambda: store.read(STATE_FILE), itself) is not None:
        _logger.warning("'%s' is itself a training state: pass the mirror that holds it.", store.address)
    unusable = {Path(name): state for name, state in contents.unusable.items()}
    for name, reason in contents.unusable.items():
        _logger.warning("'%s/%s' is passed over: it %s.", store.address, name, reason.reason)
    for name, state in reversed(contents.states.items()):
        if (newest := _newest_in(cache, state, verify)) is not None:
            return newest
        flaw = _download(store, name, state, cache)
        if flaw is None:
            return cache / name_on_disk(name)
        _logger.warning("'%s/%s' is passed over: %s.", store.address, name, flaw)
        unusable[Path(name)] = NoState(Kind.DAMAGED, flaw)
    # The mirror is written after the folder, so that a state may stand there alone.
    newest = newest_state(cache, verify)
    if newest is None and unusable:
        raise_nothing_usable(store.address, unusable)
    return newest


def _newest_in(cache: Path, state: TrainerState, verify: bool) -> Path | None:
    """Return the newest intact state in the cache, if it is as new as `state` of the mirror.

    Raises:
        OtherRunError: it is of another run.
    """
    for path, found in reversed(list_states(cache).complete.items()):
        if found["run_id"] != state["run_id"]:
            raise OtherRunError(
                f"'{path}' is a state of the run {found['run_id']!r}, but the mirror has states of the run "
                f"{state['run_id']!r}. Pass an empty folder as cache, or the mirror of that run."
            )
        if age(found) < age(state):
            return None
        flaw = find_flaw_of(path, found) if verify and not is_sharded(found) else None
        if flaw is None:
            return path
        _logger.warning("'%s' is passed over: it %s.", path, flaw)
    return None


def _download(store: Store, name: str, state: TrainerState, cache: Path) -> str | None:
    """Download a state into the cache, and return what is wrong with it; None if it stands there."""
    path = cache / name_on_disk(name)
    _logger.info("Downloading '%s/%s' to '%s'.", store.address, name, path)
    staging = cache / DOWNLOADS / f"{host_digits()}_{secrets.token_hex(4)}" / path.name
    try:
        with files.raising_checkpoint_error(path, "could not be written"):
            files.make_folder(staging)
        for relative in [*sorted(state["files"]), STATE_FILE]:
            flaw = _download_file(store, f"{name}/{relative}", staging / relative, state, relative)
            # Once more, since a transfer may have broken off.
            if flaw is not None:
                flaw = _download_file(store, f"{name}/{relative}", staging / relative, state, relative)
            if flaw is not None:
                return flaw
        found = examine(staging)
        if isinstance(found, NoState):
            return f"it {found.reason}"
        with files.raising_checkpoint_error(path, "could not be written"):
            files.sync(staging)
            give_name(staging, path)
    finally:
        shutil.rmtree(staging.parent, ignore_errors=True)
    return None


def _download_file(store: Store, name: str, local: Path, state: TrainerState, relative: str) -> str | None:
    """Download a file, and return what is wrong with it."""
    files.make_folder(local.parent)

    def get() -> bool:
        try:
            store.get(name, local)
        # Removed meanwhile, or never there.
        except FileNotFoundError:
            return False
        return True

    if not retried(get, f"'{store.address}/{name}' could not be downloaded"):
        return f"{relative} is not there"
    if relative != STATE_FILE and local.stat().st_size != state["files"][relative]:
        return f"{relative} has another size"
    return find_mismatch(local.parents[relative.count("/")], state, [relative])
