"""Groups of an optimizer with parts of tensors beside plain ones, which torch does not compute together."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from .parts import is_dtensor


def is_mixture(group: dict[str, Any], plain: set[int] | None = None) -> bool:
    """Whether a group of an optimizer has parts of tensors beside plain ones.

    Args:
        plain: `id`s of those that will be plain when the model is in parts; None if it is already.
    """
    held = group["params"]
    return len({is_dtensor(each) if plain is None else id(each) not in plain for each in held}) > 1


def check_mixtures(optimizer: Any, plain: set[int] | None = None) -> None:
    """Raise `ConfigurationError` for a mixture that its optimizer was told to compute at once.

    Args:
        plain: as for `is_mixture`.
    """
    for group in getattr(optimizer, "param_groups", ()):
        fast = [name for name in ("foreach", "fused") if group.get(name)]
        if fast and is_mixture(group, plain):
            raise ConfigurationError(
                f"The {type(optimizer).__name__} has {fast[0]}=True and a group with DTensors beside "
                f"plain tensors, which torch does not compute together. Leave {fast[0]} out, or put "
                "them into groups of their own."
            )


def compute_one_by_one(optimizer: Any) -> None:
    """Let each mixture be computed one by one.

    On a GPU torch's optimizers would by default take all tensors of a group at once.
    """
    for group in getattr(optimizer, "param_groups", ()):
        if "foreach" in group and group["foreach"] is None and is_mixture(group):
            group["foreach"] = False
