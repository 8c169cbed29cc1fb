"""What the reference leaves out of the code, so that it shows what a reader uses."""

from typing import Any

import griffe


class LeaveOutTheInside(griffe.Extension):
    """Shows no expressions of constructors, and of their docstrings what stands below the first sentence."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, **_kwargs: Any
    ) -> None:
        # `self.limit = check_positive("limit", limit)` tells nothing; `order = 800` of a class does.
        if "class-attribute" not in attr.labels:
            attr.value = (
                None if "instance-attribute" in attr.labels else attr.value
            )

    def on_function_instance(
        self, *, func: griffe.Function, **_kwargs: Any
    ) -> None:
        # The class has a docstring of its own, and both are shown as one.
        if func.name == "__init__" and func.docstring is not None:
            func.docstring.value = func.docstring.value.partition("\n\n")[2]
