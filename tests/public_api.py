"""List the public names and signatures of the three packages in tests/public_api.txt, for a person to read: `hatch run api`."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_suffix(".txt")
MODULES = (
    "accel_core",
    "accel_core.testing",
    "accel_callbacks",
    "accel_integrations.samplers",
    "accel_integrations.schedulers",
    "accel_integrations.timm_adapter",
    "accel_integrations.transformers_adapter",
)
HEADER = """\
The public names of accel: what users import and call. `hatch run api` writes this file, and a test compares it with the code.
A change of a line is a change for users: docs/versions.md says what it takes.
"""


def public_api() -> str:
    """The whole list."""
    return (
        HEADER + "".join(f"\n\n# {name}\n\n" + "\n".join(_lines_of_module(name)) for name in MODULES) + "\n"
    )


def _lines_of_module(module_name: str) -> Iterator[str]:
    module = importlib.import_module(module_name)
    for name, value in sorted(vars(module).items()):
        # What a module has imported from a sibling only to use it is not its own.
        is_foreign = getattr(value, "__module__", module_name).split(".")[0] != module_name.split(".")[0]
        if (
            name.startswith("_")
            or inspect.ismodule(value)
            or (is_foreign and not isinstance(value, (str, tuple)))
        ):
            continue
        if inspect.isclass(value):
            yield from _lines_of_class(name, value)
        elif callable(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name} = {_shown(value)}"


def _lines_of_class(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    own = [base for base in cls.__mro__ if base.__module__.startswith("accel_")]
    if (
        issubclass(cls, tuple)
        or dataclasses.is_dataclass(cls)
        or "__init__" in {key for base in own for key in vars(base)}
    ):
        yield f"    {name}{_signature(cls)}"
    for member in sorted({key for base in own for key in vars(base) if not key.startswith("_")}):
        value = inspect.getattr_static(cls, member)
        # Which events a callback hears is its own business.
        if member.startswith("on_") and cls.__name__ != "TrainerCallback":
            continue
        # What is inherited unchanged from another public class is listed there.
        if any(member in vars(base) for base in own[1:] if _is_public(base)) and member not in vars(cls):
            continue
        if isinstance(value, property):
            yield f"    {member}  (property)"
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"    {member}{_signature(getattr(cls, member))}  ({type(value).__name__})"
        elif inspect.isfunction(value):
            yield f"    {member}{_signature(value)}"


def _is_public(cls: type) -> bool:
    return any(getattr(importlib.import_module(name), cls.__name__, None) is cls for name in MODULES)


def _signature(function: Any) -> str:
    """Names, order and defaults of the arguments; types are checked by mypy, and would only hide them."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    signature = inspect.Signature([parameter for parameter in parameters if parameter.name != "self"])
    return re.sub(r"<(?:class|function) '?([\w.]+)'?(?: at 0x\w+)?>", r"\1", str(signature))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(item.__name__ if inspect.isclass(item) else repr(item) for item in value)})"
    return repr(value)


if __name__ == "__main__":
    LIST.write_text(public_api(), encoding="utf-8")
