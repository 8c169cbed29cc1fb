"""Which streams go on exactly where their state says; all others are read again from their beginning.

| source | restored exactly |
|---|---|
| `StatefulDataLoader` and nodes of torchdata | yes |
| streams of Hugging Face without a shuffle buffer | yes |
| streams of Hugging Face with a shuffle buffer | no: the samples in the buffer are not in the state |
| the user's own | if it has `restores_exactly = True` |
"""

from __future__ import annotations

from typing import Any


def restores_exactly(source: Any) -> bool:
    """Whether the state of `source` is enough to continue with the very next sample."""
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return False
    says = getattr(source, "restores_exactly", None)
    if says is not None:
        return says is True
    packages = {kind.__module__.partition(".")[0] for kind in type(source).__mro__}
    return "torchdata" in packages or ("datasets" in packages and not _has_buffer(source))


def _has_buffer(stream: Any) -> bool:
    """Whether an iterable dataset of Hugging Face shuffles through a buffer, at any place of its chain."""
    chain = [getattr(stream, "_ex_iterable", None)]
    while chain:
        part = chain.pop()
        if "Shuffle" in type(part).__name__ and "Buffer" in type(part).__name__:
            return True
        chain += [inner for inner in (getattr(part, "ex_iterable", None),) if inner is not None]
        chain += getattr(part, "ex_iterables", ())
    return False
