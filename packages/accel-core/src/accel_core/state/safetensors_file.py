"""The bytes of a safetensors file, piece by piece.

`safetensors` writes from Rust, so that nobody can hash what it writes.

Source:
    https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch

from .digests import bytes_of

# In the order in which safetensors puts tensors into a file, from the last to the first.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}

DTYPES = frozenset(_NAMES)
"""What such a file can hold."""


def pieces(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Yield the content of the file. Only one tensor at a time is copied to the CPU."""
    for name, tensor in tensors.items():
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.layout is not torch.strided
            or tensor.dtype not in _NAMES
        ):
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(
                f"{name!r} is no dense tensor of a type that safetensors knows, but {kind}. Save to a .pt "
                "file, which holds any"
            )
    ranks = {dtype: rank for rank, dtype in enumerate(_NAMES)}
    order = sorted(tensors, key=lambda name: (-ranks[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield bytes_of(tensors[name])
