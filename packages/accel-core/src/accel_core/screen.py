"""Fits what is printed into the columns of a terminal, and knows notebooks."""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

DEFAULT_COLUMNS = 80
"""Of a terminal that claims to have no width, as in some containers."""


def columns_of(stream: Any = None) -> int | None:
    """Return the columns of the terminal behind `stream`, or None if it is a file, a pipe or a notebook.

    Args:
        stream: standard output if None.
    """
    stream = sys.stdout if stream is None else stream
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS if stream.isatty() else None
    # What stands in for a stream, as in a notebook or a test, may have neither a number nor a terminal.
    except (AttributeError, OSError, ValueError):
        return None


def width_of(text: str) -> int:
    """Return how many columns `text` takes: letters of East Asia take two, accents that combine none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def separator(stream: Any = None) -> str:
    """Return what stands between two values: a dot, or a comma where `stream` cannot write it."""
    stream = sys.stdout if stream is None else stream
    try:
        "·".encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeError, LookupError):
        return ", "
    return " · "


def join_fields(start: str, fields: Sequence[str], columns: int | None, between: str = " · ") -> str:
    """Return `start` and `fields` in lines that are no longer than `columns`; None is one line of any length.

    A field is broken only if it is longer than a line by itself.
    """
    lines = [start]
    is_first = True
    for field in fields:
        joined = f"{lines[-1]}{'  ' if is_first and start else '' if is_first else between}{field}"
        if columns is None or width_of(joined) <= columns:
            lines[-1] = joined
        else:
            # Indented, so that one sees which lines begin an epoch.
            lines.append(f"  {field}")
        is_first = False
    return "\n".join(wrap(line, columns) for line in lines if line)


def wrap(text: str, columns: int | None) -> str:
    """Return `text` broken between words into lines no longer than `columns`; None leaves it as it is."""
    if columns is None:
        return text
    # Measured in letters: only for wide ones is a line shorter than it might be.
    widest = max((width_of(letter) for letter in text), default=1)
    at_most = max(columns // max(widest, 1), 1)
    lines = [
        textwrap.fill(line, at_most, subsequent_indent="  " if at_most > 20 else "", drop_whitespace=True)
        if width_of(line) > columns
        else line
        for line in text.split("\n")
    ]
    return "\n".join(lines)


def notebook() -> Any:
    """Return the shell of the notebook that this runs in, or None."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    # Libraries import ipykernel outside of notebooks too; only the shell of a notebook has a kernel.
    return shell if hasattr(shell, "kernel") else None
