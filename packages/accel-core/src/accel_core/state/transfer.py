"""Files of mirrored states, copied to this machine and compared with what was written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from . import files
from .checkpoint import STATE_FILE, TrainerState, find_mismatch
from .store import Store, retried


def fetch_file(store: Store, name: str, folder: Path, state: TrainerState, relative: str) -> str | None:
    """Copy a file of the mirrored state `name` into `folder`, and return what is wrong with it.

    Args:
        name: of the state's folder in the store; empty if the address of the store is that of the state.

    Raises:
        StoreError: the store does not answer.
    """
    flaw = _fetch_once(store, name, folder, state, relative)
    # Once more, since a transfer may have broken off.
    return flaw and _fetch_once(store, name, folder, state, relative)


def _fetch_once(store: Store, name: str, folder: Path, state: TrainerState, relative: str) -> str | None:
    local = folder / relative
    place = f"{name}/{relative}".lstrip("/")
    files.make_folder(local.parent)

    def get() -> bool:
        try:
            store.get(place, local)
        # Removed meanwhile, or never there.
        except FileNotFoundError:
            return False
        return True

    if not retried(get, f"'{store.address}/{place}' could not be downloaded"):
        return f"is damaged: {relative} is not there"
    if relative != STATE_FILE and local.stat().st_size != state["files"][relative]:
        return f"is damaged: {relative} has another size"
    return find_mismatch(folder, state, [relative])


def find_flaw_in_store(store: Store, name: str, state: TrainerState) -> str | None:
    """Return which file of a mirrored state is missing or is not what was written; None if none is.

    Reads all of it. One file at a time stands in the folder for temporary files of this machine.

    Raises:
        StoreError: the store does not answer.
    """
    for relative in sorted(state["files"]):
        with tempfile.TemporaryDirectory(prefix="accel_mirror_") as folder:
            flaw = fetch_file(store, name, Path(folder), state, relative)
        if flaw is not None:
            return flaw
    return None
