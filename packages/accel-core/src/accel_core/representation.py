"""Shows objects by their class, and the arguments that differ from their defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .text import preview

_MISSING = object()


def represent(instance: Any, sources: Mapping[str, str] | None = None) -> str:
    """Return `Class(argument=value)` with the arguments that differ from the defaults.

    An argument is read from the attribute of its name. One that the object keeps nowhere is left out.

    Args:
        sources: the attribute in which an argument is kept, where it has another name: `watched.name`.
    """
    try:
        parameters = inspect.signature(type(instance)).parameters
    # Some classes that are written in C have none.
    except (TypeError, ValueError):
        return f"{type(instance).__name__}()"
    shown = []
    for name, parameter in parameters.items():
        value = _find(instance, (sources or {}).get(name, name))
        if value is not _MISSING and not _is_same(value, parameter.default):
            shown.append(f"{name}={_short(value)}")
    return f"{type(instance).__name__}({', '.join(shown)})"


def _find(instance: Any, path: str) -> Any:
    """Return what stands at `path` among the attributes that the object itself holds."""
    value = instance
    for part in path.split("."):
        held = getattr(value, "__dict__", {})
        value = held.get(part, held.get(f"_{part}", _MISSING))
    return value


def _is_same(value: Any, default: Any) -> bool:
    # What is empty was not given.
    if value is default or (default is None and isinstance(value, (tuple, list, dict, str)) and not value):
        return True
    try:
        # A tensor, say, compares by element. A path is kept where a string was given.
        return bool(value == default) or (isinstance(default, str) and str(value) == default)
    except Exception:
        return False


def _short(value: Any) -> str:
    if isinstance(value, nn.Module):
        return type(value).__name__
    if isinstance(value, Callable) and hasattr(value, "__qualname__"):  # type: ignore[arg-type]
        return str(value.__qualname__)
    return preview(value)
