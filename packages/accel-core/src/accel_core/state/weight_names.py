"""Names of weights without what `torch.compile` and activation checkpointing add.

So plain models read those of compiled and of checkpointed ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where a compiled module, and one that is computed again in backward, keep the module they were made of."""


def plain_name(name: str) -> str:
    """Return the name that a weight has in the model before any of its parts was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED) if _is_wrapped(name) else name


def plain_held(held: Any) -> Any:
    """Return names and shapes of what an optimizer held, by group, with plain names; None is unknown."""
    return held and [[(plain_name(name), shape) for name, shape in group] for group in held]


def with_plain_names(state: Mapping[str, Any] | None) -> Any:
    """Return a module's state with plain names; it is `state` itself if no part of the module is wrapped.

    Of an engine that shards, some processes may have no state of the whole model, but None.
    """
    if state is None or not any(map(_is_wrapped, state)):
        return state
    return _renamed(state, plain_name)


def with_names_of(own_names: Iterable[str], state: Mapping[str, Any]) -> Any:
    """Return `state` with the names that a module has for the same weights.

    Args:
        own_names: those of the module's own state.
    """
    names = list(own_names)
    if not any(map(_is_wrapped, (*names, *state))):
        return state
    by_plain_name = {plain_name(name): name for name in names}
    return _renamed(state, lambda name: by_plain_name.get(plain_name(name), name))


def _is_wrapped(name: str) -> bool:
    return any(part in name for part in _WRAPPED)


def _renamed(state: Mapping[str, Any], rename: Any) -> Any:
    renamed: Any = OrderedDict((rename(name), value) for name, value in state.items())
    # Here torch keeps the versions of the modules, which it looks up by the names of the modules.
    if hasattr(state, "_metadata"):
        renamed._metadata = {plain_name(name): value for name, value in state._metadata.items()}
    return renamed
