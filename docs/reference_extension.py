"""What the reference leaves out of the code, so that it shows what a reader uses."""

import copy
from typing import Any

import griffe

HINT = "ForeignName"
"""The class of names that other libraries use, which answer with accel's own."""
INTERNAL = {"argument_sources"}
"""Attributes without an underscore, since subclasses of other packages set them, that no user reads."""


class LeaveOutTheInside(griffe.Extension):
    """Shows no expressions of constructors, of their docstrings what stands below the first sentence, and no empty entries."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, **_kwargs: Any
    ) -> None:
        # `self.limit = check_positive("limit", limit)` and `_field("x")` tell nothing; `order = 800` of a class does.
        is_of_instances = (
            "instance-attribute" in attr.labels
            and "class-attribute" not in attr.labels
        )
        if is_of_instances or str(attr.value).startswith("_"):
            attr.value = None

    def on_function_instance(
        self, *, func: griffe.Function, **_kwargs: Any
    ) -> None:
        # The class has a docstring of its own, and both are shown as one.
        if func.name == "__init__" and func.docstring is not None:
            func.docstring.value = func.docstring.value.partition("\n\n")[2]

    def on_package(self, *, pkg: griffe.Module, **_kwargs: Any) -> None:
        # Bases and functions of other modules are known now, and not while a class is read.
        for owner in classes_of(pkg):
            for name, member in list(owner.members.items()):
                if not isinstance(member, griffe.Attribute):
                    continue
                function = function_of(member)
                if function is not None:
                    owner.set_member(name, function)
                elif is_empty(owner, member):
                    owner.del_member(name)


def classes_of(module: griffe.Module) -> list[griffe.Class]:
    """The classes that a package and its modules define."""
    own = [member for member in module.members.values() if not member.is_alias]
    found = [member for member in own if isinstance(member, griffe.Class)]
    for inner in own:
        if isinstance(inner, griffe.Module):
            found += classes_of(inner)
    return found


def function_of(attribute: griffe.Attribute) -> griffe.Function | None:
    """The function that a line such as `replay = proving.replay` makes a method."""
    if not isinstance(attribute.value, griffe.ExprAttribute):
        return None
    try:
        target = attribute.modules_collection[attribute.value.canonical_path]
    except (KeyError, griffe.GriffeError):
        return None
    return copy.copy(target) if isinstance(target, griffe.Function) else None


def is_empty(owner: griffe.Class, attribute: griffe.Attribute) -> bool:
    """Whether an entry would tell nothing; before, it gets the docstring that a base has for the same name."""
    if attribute.name in INTERNAL or str(attribute.value).startswith(
        f"{HINT}("
    ):
        return True
    if attribute.docstring is None:
        attribute.docstring = docstring_of_base(owner, attribute)
    # Fields have a type and a default, which tell something. What the constructor takes stands among its parameters.
    return attribute.docstring is None and "dataclass" not in owner.labels


def docstring_of_base(
    owner: griffe.Class, attribute: griffe.Attribute
) -> griffe.Docstring | None:
    """The first paragraph of what a base says of the attribute."""
    for base in owner.mro():
        inherited = base.members.get(attribute.name)
        if inherited is not None and inherited.docstring is not None:
            text = inherited.docstring.value.partition("\n\n")[0]
            return griffe.Docstring(text, parent=attribute)
    return None
