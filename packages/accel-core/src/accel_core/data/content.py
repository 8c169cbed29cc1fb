"""Digests of what an object holds, by which is known whether a copy of it is still true."""

from __future__ import annotations

import hashlib
import io
import pickle
import types
from typing import Any

import torch


def digest_of(value: Any) -> bytes | None:
    """Return a digest of the content of `value`, or None if parts of it cannot be read.

    Equal digests mean equal content: the attributes of objects and of their classes, the values of tensors,
    and what lambdas and local functions have captured. Different ones may still be of equal content.
    """
    writer = _HashWriter()
    try:
        _ContentPickler(writer, protocol=5).dump(value)
    except Exception:
        # Whatever an object raises when it is pickled: its content is not known then.
        return None
    return writer.hash.digest()


class _HashWriter:
    """A file that keeps nothing but the digest of what is written: large data is never held twice."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b(digest_size=16)

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return len(data)


class _ContentPickler(pickle.Pickler):
    """Pickles content that is never loaded, so also what pickle refuses or takes by name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _content, (_content_of_tensor(value),)
        if isinstance(value, type):
            return _content, (_content_of_class(value),)
        if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return _content, (id(value.__code__), cells, value.__defaults__, value.__kwdefaults__)
        # A file that is open cannot be pickled; it is the same as long as it is the same object.
        if isinstance(value, io.IOBase):
            return _content, (id(value),)
        return NotImplemented


def _content(*parts: Any) -> None:
    """Stand in for what would build an object again."""


def _content_of_tensor(tensor: torch.Tensor) -> Any:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype)
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        # Reading it would wait for the device.
        return id(tensor), tensor._version, shape, dtype
    # Torch's own way to pickle a tensor writes the address of its memory.
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return values.view(torch.uint8).numpy(), shape, dtype


def _content_of_class(kind: type) -> Any:
    """Return the plain attributes of a class and its bases: switches of a data set often stand there."""
    plain = (bool, int, float, complex, str, bytes, list, tuple, dict, set, type(None))
    attributes = [
        (name, value)
        for base in kind.__mro__
        for name, value in vars(base).items()
        if type(value) in plain and not name.startswith("__")
    ]
    # A class in a function may be made again under its name.
    identity = id(kind) if "<" in kind.__qualname__ else 0
    return kind.__module__, kind.__qualname__, identity, attributes
