"""Losses of torch that are no mean over samples, and the items that they are the mean of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FUNCTIONS = (F.cross_entropy, F.nll_loss)


class CountedLoss:
    """Cross entropy of torch: the mean over targets that are not ignored, weighted by their class.

    Targets that are probabilities, one for each class, are not counted: there torch takes the mean over
    samples.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html
    """

    def __init__(self, loss_func: Any) -> None:
        self._loss_func = loss_func
        self.ignore_index: int = self._setting("ignore_index", -100)
        self.may_be_plain = self.weight is None and self.ignore_index < 0
        """Each target counts once, unless a negative one is among them."""

    @property
    def weight(self) -> torch.Tensor | None:
        """The weights of the classes, looked up at each batch, since a module may have been moved."""
        return self._setting("weight", None)  # type: ignore[no-any-return]

    def _setting(self, name: str, default: Any) -> Any:
        if isinstance(self._loss_func, nn.Module):
            return getattr(self._loss_func, name)
        return getattr(self._loss_func, "keywords", {}).get(name, default)

    def count(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the weight of all targets together, a scalar on their device, which is not waited for."""
        is_counted = targets != self.ignore_index
        weight = self.weight
        if weight is None:
            return is_counted.sum()
        # Ignored targets are no classes, so they borrow the weight of the first one and lose it again.
        weights = weight[targets.long().where(is_counted, 0)] * is_counted
        return weights.sum(dtype=torch.float32 if weights.device.type == "mps" else torch.float64)


def counted_loss(loss_func: Any) -> CountedLoss | None:
    """Return how `loss_func` counts, or None if it is no cross entropy of torch that takes a mean."""
    if isinstance(loss_func, _MODULES):
        # A subclass with a forward of its own may take another mean.
        is_torchs = any(type(loss_func).forward is kind.forward for kind in _MODULES)
        return CountedLoss(loss_func) if is_torchs and loss_func.reduction == "mean" else None
    # A partial holds the function in `func`, and what it was given by name in `keywords`.
    function = getattr(loss_func, "func", loss_func)
    has_positional = bool(getattr(loss_func, "args", None))
    if not any(function is known for known in _FUNCTIONS) or has_positional:
        return None
    takes_mean = getattr(loss_func, "keywords", {}).get("reduction", "mean") == "mean"
    return CountedLoss(loss_func) if takes_mean else None


def count_targets(loss_func: Any, batch: Any) -> float | None:
    """Return what `loss_func` counts in a batch, or None if it is the mean over samples."""
    counted = counted_loss(loss_func)
    if counted is None or not isinstance(batch, (tuple, list)) or len(batch) < 2:
        return None
    targets = batch[1]
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        return None
    # Class weights add up to any number, so what is returned may be no whole one.
    return counted.count(targets).item()
