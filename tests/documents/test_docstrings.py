"""Each public docstring names all arguments and the errors that its function raises: mkdocstrings and linters are content without."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

import public_api

# They mean the same everywhere.
NEEDS_NO_WORD = {"self", "cls", "trainer"}
# "The arguments are those of `predict`."
REFERS = re.compile(r"\barguments are (?:those|as) (?:of|for)\b")


def public_callables() -> Iterator[tuple[str, Any, type | None]]:
    """Each function and method with its name, and its class; of a class that has a constructor, that."""
    for module_name in public_api.MODULES:
        for name, value in vars(importlib.import_module(module_name)).items():
            is_own = getattr(value, "__module__", "").split(".")[0] == module_name.split(".")[0]
            if name.startswith("_") or not is_own:
                continue
            if inspect.isclass(value):
                for member, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    is_generated = member == "__init__" and dataclasses.is_dataclass(value)
                    is_public = member == "__init__" or not member.startswith("_")
                    if inspect.isfunction(function) and is_public and not is_generated:
                        yield f"{module_name}.{name}.{member}", function, value
            elif inspect.isfunction(value):
                yield f"{module_name}.{name}", value, None


def words_on(function: Any, cls: type | None) -> str:
    """The docstring, those of the methods that it overrides, and for a constructor that of its class."""
    if cls is None:
        return function.__doc__ or ""
    parents = [vars(parent).get(function.__name__) for parent in cls.__mro__[:-1]]
    docs = [getattr(parent, "__doc__", None) for parent in parents]
    if function.__name__ == "__init__":
        docs += [parent.__doc__ for parent in cls.__mro__[:-1]]
    return "\n".join(doc for doc in docs if doc)


def errors_raised(function: Any) -> set[str]:
    """The names of classes in `raise` statements of the body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = [error.func if isinstance(error, ast.Call) else error for error in raised]
    return {name.id for name in names if isinstance(name, ast.Name) and name.id[0].isupper()}


def problems_of(function: Any, cls: type | None) -> list[str]:
    words = words_on(function, cls)
    names = [] if REFERS.search(words) else list(inspect.signature(function).parameters)
    missing = [
        name
        for name in names
        if name not in NEEDS_NO_WORD and not name.startswith("_") and not re.search(rf"\b{name}\b", words)
    ]
    # What a method is for may be to raise, as in "raise `AttributeError`".
    silent = errors_raised(function) - {"NotImplementedError"}
    return missing + [error for error in sorted(silent) if error not in words]


CALLABLES = {name: (function, cls) for name, function, cls in public_callables()}


def test_each_docstring_names_all_arguments_and_errors():
    problems = {name: problems_of(*each) for name, each in CALLABLES.items()}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_what_is_read_is_the_public_api():
    assert len(CALLABLES) > 300
    assert {"accel_core.Trainer.train", "accel_callbacks.ModelFreezer.__init__"} <= set(CALLABLES)


@pytest.mark.parametrize(
    ("doc", "problems"),
    [
        ("Do it.", ["way", "ValueError"]),
        ("Do it the `way`. Raises:\n    ValueError: it fails.", []),
        ("Do it; the arguments are those of `train`. Raises `ValueError`.", []),
    ],
)
def test_a_docstring_that_lacks_something_is_found(doc, problems):
    def function(way):
        raise ValueError(way)

    function.__doc__ = doc
    assert problems_of(function, None) == problems
