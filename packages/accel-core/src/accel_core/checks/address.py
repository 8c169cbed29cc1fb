"""Addresses of files that lie in a store and not on a disk of this machine, such as `s3://bucket/model.pt`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[:/]")


def is_address(value: Any) -> bool:
    """Whether a text or a `Path` names something in a store. The letter of a drive is no scheme."""
    return _SCHEME.match(str(value)) is not None


def flaw_of_address(text: str) -> str | None:
    """Return what an address lacks; None if nothing."""
    scheme = _SCHEME.match(text)
    if scheme is None or "::" in text:
        return None
    if not text[scheme.end() :].strip("/"):
        return "which names nothing in the store, but must have a name after the scheme"
    if not text.startswith("//", scheme.end() - 1):
        return "in which one slash follows the scheme, but must have two"
    return None


@dataclasses.dataclass(frozen=True)
class Address:
    """A place that fsspec reaches. It names its parts as `pathlib` does."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return repr(self.text)

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.text.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name with its dot, or nothing."""
        _, dot, ending = self.name.rpartition(".")
        return f".{ending}" if dot and ending else ""

    @property
    def stem(self) -> str:
        """The name without its ending."""
        return self.name.removesuffix(self.suffix) if self.suffix else self.name

    @property
    def parent(self) -> Address:
        """What stands before the last slash."""
        return Address(self.text.rpartition("/")[0])

    def with_name(self, name: str) -> Address:
        """Return the same place with another last part."""
        return self.parent / name

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.text}/{name}")
