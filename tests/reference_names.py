"""Reads the public API of pytorch-accelerated out of its wheel: `python tests/reference_names.py WHEEL`.

A wheel comes by `pip download --no-deps pytorch-accelerated==0.1.61`. Nothing of it is imported: each module is parsed.
"""

import ast
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
PACKAGE = "pytorch_accelerated"
HEADER = """\
The public API of pytorch-accelerated 0.1.61, which docs/migration.md answers name by name. reference_names.py writes this file.
A line is a module or a class, then a function with its arguments, or an attribute that a class or a method sets.
"""


def names_of(wheel: Path) -> str:
    """The whole list."""
    lines = []
    with zipfile.ZipFile(wheel) as files:
        for path in sorted(files.namelist()):
            parts = Path(path).with_suffix("").parts
            if parts[0] != PACKAGE or not path.endswith(".py") or parts[-1].startswith("_"):
                continue
            module = ".".join(parts[1:])
            tree = ast.parse(files.read(path))
            lines += [f"{module}.{line}" for line in _names_in(tree.body)]
    return HEADER + "\n" + "\n".join(lines) + "\n"


def _names_in(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and _is_public(node.name):
            yield f"{node.name}({_arguments(node, drop_self=False)})"
        elif isinstance(node, ast.Assign):
            names = (target.id for target in node.targets if isinstance(target, ast.Name))
            yield from (name for name in names if _is_public(name) and name != "logger")
        elif isinstance(node, ast.ClassDef) and _is_public(node.name):
            yield node.name
            yield from (f"{node.name}.{member}" for member in sorted(set(_members(node))))


def _members(node: ast.ClassDef) -> Iterator[str]:
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            if _is_public(member.name) or member.name == "__init__":
                yield f"{member.name}({_arguments(member, drop_self=True)})"
            yield from (name for name in _attributes_set(member) if _is_public(name))
        elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id
        elif isinstance(member, ast.Assign):
            yield from (target.id for target in member.targets if isinstance(target, ast.Name))


def _attributes_set(method: ast.FunctionDef) -> Iterator[str]:
    """Each `x` of `self.x = …`."""
    for node in ast.walk(method):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr


def _arguments(function: ast.FunctionDef, drop_self: bool) -> str:
    """The names of the arguments with their defaults; what stands in a signature alone."""
    given = function.args
    names = [*given.posonlyargs, *given.args]
    is_static = any(ast.unparse(each) == "staticmethod" for each in function.decorator_list)
    shown = [name.arg for name in names]
    for place, default in enumerate(given.defaults, start=len(names) - len(given.defaults)):
        shown[place] += f"={ast.unparse(default)}"
    shown = shown[1:] if drop_self and not is_static else shown
    shown += [f"*{given.vararg.arg}"] if given.vararg else []
    shown += [name.arg for name in given.kwonlyargs]
    shown += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return ", ".join(shown)


def _is_public(name: str) -> bool:
    return not name.startswith("_")


if __name__ == "__main__":
    LIST.write_text(names_of(Path(sys.argv[1])), encoding="utf-8")
