"""SHA-256 of files and of values: computed from the memory that is written, compared when it is read."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from .plain import is_dense

Buffer = bytes | memoryview

SMALL = 1 << 16
"""Bytes. Handing less than this to another thread takes longer than hashing it."""

PIECE = 1 << 23
"""Bytes after which the disk is asked to begin with what it has."""

_WINDOW = 8 * PIECE
"""Bytes that are looked at to find what is on the disk already. Of a slow disk more is waiting."""

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


class HashedBytes(NamedTuple):
    """The content of a file whose digest is known before it is written."""

    pieces: Sequence[bytes]
    """One after the other they are the content."""
    written: Written


class HashingFile:
    """A file open for writing that hashes what it writes.

    A second thread hashes while this file, and the ones after it, go to the disk: both leave Python's lock.
    Nothing is read back, so what is hashed is what the memory held.
    """

    def __init__(
        self, file: BinaryIO, kept: Iterable[torch.UntypedStorage] = (), is_hashed: bool = True
    ) -> None:
        """Hold the file.

        Args:
            kept: memory that does not change until `written` is read. What is in it may be hashed later than
                it is written.
            is_hashed: False for a file whose digest nobody reads, so that `written` is of no use.
        """
        self._file = file
        self._is_hashed = is_hashed
        self._hash = hashlib.sha256()
        self._size = 0
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None
        # Many small tensors are hashed together.
        self._small: list[Buffer] = []
        self._small_size = 0
        # Held as well, so that no other tensor takes this memory.
        self._kept = sorted(kept, key=torch.UntypedStorage.data_ptr)
        self._begins = [storage.data_ptr() for storage in self._kept]

    def write(self, data: Buffer) -> int:
        """Write all of `data`, which may change once this has returned, unless it is among what is kept."""
        view = memoryview(data).cast("B")
        if not self._is_hashed:
            self._write(view)
        elif len(view) < SMALL:
            self._write(view)
            self._small.append(view if self._is_kept(view) else bytes(view))
            self._small_size += len(view)
            if self._small_size >= SMALL:
                self._hash_pieces(self._take_small(), hashes_beside.get())
        elif hashes_beside.get():
            self._hash_pieces([*self._take_small(), view], True)
            try:
                self._write(view)
            finally:
                if not self._is_kept(view):
                    self._wait()
        else:
            self._hash_pieces(self._take_small(), False)
            # The disk works while a piece is hashed.
            for begin in range(0, len(view), PIECE):
                self._write(view[begin : begin + PIECE])
                self._hash.update(view[begin : begin + PIECE])
        return len(view)

    def _write(self, view: memoryview) -> None:
        for begin in range(0, len(view), PIECE):
            piece = view[begin : begin + PIECE]
            self._file.write(piece)
            self._size += len(piece)
            if len(piece) == PIECE:
                self._start_disk()

    def _take_small(self) -> list[Buffer]:
        small, self._small, self._small_size = self._small, [], 0
        return small

    def _is_kept(self, view: memoryview) -> bool:
        if isinstance(view.obj, bytes):
            return True
        if not (self._kept and view):
            return False
        begin = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        index = bisect.bisect_right(self._begins, begin) - 1
        return index >= 0 and begin + len(view) <= self._begins[index] + self._kept[index].nbytes()

    def _hash_pieces(self, pieces: list[Buffer], is_beside: bool) -> None:
        """Hash what comes next in the file.

        Args:
            is_beside: let the second thread do it, after what it has to do already.
        """
        if is_beside:
            try:
                self._thread = self._thread or ThreadPoolExecutor(1, "accel-digest")
                self._last = self._thread.submit(self._update, pieces)
                return
            # Python that has begun to end starts no more threads, and waits for a save that is on its way.
            except RuntimeError:
                pass
        self._wait()
        self._update(pieces)

    def _update(self, pieces: list[Buffer]) -> None:
        for piece in pieces:
            self._hash.update(piece)

    def _wait(self) -> None:
        """Wait for the second thread."""
        if self._last is not None:
            self._last.result()

    def _start_disk(self) -> None:
        """Let the disk begin with what was written, and drop from memory what is on it already."""
        # Else the disk would rest until all is written. And each piece would take new memory of the system,
        # which can cost ten times as much as the copy into it. Linux begins to write what it is told to drop,
        # and keeps what is not on the disk yet.
        if hasattr(os, "posix_fadvise"):
            self._file.flush()
            with contextlib.suppress(OSError):
                begin = max(0, self._size - _WINDOW)
                os.posix_fadvise(self._file.fileno(), begin, self._size - begin, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    def close(self) -> None:
        """Let the second thread end once it has hashed all; the file stays open."""
        if self._thread is not None:
            self._hash_pieces(self._take_small(), True)
            self._thread.shutdown(wait=False)

    @property
    def written(self) -> Written:
        """Size and digest of what was written so far."""
        self._hash_pieces(self._take_small(), False)
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


def memory_of(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the memory of the dense tensors on the CPU in a plain value."""
    if isinstance(value, torch.Tensor):
        if is_dense(value) and value.device.type == "cpu":
            yield value.untyped_storage()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from memory_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from memory_of(inner)
