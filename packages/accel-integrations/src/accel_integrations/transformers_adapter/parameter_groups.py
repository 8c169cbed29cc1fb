"""Make parameter groups of models of transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.utils.parametrize

from accel_core.extending import check_not_negative, check_positive

_IS_BIAS = re.compile(r"bias|\brel(ative)?_(attn|attention|pos|position)")
"""Matches names of parameters that are added to attention or activations, of any number of dimensions."""


def transformers_parameter_groups(
    model: torch.nn.Module, lr: float, weight_decay: float = 0.01, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for any optimizer, with weight decay for matrices only, and rates by layer.

    ```python
    groups = transformers_parameter_groups(model, lr=5e-5, weight_decay=0.01, layer_decay=0.9)
    optimizer = torch.optim.AdamW(groups)
    ```

    Parameters of one dimension have no weight decay: biases, and the scales of norms. Nor have biases of more
    dimensions: tables of relative positions, as in T5 and Swin, and what such biases are computed by.

    Args:
        model: model whose parameters with `requires_grad` are grouped.
        lr: learning rate of the head, and of everything without `layer_decay`.
        layer_decay: each layer learns with this times the rate of the layer above it; the embeddings are the
            lowest. Encoder and decoder each have their own lowest layer.

    Raises:
        ConfigurationError: a rate is not above 0, or `weight_decay` below it.

    Source:
        Layer-wise rates: https://arxiv.org/abs/1801.06146, section 3.2, "discriminative fine-tuning".
    """
    lr = check_positive("lr", lr, "Use 5e-5, for example.")
    weight_decay = check_not_negative("weight_decay", weight_decay, "Use 0.01, or 0.0 for none.")
    way_out = "Use None for the same rate everywhere."
    layer_decay = check_positive("layer_decay", layer_decay, way_out, optional=True)
    depths = _depths(model)
    highest = max(depths.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = highest if layer_decay is None else depths[name]
            decays = parameter.ndim > 1 and _IS_BIAS.search(name) is None
            rate = lr * (layer_decay or 1.0) ** (highest - depth)
            group = {"params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0}
            groups.setdefault((depth, decays), group)["params"].append(parameter)
    return list(groups.values())


def _depths(model: torch.nn.Module) -> dict[str, int]:
    """Return the depth of each parameter.

    It is 0 for embeddings, from 1 on for the layers, and one more than that of the last for what follows.
    """
    stacks = _stacks(model)
    # Encoder and decoder end at the same depth, so the shorter of them begins higher.
    top = max(stacks.values(), default=0) + 1
    depths = {}
    is_above = False
    for name, _ in model.named_parameters():
        stack = next((prefix for prefix in stacks if name.startswith(prefix)), None)
        is_above = is_above or stack is not None
        if stack is not None:
            depths[name] = top - stacks[stack] + int(name.removeprefix(stack).partition(".")[0])
        else:
            # Parameters are in the order of their definition: input, layers, head. Some models define
            # embeddings of the decoder after the encoder's layers.
            depths[name] = top if is_above and "embed" not in name else 0
    return depths


def _stacks(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of layers in each list of layers, by the beginning of their parameters' names."""
    lists = {
        f"{name}.": len(module)
        for name, module in model.named_modules()
        # The parts of a parametrized weight are in a list too.
        if isinstance(module, torch.nn.ModuleList)
        and not isinstance(module, torch.nn.utils.parametrize.ParametrizationList)
    }
    # Lists within layers, such as the experts of a mixture, are no layers.
    return {
        name: size
        for name, size in lists.items()
        if not any(name != other and name.startswith(other) for other in lists)
    }
