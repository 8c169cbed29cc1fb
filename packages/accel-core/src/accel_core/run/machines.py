"""Machines with a disk each: what some processes do not see is handed out by the main one."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError, ConfigurationError
from ..processes.collectives import all_gather_object, broadcast_object, run_on_main
from ..state import files
from ..state.checkpoint import STATE_FILE, TrainerState, examine, is_sharded

_CHUNK = 1 << 26
"""Bytes of a file that travel at once."""

SECONDS_UNTIL_SEEN = 5.0
"""Network disks show a new file late."""

_SHARE = "Use a folder on a disk that they share."


def sees(folder: Path, state: TrainerState) -> bool:
    """Whether this process finds the very state there, and not another one of the same name."""
    found = examine(folder)
    same = ("run_id", "run_progress", "files", "digests")
    return isinstance(found, dict) and all(found.get(key) == state.get(key) for key in same)


@contextlib.contextmanager
def handed_out(folder: Path, state: TrainerState, is_main: bool) -> Iterator[Path]:
    """Give a folder in which this process can read a state. Every process takes part.

    It is `folder` itself where all of them see that. Else the main process reads the files and hands them
    out, and one process of each machine that lacks them writes them into a folder that is gone afterwards.

    Raises:
        CheckpointError: an engine has sharded the state, or a machine could not write it.
    """
    lacks = not sees(folder, state)
    lacking = [index for index, other in enumerate(all_gather_object(lacks)) if other]
    if not lacking:
        yield folder
        return
    if is_sharded(state):
        raise CheckpointError(
            f"'{folder}' has sharded files, and the processes {lacking} do not see it. {_SHARE}"
        )
    own: Path | None = None
    try:
        failure = None
        try:
            own = Path(tempfile.mkdtemp(prefix="accel_state_")) if lacks else None
        except OSError as error:
            failure = str(error)
        made = all_gather_object((socket.gethostname(), own))
        used = next((path for host, path in made if _is_here(host, path)), own) if lacks else folder
        is_filled = own is not None and used == own
        failure = _send(folder, [*state["files"], STATE_FILE], is_main, own if is_filled else None, failure)
        failures = [text for text in all_gather_object(failure) if text is not None]
        if failures or used is None:
            raise CheckpointError(
                f"'{folder}' is not seen by the processes {lacking}, and could not be handed out to them: "
                f"{' '.join(failures)}. Make room in their folder for temporary files. Or: {_SHARE}"
            )
        yield used
        # Others of this machine may still be reading.
        all_gather_object(None)
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)


def _is_here(host: str, path: Path | None) -> bool:
    # Containers may have names alike, but do not see each other's disks.
    return host == socket.gethostname() and path is not None and path.is_dir()


def _send(
    folder: Path, names: list[str], is_main: bool, target: Path | None, failure: str | None
) -> str | None:
    """Send files from the main process to those that have a `target`, and return what failed here."""
    for name in names:
        position, is_through = 0, False
        while not is_through:
            piece = b""
            try:
                if is_main:
                    with (folder / name).open("rb") as file:
                        file.seek(position)
                        piece = file.read(_CHUNK)
            except OSError as error:
                failure = failure or f"{name}: {error}"
            piece = broadcast_object(piece)
            try:
                if target is not None and failure is None:
                    with (target / name).open("ab") as file:
                        file.write(piece)
            except OSError as error:
                failure = f"{name}: {error}"
            position += len(piece)
            is_through = len(piece) < _CHUNK
    return failure


def check_is_shared(folder: Path, is_main: bool) -> None:
    """Raise `ConfigurationError` unless all processes see what the main one writes into `folder`.

    Every process takes part.
    """

    def make_probe() -> Path:
        files.make_folder(folder)
        probe = folder / f".accel_probe_{secrets.token_hex(4)}"
        files.write_bytes(probe, b"")
        return probe

    probe: Path = run_on_main(make_probe, is_main)
    give_up = time.monotonic() + SECONDS_UNTIL_SEEN
    while not (found := probe.exists()) and time.monotonic() < give_up:
        time.sleep(0.1)
    blind = [index for index, other in enumerate(all_gather_object(found)) if not other]
    if is_main:
        with contextlib.suppress(OSError):
            probe.unlink()
    if blind:
        raise ConfigurationError(
            f"save_dir is '{folder}', where the processes {blind} do not see what the main one writes. The "
            f"engine shards the model, so each process writes a part of a state. {_SHARE}"
        )
