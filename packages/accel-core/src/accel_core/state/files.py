"""File operations that are on the disk when they return, and readers that execute nothing that they read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints, is_typeddict

import safetensors
import safetensors.torch
import torch

from ..errors import AccelError, CheckpointError, DamagedError
from . import safetensors_file
from .digests import HashingFile, memory_of
from .plain import as_plain as as_plain
from .staging import replacing

ORIGIN = "accel_origin"
"""The key under which each file names its run and update; in safetensors among the metadata, as JSON."""

_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')
_UNSEALED = "0" * 64


@contextlib.contextmanager
def create(
    path: Path, kept: Iterable[torch.UntypedStorage] = (), is_hashed: bool = True
) -> Iterator[HashingFile]:
    """Open a new file, and have it on the disk at the end. All files of a save are written through here.

    Args:
        kept: what may be hashed after it was written (see `HashingFile`).
        is_hashed: as there.
    """
    with writing(path), path.open("wb") as file:
        hashing = HashingFile(file, kept, is_hashed)
        try:
            yield hashing
        finally:
            hashing.close()
    sync(path)


def write_object(
    path: Path,
    value: Any,
    origin: Mapping[str, Any] | None = None,
    stays: bool = False,
    is_hashed: bool = True,
) -> HashingFile:
    """Write a plain value with `torch.save`. Returns the file, which is on the disk and has the digest.

    Args:
        origin: goes into a dictionary, under the key `ORIGIN`.
        stays: nothing changes the tensors before the digest is read, so that it may be computed later.
        is_hashed: False if nobody reads the digest.

    Raises:
        ConfigurationError: the value is not plain (see `as_plain`).
    """
    plain = as_plain(value, f"The content of '{path.name}'")
    if origin is not None and type(plain) is dict:
        plain = {ORIGIN: dict(origin), **plain}
    checksums = _no_checksums() if is_hashed else contextlib.nullcontext()
    with create(path, memory_of(plain) if stays else (), is_hashed) as file, checksums:
        torch.save(plain, file)  # type: ignore[arg-type]
    return file


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    """Let `torch.save` compute no CRC-32 of each tensor: the digest of the file guards all of it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    origin: Mapping[str, Any] | None = None,
    stays: bool = False,
    is_hashed: bool = True,
) -> HashingFile:
    """Write dense tensors as safetensors. Those that share memory are written each on its own.

    Args:
        origin: goes among the metadata.
        stays, is_hashed: as in `write_object`.
    """
    metadata = {"format": "pt"} if origin is None else {"format": "pt", ORIGIN: json.dumps(dict(origin))}
    with create(path, memory_of(tensors) if stays else (), is_hashed) as file:
        for piece in safetensors_file.pieces(tensors, metadata):
            file.write(piece)
    return file


def write_bytes(path: Path, content: bytes) -> HashingFile:
    """Write `content` as it is."""
    with create(path) as file:
        file.write(content)
    return file


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write `pieces` one after the other; their digest is known."""
    with create(path, is_hashed=False) as file:
        for piece in pieces:
            file.write(piece)


def write_json(path: Path, value: Any, is_sealed: bool = False) -> HashingFile:
    """Write `value`, made of what JSON knows, for people to read.

    Args:
        is_sealed: the last key of the dictionary is a digest of all the rest, which `read_json` checks.
    """
    with writing(path):
        value = {**value, "sha256": _UNSEALED} if is_sealed else value
        text = (json.dumps(value, indent=2) + "\n").encode()
    return write_bytes(path, sealed(text) if is_sealed else text)


def sealed(text: bytes) -> bytes:
    """Return a JSON text with its last value, a digest, replaced by that of the text with zeros there."""
    found = _SEAL.search(text)
    if found is None:
        raise ValueError("The text does not end with a digest.")
    blank = text[: found.start(1)] + _UNSEALED.encode() + text[found.end(1) :]
    digest = hashlib.sha256(blank).hexdigest().encode()
    return text[: found.start(1)] + digest + text[found.end(1) :]


def read_object(path: Path, form: Any = object) -> Any:
    """Read what `write_object` wrote, tensors on the CPU, without the origin.

    Raises `CheckpointError` for any other file, or another `form`.
    """
    value, _ = read_with_origin(path)
    if flaw := find_flaw(value, form):
        raise DamagedError(f"'{path}' is damaged; use another checkpoint: {flaw}.")
    return value


def read_with_origin(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """Read what `write_object` wrote, and its origin, which is None for a file that has none."""
    with reading(path), warnings.catch_warnings():
        # Torch tells how it checks a file; if that fails there is an error.
        warnings.simplefilter("ignore")
        value = torch.load(path, map_location="cpu", weights_only=True)
    origin = value.pop(ORIGIN, None) if type(value) is dict else None
    return value, origin if isinstance(origin, dict) else None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read what `write_tensors` wrote, to the CPU. Raises `CheckpointError` for any other file."""
    with reading(path):
        return safetensors.torch.load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file. Raises `CheckpointError` for any other file."""
    with reading(path), safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote. Raises `CheckpointError` for any other file."""
    with reading(path):
        return json.loads(path.read_bytes())


