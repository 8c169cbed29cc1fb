"""Warns, once a run, of mistakes that train without an error and learn nothing good."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..callbacks.callback_list import CallbackList
from ..engines.engine import Engine
from ..errors import AccelWarning
from ..text import counted

_ELEMENTWISE = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.KLDivLoss: F.kl_div,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}
"""Losses of torch that broadcast outputs and targets of different shapes; others raise."""

_STEP_EVENTS = ("on_train_step_start", "on_train_step_end", "on_eval_step_start", "on_eval_step_end")
_MOST_NAMES = 5


def warn_of_loss(loss_func: Any, outputs: Any, targets: Any) -> None:
    """Warn if a loss of torch compares each output with each target, or is a sum."""
    settings = getattr(loss_func, "keywords", {})
    function = getattr(loss_func, "func", loss_func)
    name = getattr(function, "__name__", type(function).__name__)
    is_module = isinstance(loss_func, nn.modules.loss._Loss)
    is_torchs = is_module or getattr(F, name, None) is function
    if is_torchs and (getattr(loss_func, "reduction", None) or settings.get("reduction")) == "sum":
        _warn(
            f"loss_func is {name} with reduction='sum', but accel weights each batch as if its loss were the "
            "mean over its samples, so epoch losses and accumulated updates depend on the batch size. Use "
            "reduction='mean'."
        )
    is_elementwise = type(loss_func) in _ELEMENTWISE or any(
        function is known for known in _ELEMENTWISE.values()
    )
    if not is_elementwise or not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return
    if outputs.shape == targets.shape or outputs.numel() != targets.numel():
        return
    try:
        shape = torch.broadcast_shapes(outputs.shape, targets.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        # Torch raises an error of its own.
        return
    if shape.numel() > outputs.numel():
        _warn(
            f"The outputs have the shape {tuple(outputs.shape)} and the targets {tuple(targets.shape)}, so "
            f"{name} compares every output with every target. "
            f"{_way_to_one_shape(outputs.shape, targets.shape)}"
        )


def _way_to_one_shape(outputs: torch.Size, targets: torch.Size) -> str:
    """Return how the model or the data adds or drops a last dimension of 1, if that is what differs."""
    # The last dimension of a batch is the last of a sample too.
    if outputs == (*targets, 1):
        of_model, of_data = "squeeze", "unsqueeze"
    elif targets == (*outputs, 1):
        of_model, of_data = "unsqueeze", "squeeze"
    else:
        return "Give both the same shape, in the model or in the data set."
    return (
        f"Give both the same shape: return outputs.{of_model}(-1) from the model, or targets.{of_data}(-1) "
        "from the data set."
    )


def warn_of_batch(batch: Any, step_class: type, callbacks: CallbackList) -> None:
    """Warn if the default step leaves out elements of `batch` that nobody else reads.

    Args:
        step_class: defines the step that was called.
    """
    is_default = step_class.__module__.partition(".")[0] in ("accel_core", "accel_integrations")
    if not is_default or not isinstance(batch, (tuple, list)) or len(batch) < 3:
        return
    listeners = (callback for event in _STEP_EVENTS for callback in callbacks.listeners(event))
    # The number of a sample, for example, travels in the batch for callbacks.
    if not all(map(_may_number_samples, batch[2:])) and not any(
        callback.reads_batches for callback in listeners
    ):
        _warn(
            f"The batch has {counted(len(batch), 'elements')}, but the default step takes the first two as "
            "inputs and targets and ignores the rest. To use them (sample weights, for example), override "
            "calculate_train_batch_loss and calculate_eval_batch_loss. Otherwise return pairs from the "
            "data set."
        )


def _may_number_samples(part: Any) -> bool:
    """Whether `part` has another whole number for each sample, as numbers of samples are."""
    is_whole = isinstance(part, torch.Tensor) and not part.is_floating_point() and part.dtype != torch.bool
    return is_whole and part.ndim == 1 and len(part.unique()) == len(part)


def warn_of_unreached(
    engine: Engine, optimizer: Any, modules: dict[str, Any], overrides_backward: bool
) -> None:
    """Warn if trainable parameters that the optimizer holds have no gradient at the first update.

    On several processes DDP raises an error of its own. Where a gradient may have been used already,
    nothing is known: in engines that step in backward, with hooks that do, and in a `backward_step` of
    the user's own.

    Args:
        modules: the modules that have the parameters, by name; the model is the first, named "".
    """
    is_sure = engine.group.is_single and not engine.shards_parameters and not overrides_backward
    if not is_sure or not (engine.may_skip_updates or engine.bypasses_accelerate(optimizer)):
        return
    held = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in held):
        return
    unreached = [parameter for parameter in held if parameter.grad is None]
    if not unreached:
        return
    if len(unreached) == len(held):
        _warn(
            "The loss depends on no parameter that the optimizer holds, so nothing is trained. Compute the "
            "loss from the outputs of self.model, and create the optimizer from model.parameters()."
        )
        return
    names = {
        id(parameter): f"{prefix}{name}"
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    # `check_trainable` has warned of parameters that are in no module of the trainer.
    found = [names[id(parameter)] for parameter in unreached if id(parameter) in names]
    if not found:
        return
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    _warn(
        f"The first update has no gradient for {found[:_MOST_NAMES]}{more}, which the optimizer holds, so "
        "they are not trained. Use them in forward, or freeze them with requires_grad_(False). If only some "
        "batches use them, ignore this warning."
    )


def _warn(message: str) -> None:
    # The line of the user's that called `train` is too far above for any fixed level.
    warnings.warn(message, AccelWarning, stacklevel=2)
