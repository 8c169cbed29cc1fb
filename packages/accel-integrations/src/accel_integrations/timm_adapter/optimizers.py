"""Create timm's optimizers and parameter groups, with learning rates by layer under any scheduler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from accel_core import ConfigurationError
from accel_core.extending import check_not_negative, check_positive, did_you_mean

from .import_timm import import_timm

_BASE = "unscaled_lr"
"""Key of a parameter group for its rate before it was multiplied by the scale of its layer."""
_SCALE = "layer_lr_scale"
"""Key for what timm calls `lr_scale`: with that name its schedulers would multiply by it once more."""


def timm_parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.05, layer_decay: float | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """Return parameter groups for any optimizer, with weight decay and learning rates as timm sets them.

    Biases, parameters of one dimension, and those that the model names in `no_weight_decay()` have no weight
    decay.

    Args:
        model: model whose parameters with `requires_grad` are grouped.
        lr: learning rate of the head, and of everything without `layer_decay`.
        layer_decay: each layer learns with this times the rate of the layer above it. Every group has its own
            `lr`, so this holds with any scheduler, and with none. Schedulers of timm that `timm_scheduler_fn`
            makes also multiply their minimum and the start of their warm-up by it, as in timm; those that you
            make by timm's own factory give each layer its rate, and one minimum to all.
        kwargs: further arguments of timm's `param_groups_weight_decay` or `param_groups_layer_decay`.

    Raises:
        ConfigurationError: timm is missing, a rate is not above 0, or `weight_decay` is below it.

    Source: layer-wise rates, https://arxiv.org/abs/2106.08254, section 2.4.
    """
    lr, weight_decay, layer_decay = _check_numbers(lr, weight_decay, layer_decay)
    optim = import_timm("timm.optim")
    # timm's factory of optimizers asks the model for these names, but its functions for groups do not.
    name_exceptions: Any = getattr(model, "no_weight_decay", tuple)
    kwargs = {"no_weight_decay_list": name_exceptions(), **kwargs}
    if layer_decay is None:
        groups = optim.param_groups_weight_decay(model, weight_decay=weight_decay, **kwargs)
    else:
        groups = optim.param_groups_layer_decay(
            model, weight_decay=weight_decay, layer_decay=layer_decay, **kwargs
        )
    # Every optimizer takes its own default otherwise, and the scale would have nothing to multiply.
    for group in groups:
        group["lr"] = lr
    _scale_rates(groups)
    return groups  # type: ignore[no-any-return]


def create_timm_optimizer(
    model: nn.Module,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Return an optimizer of timm's factory, with the parameter groups of `timm_parameter_groups`.

    Args:
        model: the model, whose trainable parameters are optimized.
        lr: learning rate of the head; with `layer_decay` that of each layer before is lower by this factor.
        name: name such as `"adamw"`, `"sgd"`, `"lamb"`, `"muon"`; `timm.optim.list_optimizers()` lists all.
        kwargs: further arguments of `timm.optim.create_optimizer_v2`, such as `momentum`, `betas` or
            `filter_bias_and_bn`.

    Raises:
        ConfigurationError: timm is missing or has no such optimizer, a rate is not above 0, or `weight_decay`
            is below it.
    """
    lr, weight_decay, layer_decay = _check_numbers(lr, weight_decay, layer_decay)
    optim = import_timm("timm.optim")
    try:
        # timm wraps any optimizer in a Lookahead if its name has this prefix.
        optim.get_optimizer_info(str(name).lower().removeprefix("lookahead_"))
    except ValueError:
        hint = (
            did_you_mean(str(name), optim.list_optimizers())
            or " timm.optim.list_optimizers() has all of them."
        )
        raise ConfigurationError(f"name is {name!r}, which is no optimizer of timm.{hint}") from None
    optimizer: Optimizer = optim.create_optimizer_v2(
        model, name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **kwargs
    )
    _scale_rates(optimizer.param_groups)
    return optimizer


@contextlib.contextmanager
def with_unscaled_base(optimizer: Optimizer) -> Iterator[None]:
    """Let schedulers of timm that are built within this context see the rates before the layers' scales.

    They multiply by `lr_scale` themselves from then on. For all others the base of a group is its own scaled
    rate, which is put back afterwards.
    """
    scaled = [group for group in optimizer.param_groups if _BASE in group]
    for group in scaled:
        # A state of an older version has the scale under timm's own name already.
        group["lr_scale"] = group.get(_SCALE, group.get("lr_scale", 1.0))
        group["initial_lr"] = group[_BASE]
    try:
        yield
    finally:
        for group in scaled:
            group["initial_lr"] = group[_BASE] * group["lr_scale"]


def _scale_rates(groups: list[dict[str, Any]]) -> None:
    """Multiply the rates by `lr_scale`."""
    # timm leaves this to its schedulers, so without one of them the scale would have no effect.
    for group in groups:
        if "lr_scale" in group:
            group[_BASE] = group["lr"]
            group[_SCALE] = group.pop("lr_scale")
            group["lr"] = group["lr"] * group[_SCALE]


def _check_numbers(lr: Any, weight_decay: Any, layer_decay: Any) -> tuple[float, float, float | None]:
    way_out = "Use None for one rate for all layers, 0.75 to change early layers less."
    return (
        check_positive("lr", lr, "Use 1e-3 to begin with AdamW, 0.1 with SGD."),
        check_not_negative("weight_decay", weight_decay, "Use 0.05, or 0.0 for none."),
        check_positive("layer_decay", layer_decay, way_out, optional=True),
    )