def is_sealed(text: bytes) -> bool:
    """Whether a JSON text ends with the digest of all the rest."""
    return _SEAL.search(text) is not None and sealed(text) == text


def find_flaw(value: Any, form: Any, name: str = "the content") -> str | None:
    """What is wrong with `value`.

    Its `form` is a type, or the forms of the keys that it needs: a dictionary or `TypedDict`.
    """
    needed = getattr(form, "__required_keys__", None)
    form = get_type_hints(form) if is_typeddict(form) else form
    kind = dict if isinstance(form, dict) else get_origin(form) if get_origin(form) in (dict, list) else form
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        return f"{name} is {value!r:.60}, not of the type {getattr(kind, '__name__', kind)}"
    if not isinstance(form, dict):
        return None
    if missing := (form.keys() if needed is None else needed) - value.keys():
        return f"{min(missing)!r} is missing"
    there = {key: part for key, part in form.items() if key in value}
    return next(filter(None, (find_flaw(value[key], part, repr(key)) for key, part in there.items())), None)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file and give it the name `path`: there is the old content or the new."""
    with writing(path, "could not be written; what was there is untouched"):
        make_folder(path.parent)
        with replacing(path) as staging:
            write(staging)
            sync(staging)
            rename(staging, path)


def make_folder(path: Path) -> None:
    """Make the folder, and those above it, where they are missing."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)  # Another process may have made it meanwhile.
        sync(path.parent)


def make_staging(path: Path) -> None:
    """Make a folder that `rename` names at the end. Nobody reads it before, so nothing waits for the disk."""
    path.mkdir()


def rename(source: Path, target: Path) -> None:
    """Give a file or a folder another name. A file takes the place of the `target` that is there."""
    source.replace(target)
    sync(target.parent)


def remove_folder(path: Path) -> None:
    """Remove the folder with all that is in it."""
    shutil.rmtree(path)


def sync(path: Path) -> None:
    """Wait until the content of the file, or the names in the folder, are on the disk."""
    if not (path.is_dir() and os.name == "nt"):  # Windows opens no folders.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise what fails within as a `CheckpointError`: as damage, unless the disk does not answer."""
    try:
        with raising_checkpoint_error(path, "could not be read; use another checkpoint"):
            yield
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise DamagedError(str(error)) from error.__cause__


def writing(
    path: Path, what: str = "could not be written"
) -> contextlib.AbstractContextManager[None, bool | None]:
    """Raise what fails within as a `CheckpointError`, which says what to do if it is the disk."""
    for_disk = " Save to another place, or make room there and let this process write."
    return raising_checkpoint_error(path, what, for_disk=for_disk)


@contextlib.contextmanager
def raising_checkpoint_error(path: Path, what: str, for_disk: str = "") -> Iterator[None]:
    """Raise what fails within as a `CheckpointError` about the file; an error of accel passes as it is.

    Args:
        for_disk: the end of the message, if it is the disk that fails.
    """
    try:
        yield
    except AccelError:
        raise
    except Exception as error:
        # torch.save hides the error of the disk behind one of its own, and torch.load advises to trust the
        # file.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        is_refused = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it is damaged or holds objects" if is_refused else str(cause).rstrip(". ")
        advice = for_disk if isinstance(cause, OSError) else ""
        raise CheckpointError(f"'{path}' {what}: {type(cause).__name__}: {reason}.{advice}") from error
