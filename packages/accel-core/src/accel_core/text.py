"""Helps to write messages: suggests a name, previews a value, counts things, ends a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import torch


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the likeliest of `known`, or an empty string."""
    # Below a likeness of 0.5, from 0 to 1, a suggestion is rarely what was meant.
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def preview(value: Any) -> str:
    """Return what `value` looks like, on one line of at most 120 characters."""
    # The numbers of a tensor say less about a mistake than its shape.
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = f"the class {value.__name__}" if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def counted(number: float | str, things: str) -> str:
    """Return a number and what it counts, as in "1 batch" and "2 batches".

    Args:
        number: as it is, or written already, such as "1,024".
        things: in the plural, such as "batches" or "more parameters".
    """
    written = (
        number if isinstance(number, str) else f"{number:g}" if isinstance(number, float) else str(number)
    )
    if written == "1":
        things = things.removesuffix("es" if things.endswith(("ches", "sses")) else "s")
    return f"{written} {things}"


def with_full_stop(error: Exception) -> str:
    """Return the message of `error`, ended by one full stop."""
    # Other libraries end their messages with a full stop, or without one.
    return f"{str(error).rstrip('. ')}."
