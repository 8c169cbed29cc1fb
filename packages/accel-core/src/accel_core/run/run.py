"""Run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def note_failures_on(error: BaseException) -> Iterator[None]:
    """Let what fails within be a note of `error`, which is on its way already."""
    try:
        yield
    except Exception as another:
        error.add_note(f"While closing, a callback failed too: {another!r}")
