"""SHA-256 of files and of values: computed from the memory that is written, compared when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

Buffer = bytes | memoryview

SMALL = 1 << 16
"""Bytes. Handing less than this to another thread takes longer than hashing it."""

PIECE = 1 << 25
"""Bytes after which the disk is asked to begin with what it has."""

hashes_beside: ContextVar[bool] = ContextVar("hashes_beside", default=True)
"""Whether a second thread hashes. Each thread has its own answer.

One that writes in the background says no: the training needs the second core.
"""

_CHUNK = 1 << 20


class Written(NamedTuple):
    """What a file has that was written."""

    size: int
    """In bytes."""
    sha256: str


class HashingFile:
    """A file open for writing that hashes what it writes.

    A second thread hashes what is not small while it goes to the disk: both leave Python's lock.
    Nothing is read back, so what is hashed is what the memory held.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0
        self._thread: ThreadPoolExecutor | None = None

    def write(self, data: Buffer) -> int:
        """Write and hash all of `data`, which may change once this has returned."""
        view = memoryview(data).cast("B")
        hashed = self._hash_beside(view) if len(view) >= SMALL and hashes_beside.get() else None
        try:
            for begin in range(0, len(view), PIECE):
                piece = view[begin : begin + PIECE]
                self._file.write(piece)
                self._size += len(piece)
                if len(piece) == PIECE:
                    self._start_disk()
                if hashed is None:
                    self._hash.update(piece)
        finally:
            if hashed is not None:
                hashed.result()
        return len(view)

    def _hash_beside(self, view: memoryview) -> Future[None] | None:
        """Let the second thread hash; return None if there can be none."""
        try:
            self._thread = self._thread or ThreadPoolExecutor(1, "accel-digest")
            return self._thread.submit(self._hash.update, view)
        # Python that has begun to end starts no more threads, and waits for a save that is on its way.
        except RuntimeError:
            return None

    def _start_disk(self) -> None:
        """Ask the system to begin with the last piece."""
        # Else the disk would rest until all is written and hashed. Linux begins to write what it is told to
        # drop, and waits for nothing; what is not on the disk yet stays in memory.
        if hasattr(os, "posix_fadvise"):
            self._file.flush()
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._file.fileno(), self._size - PIECE, PIECE, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def close(self) -> None:
        """End the thread; the file stays open."""
        if self._thread is not None:
            self._thread.shutdown()

    @property
    def written(self) -> Written:
        """Size and digest of what was written so far."""
        return Written(self._size, self._hash.hexdigest())


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content. Raises `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def digest_of_value(value: Any) -> str:
    """Return the SHA-256 of a plain value: of types, names, shapes and bits, whatever file it was in.

    An export carries it, since a file cannot hold the digest of its own bytes.
    """
    digest = hashlib.sha256()
    for piece in _pieces(value):
        view = memoryview(piece).cast("B")
        # With the length before it no piece can pass for the end of the one before.
        digest.update(len(view).to_bytes(8, "little"))
        digest.update(view)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[Buffer]:
    if isinstance(value, torch.Tensor):
        yield from _pieces_of_tensor(value)
    elif isinstance(value, dict):
        yield f"dict {len(value)}".encode()
        for key, inner in value.items():
            yield from _pieces(key)
            yield from _pieces(inner)
    elif isinstance(value, (list, tuple)):
        # torch.Size comes back as it is, a named tuple as none: only the content counts.
        yield f"sequence {len(value)}".encode()
        for inner in value:
            yield from _pieces(inner)
    elif isinstance(value, set):
        yield f"set {sorted(map(repr, value))}".encode()
    elif isinstance(value, (bytes, str)):
        yield type(value).__name__.encode()
        yield value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        # Something that torch reads safely. Its address in memory, which repr may show, must not count.
        yield type(value).__qualname__.encode()
        yield from _pieces(vars(value))
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _pieces_of_tensor(tensor: torch.Tensor) -> Iterator[Buffer]:
    yield f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        # A subclass that is made of other tensors, such as quantised states of optimizers.
        for name in flatten()[0]:
            yield from _pieces_of_tensor(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from _pieces_of_tensor(tensor._indices())
        yield from _pieces_of_tensor(tensor._values())
    elif tensor.layout is not torch.strided:
        # Compressed sparse layouts differ in the names of their indices; their dense values are the same.
        yield from _pieces_of_tensor(tensor.detach().to_dense())
    else:
        yield bytes_of(tensor.int_repr() if tensor.is_quantized else tensor)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bits of a dense tensor in the order of its elements.

    Without a copy if it lies so on the CPU.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # numpy has no bfloat16 and no 8-bit floats, so bits go through as whole numbers.
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
