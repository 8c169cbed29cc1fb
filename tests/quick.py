"""Which tests are quick: the inner loop, `hatch run test-quick`.

A test is quick, unless it

- is marked `slow`, `seconds`, `gpu` or `network`,
- lies in a folder of `LENGTHY_FOLDERS`, or
- starts a process: by itself, or in a fixture or a function of its own file that it uses, by one of
`STARTERS`.
"""

import inspect
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import case_runner
import launching

LENGTHY_MARKS = ("slow", "seconds", "gpu", "network")
LENGTHY_FOLDERS = ("documents", "packaging", "promises")
STARTERS = (launching.launch, launching.start, case_runner.compare, subprocess)


def is_quick(item: pytest.Function) -> bool:
    """Whether `item` belongs to the inner loop."""
    folders = item.path.relative_to(Path(__file__).parent).parts[:-1]
    if any(item.get_closest_marker(mark) for mark in LENGTHY_MARKS) or set(folders) & set(LENGTHY_FOLDERS):
        return False
    fixtures = [
        fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures
    ]
    return not any(starts_process(function, set()) for function in (item.function, *fixtures))


def starts_process(function: Callable[..., Any], seen: set[Any]) -> bool:
    """Whether `function`, or a function or class of its file that it uses, uses one of `STARTERS`."""
    function = inspect.unwrap(function)
    if function in seen or not inspect.isfunction(function):
        return False
    seen.add(function)
    for name in names_in(function.__code__):
        used = function.__globals__.get(name)
        if any(used is starter for starter in STARTERS):
            return True
        methods = vars(used).values() if inspect.isclass(used) else [used]
        own = [method for method in methods if getattr(method, "__module__", None) == function.__module__]
        if any(starts_process(method, seen) for method in own if callable(method)):
            return True
    return False


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that a function uses and those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)
