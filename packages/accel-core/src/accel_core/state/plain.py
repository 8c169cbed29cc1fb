"""What can be saved: plain values, and whatever else torch reads without executing anything."""

from __future__ import annotations

import io
import warnings
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from ..errors import ConfigurationError

_COLLECTIONS: set[type] = {dict, OrderedDict, Counter, list, tuple, set}

_NUMBERS_AND_TEXT: set[type] = {type(None), bool, int, float, complex, str, bytes}

_PLAIN = (
    _COLLECTIONS
    | _NUMBERS_AND_TEXT
    | {torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device}
)


def is_dense(value: Any) -> bool:
    """Whether `value` is a tensor of torch's own classes, or a parameter, with a place for each element."""
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided


def as_plain(value: Any, where: str, key: str = "") -> Any:
    """Return a copy of `value` as `read_object` returns it: with Python's numbers in place of numpy's.

    Tensors are not copied.

    Raises:
        ConfigurationError: something else than None, numbers, strings, tensors, collections of them, and
            what torch itself reads with `weights_only=True`. `where` begins the sentence ("The state of
            'MyCallback'"), the key follows.
    """
    return _as_plain(value, where, key, set(_PLAIN))


def _as_plain(value: Any, where: str, key: str, known: set[type]) -> Any:
    """Do it, and add classes of tensors that torch reads to `known`: a state has many of a class."""
    value = value.item() if isinstance(value, np.generic) else value
    kind = type(value)
    if kind not in known:
        if not _is_read_safely(value):
            raise _refused(value, where, key)
        if isinstance(value, torch.Tensor):
            known.add(kind)
        return value
    if isinstance(value, dict):
        return kind(
            {
                _as_plain(name, where, key, known): _as_plain(item, where, f"{key}.{name}".lstrip("."), known)
                for name, item in value.items()
            }
        )
    if kind in _COLLECTIONS:
        # States of random generators are 625 numbers each: no name of an item is put together for them.
        if _NUMBERS_AND_TEXT.issuperset(map(type, value)):
            return kind(value)
        items = enumerate(value)
        return kind(_as_plain(item, where, f"{key}.{i}".lstrip("."), known) for i, item in items)
    return value


def _is_read_safely(value: Any) -> bool:
    """Ask torch, which knows more classes than we do, and those that their libraries have added."""
    content = io.BytesIO()
    try:
        torch.save(value, content)
        content.seek(0)
        if get_unsafe_globals_in_checkpoint(content):
            return False
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # What the names of classes do not show, such as a class that rebuilds itself from others.
            torch.load(content, map_location="cpu", weights_only=True)
    except Exception:
        # Whatever cannot be saved or read back here could not be later either.
        return False
    return True


def _refused(value: Any, where: str, key: str) -> ConfigurationError:
    kind = type(value)
    is_builtin = kind.__module__ == "builtins"
    name = kind.__name__ if is_builtin else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
    return ConfigurationError(
        f"{where} cannot be saved: {repr(key) if key else 'it'} is a {name}. "
        "Keep tensors, numbers, strings, lists and dicts in state_dict()."
    )
