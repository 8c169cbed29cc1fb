"""AdaptiveGradientClippingCallback: clip gradients by the size of their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import check_positive

from .import_timm import import_timm

if TYPE_CHECKING:
    from accel_core import Trainer


class AdaptiveGradientClippingCallback(TrainerCallback):
    """Clip the gradient of each unit to `clip_factor` times the norm of its weights, before every update.

    Use it with any trainer and any model. It clips once per update, before `gradient_clip_norm` and
    `gradient_clip_value` of `train`, the gradients of all processes together. The classifier of a timm
    model is not clipped, as the paper advises.

    Args:
        clip_factor: largest norm of a gradient, as a fraction of the norm of the weights.
        eps: smallest norm that weights are taken to have; without it weights at zero would never learn.

    Raises:
        ConfigurationError: timm is missing, or an argument is not above 0.

    Source: https://arxiv.org/abs/2102.06171, section 4.1.
    """

    order = 710
    """After callbacks that record the norm of the gradients as they are before clipping."""

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3) -> None:
        way_out = "The paper uses 0.01; larger values clip less."
        self.clip_factor = check_positive("clip_factor", clip_factor, way_out)
        self.eps = check_positive("eps", eps, "The paper uses 1e-3.")
        self._clip = import_timm("timm.utils.agc").adaptive_clip_grad
        self._parameters: list[nn.Parameter] = []

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Choose the parameters to clip; raise `ConfigurationError` if an engine shards them."""
        if trainer.engine.shards_parameters:
            raise ConfigurationError(
                "AdaptiveGradientClippingCallback needs whole parameters, but "
                f"{trainer.engine.name} shards them. Leave the callback out, or use DDP."
            )
        model: Any = trainer.get_model(keep_torch_compile=False)
        classifier = model.get_classifier() if hasattr(model, "get_classifier") else ()
        # Distilled models have two classifiers.
        heads = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        not_clipped = {id(parameter) for head in heads for parameter in head.parameters()}
        self._parameters = [parameter for parameter in model.parameters() if id(parameter) not in not_clipped]

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Clip the gradients of the update."""
        # Gradients of float16 are still multiplied by the scale, so the limit is too.
        scaler = trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._clip(self._parameters, self.clip_factor * scale, self.eps)
