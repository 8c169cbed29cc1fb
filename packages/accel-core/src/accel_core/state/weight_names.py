"""Names of weights without what `torch.compile` adds, so that plain models read those of compiled ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

_COMPILED = "_orig_mod"
"""Where a compiled module keeps the module that it was made of."""


def plain_name(name: str) -> str:
    """Return the name that a weight has in the model before any of its parts was compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED) if _COMPILED in name else name


def with_plain_names(state: Mapping[str, Any] | None) -> Any:
    """Return a module's state with plain names; it is `state` itself if no part of the module is compiled.

    Of an engine that shards, some processes may have no state of the whole model, but None.
    """
    if state is None or not any(_COMPILED in name for name in state):
        return state
    return _renamed(state, plain_name)


def with_names_of(own_names: Iterable[str], state: Mapping[str, Any]) -> Any:
    """Return `state` with the names that a module has for the same weights.

    Args:
        own_names: those of the module's own state.
    """
    names = list(own_names)
    if not any(_COMPILED in name for name in (*names, *state)):
        return state
    by_plain_name = {plain_name(name): name for name in names}
    return _renamed(state, lambda name: by_plain_name.get(plain_name(name), name))


def _renamed(state: Mapping[str, Any], rename: Any) -> Any:
    renamed: Any = OrderedDict((rename(name), value) for name, value in state.items())
    # Here torch keeps the versions of the modules, which it looks up by the names of the modules.
    if hasattr(state, "_metadata"):
        renamed._metadata = {plain_name(name): value for name, value in state._metadata.items()}
    return renamed
