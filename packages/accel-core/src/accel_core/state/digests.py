"""SHA-256 of files and of values: computed from the memory that is written, compared when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

Buffer = bytes | memoryview

SMALL = 1 << 16
"""Bytes. Handing less than this to another thread takes longer than hashing it."""

LARGE = 1 << 25
"""Bytes. A piece of this size takes the disk long enough that waiting for it pays."""

_CHUNK = 1 << 20


class Written(NamedTuple):
    """What a file has that was written."""

    size: int
    """In bytes."""
    sha256: str


class HashingFile:
    """A file open for writing that hashes what it writes.

    A large piece is hashed by a second thread while it goes to the disk: both leave Python's lock.
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
        self._size += len(view)
        if len(view) < SMALL:
            self._hash.update(view)
            self._file.write(view)
            return len(view)
        try:
            self._thread = self._thread or ThreadPoolExecutor(1, "accel-digest")
            hashed = self._thread.submit(self._hash.update, view)
        # Python that has begun to end starts no more threads, and waits for a save that is on its way.
        except RuntimeError:
            self._hash.update(view)
            self._file.write(view)
            return len(view)
        try:
            self._file.write(view)
            # The system takes a piece faster than it is hashed, so the disk works on it meanwhile. Without
            # this the whole file would wait for the disk after the last digest.
            if len(view) >= LARGE and not hashed.done():
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            hashed.result()
        return len(view)

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
