"""Files in a store elsewhere, through fsspec: whole or absent, and tried again if the connection breaks.

Nothing here communicates between processes or touches an object of the training, so a thread may call it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..checks.address import Address
from ..checks.values import check_place
from ..errors import AccelError, ConfigurationError, StoreError
from . import files

SECONDS_BETWEEN_TRIES = [1.0, 2.0, 4.0]
"""Pauses before something that failed is tried again while somebody waits for it."""

_NEVER_MENDED = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    # Stores that are only read.
    NotImplementedError,
)
_NEVER_MENDED_BY_NAME = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")

Result = TypeVar("Result")


def is_permanent(error: BaseException) -> bool:
    """Whether trying again mends nothing, as far as the error tells."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return isinstance(error, _NEVER_MENDED) or type(error).__name__ in _NEVER_MENDED_BY_NAME or is_full


def retried(action: Callable[[], Result], what: str) -> Result:
    """Return the result of `action`, which is tried again if the connection breaks.

    Raises:
        StoreError: it failed in a way that waiting does not mend, or again and again.
    """
    pauses = iter(SECONDS_BETWEEN_TRIES)
    while True:
        try:
            return action()
        except AccelError:
            raise
        except Exception as error:
            pause = None if is_permanent(error) else next(pauses, None)
            if pause is None:
                reason = str(error).rstrip(". ") or "it says no more"
                raise StoreError(f"{what}: {type(error).__name__}: {reason}.") from error
            time.sleep(pause)


def check_place_in_reach(name: str, value: Any, way_out: str) -> Path | Address:
    """Return `value` as a path of this machine, or as an address that fsspec can reach.

    Raises:
        ConfigurationError: it is neither.
    """
    place = check_place(name, value, way_out)
    return check_can_open(name, place) if isinstance(place, Address) else place


def check_can_open(name: str, address: Address) -> Address:
    """Return `address`, if fsspec knows such stores. Connects to nothing.

    Raises:
        ConfigurationError: it does not, or needs a package that is not installed.
    """
    import fsspec

    # An address may be a chain, such as `simplecache::s3://bucket/run1`.
    for part in str(address).split("::"):
        protocol = part.partition("://")[0]
        if protocol == part and os.path.isabs(part):
            continue
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(
                f"{name} is '{address}', but {str(error).rstrip('.')}. Install what fsspec needs for "
                f'{protocol!r}; for S3: pip install "accel-core[s3]". Or pass another address.'
            ) from error
    return address


def check_is_elsewhere(name: str, address: Address, other_name: str, other: Path) -> None:
    """Raise `ConfigurationError` if `address` is the folder `other` itself, where both would mix."""
    protocol, _, local = str(address).rpartition("://")
    if protocol in ("", "file", "local") and os.path.realpath(local) == os.path.realpath(other):
        raise ConfigurationError(
            f"{name} is '{address}', which is the folder of {other_name} itself, but must be another place. "
            "Pass a folder of another disk, or the address of a store."
        )


class Store:
    """The files below one address. Names are relative to it, with slashes.

    Its methods raise what fsspec does.
    """

    def __init__(self, address: Address) -> None:
        """Find out how the store is reached. Connects to nothing."""
        # Imported by those alone who use a store.
        from fsspec.core import url_to_fs

        self.address = address
        self._fs, root = url_to_fs(str(address))
        self._root = str(root).rstrip("/")

    def put(self, local: Path, name: str) -> None:
        """Copy a file to the store. If this is killed, a part of it may be there under that name."""
        self._with_folder(name, lambda: self._fs.put_file(str(local), self._at(name)))

    def put_whole(self, local: Path, name: str) -> None:
        """Copy a file to the store, where under that name is then the old content or the new."""
        # Object stores take a file as a whole or not at all. Others have names that can be changed, which
        # in an object store would be a second copy.
        if getattr(self._fs, "async_impl", False):
            self.put(local, name)
            return
        staging = f"{name}.incomplete"
        self.put(local, staging)
        self._fs.mv(self._at(staging), self._at(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with _temporary_file() as local:
            local.write_bytes(content)
            self.put_whole(local, name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none."""
        self._fs.invalidate_cache()
        try:
            content: bytes = self._fs.cat_file(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def get(self, name: str, local: Path) -> None:
        """Copy a file from the store, and have it on the disk at the end."""
        self._fs.invalidate_cache()
        self._fs.get_file(self._at(name), str(local))
        files.sync(local)

    def copy(self, name: str, target: str) -> None:
        """Copy a file inside the store."""
        self._with_folder(target, lambda: self._fs.cp_file(self._at(name), self._at(target)))

    def folders(self) -> set[str]:
        """Return the names of what stands directly below the address and is no file."""
        return {name for name, kind in self._entries() if kind == "directory"}

    def file_names(self) -> set[str]:
        """Return the names of the files directly below the address."""
        return {name for name, kind in self._entries() if kind == "file"}

    def kind(self) -> str | None:
        """Return whether the address is that of a "file" or a "directory"; None if nothing is there."""
        self._fs.invalidate_cache()
        try:
            return str(self._fs.info(self._root)["type"])
        except FileNotFoundError:
            return None

    def _entries(self) -> list[tuple[str, str]]:
        # Else fsspec returns what it had listed before.
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return [(str(entry["name"]).rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries]

    def remove(self, name: str) -> None:
        """Remove a file. Nothing happens if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def remove_folder(self, name: str) -> None:
        """Remove everything below a name."""
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(name), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _with_folder(self, name: str, action: Callable[[], Any]) -> None:
        """Act, and again once the folder is made, if this store has folders and lacks this one."""
        try:
            action()
        except FileNotFoundError:
            top = self._root.partition("/")[0]
            # A bucket that is not there is a mistake in the address, and is never made.
            if getattr(self._fs, "async_impl", False) or not self._fs.exists(top or "/"):
                raise
            self._fs.makedirs(self._at(name).rpartition("/")[0], exist_ok=True)
            action()


@contextlib.contextmanager
def _temporary_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="accel_store_") as folder:
        yield Path(folder, "file")


def store_of(place: Address) -> tuple[Store, str]:
    """Return the store of a single file, and the name of the file in it."""
    return Store(place.parent), place.name


def replace_file(place: Path | Address, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file of this machine, and give it the name or the address `place`.

    There is the old content or the new.

    Raises:
        CheckpointError: it could not be written. What was there is untouched.
    """
    if isinstance(place, Path):
        files.replace_file(place, write)
        return
    what = f"'{place}' could not be written; what was there is untouched"
    with _temporary_file() as folder:
        local = folder.with_name(place.name)
        write(local)

        def put() -> None:
            store, name = store_of(place)
            store.put_whole(local, name)

        retried(put, what)


@contextlib.contextmanager
def readable(place: Path | Address) -> Iterator[Path]:
    """Give a file of this machine with the content of `place`: itself, or a copy that is gone afterwards.

    Raises:
        CheckpointError: it could not be copied from the store.
    """
    if isinstance(place, Path):
        yield place
        return
    with _temporary_file() as folder:
        local = folder.with_name(place.name)

        def get() -> None:
            store, name = store_of(place)
            store.get(name, local)

        retried(get, f"'{place}' could not be read; use another file")
        yield local
