"""TimmTrainer: mix images and soften targets in training, and evaluate plainly."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from accel_core import DEFAULT_CALLBACKS, ConfigurationError, RunHistory, Trainer, TrainerCallback
from accel_core.extending import (
    COUNTS_BY_DEFAULT,
    check_callable,
    check_choice,
    check_whole_number,
    create_batch_output,
    plain,
    preview,
    unpack_batch,
)

from .import_timm import import_timm


class TimmTrainer(Trainer):
    """Trains image classifiers with timm's mixup, cutmix, label smoothing and binary targets.

    Batches are `(images, targets)`. Targets are class indices of shape `(batch,)`; with `binary_targets` they
    may also be rows of zeros and ones of shape `(batch, classes)`, for images with any number of labels.

    Mixing draws from numpy's global generator, which is part of the training state: a resumed run mixes the
    same. The batch itself does not change, so callbacks see the images as they were. In a batch of odd size
    the last image is not mixed.
    """

    step_counts = COUNTS_BY_DEFAULT

    def __init__(
        self,
        model: nn.Module,
        loss_func: Callable[[Any, Any], torch.Tensor] | None = None,
        optimizer: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        num_classes: int,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mixup_probability: float = 1.0,
        mixup_switch_probability: float = 0.5,
        mixup_mode: str = "batch",
        label_smoothing: float = 0.0,
        binary_targets: bool = False,
        binary_target_threshold: float | None = None,
        eval_loss_func: Callable[[Any, Any], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hold the parts, and choose the losses.

        Args:
            loss_func: loss of training. It gets targets of shape `(batch, classes)` if images are mixed, and
                the batch's own otherwise. None takes cross entropy, or binary cross entropy with
                `binary_targets`.
            num_classes: classes of the targets.
            mixup_alpha: parameter of the beta distribution from which the weight of another image is drawn; 0
                for no mixup.
            cutmix_alpha: parameter of the beta distribution from which the area of the pasted patch is
                drawn; 0 for no cutmix.
            mixup_probability: probability of mixing at all.
            mixup_switch_probability: probability of cutmix if both are on.
            mixup_mode: one draw for the `"batch"`, for each `"pair"` of images, or for each image (`"elem"`).
            label_smoothing: the part of a target that is spread over all classes. Of rows of zeros and ones
                it is the part that is replaced by a half.
            binary_targets: learn for each class whether it is in the image, independently of the others.
            binary_target_threshold: mixed targets above it count as 1, others as 0. None leaves them as they
                are.
            eval_loss_func: loss of evaluation. None takes `loss_func` if there is one and nothing is mixed,
                else cross entropy, or binary cross entropy for targets of shape `(batch, classes)`; both
                without smoothing.
            kwargs: `accelerator` and `seed` of `Trainer`.

        Raises:
            ConfigurationError: timm is missing, or an argument cannot be used.

        Source:
            Mixup: https://arxiv.org/abs/1710.09412. Cutmix: https://arxiv.org/abs/1905.04899. Binary targets:
            https://arxiv.org/abs/2110.00476, section 4.2.
        """
        import_timm()
        # Before anything else is a local variable: these are the arguments by name.
        _check_arguments(locals())
        num_classes = plain(num_classes)
        label_smoothing = plain(label_smoothing)
        binary_target_threshold = plain(binary_target_threshold)
        is_mixed = mixup_alpha > 0 or cutmix_alpha > 0
        _check_loss(loss_func, label_smoothing, is_mixed, binary_targets, binary_target_threshold)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.binary_targets = binary_targets
        self.mixup: Any = None
        """timm's `Mixup`, or None if nothing is mixed.

        Set `mixup.mixup_enabled = False` to end the mixing; the smoothing stays.
        """
        if is_mixed:
            self.mixup = import_timm("timm.data").Mixup(
                mixup_alpha=plain(mixup_alpha),
                cutmix_alpha=plain(cutmix_alpha),
                prob=plain(mixup_probability),
                switch_prob=plain(mixup_switch_probability),
                mode=mixup_mode,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        # A loss for mixed targets of shape (batch, classes) may not take the class indices of evaluations.
        self.eval_loss_func = eval_loss_func or (plain_loss if is_mixed or loss_func is None else loss_func)
        if loss_func is None:
            loss_func = _create_loss(
                0.0 if is_mixed else label_smoothing, is_mixed, binary_targets, binary_target_threshold
            )
        super().__init__(model, loss_func, optimizer, callbacks, run_history, **kwargs)

    def mix(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mixed copies of `images`, and their targets of shape `(batch, classes)`.

        The first image is mixed with the last, the second with the last but one, and so on.
        """
        if self.mixup is None:
            return images, targets
        # Rows of zeros and ones are mixed as they are; class indices become such rows first.
        self.mixup.multi_label = targets.ndim > 1
        # timm takes an even number of images only.
        num_mixed = len(images) - len(images) % 2
        # timm mixes in place, but callbacks are to see the batch as it was.
        images = images.clone()
        parts = []
        if num_mixed:
            _, mixed_targets = self.mixup(images[:num_mixed], targets[:num_mixed])
            parts.append(mixed_targets)
        if num_mixed < len(images):
            # The image left over gets a target of the same shape, and the same smoothing.
            mixup_target = import_timm("timm.data.mixup").mixup_target
            rest = targets[num_mixed:]
            parts.append(
                mixup_target(rest, self.num_classes, 1.0, self.label_smoothing, self.mixup.multi_label)
            )
        return images, torch.cat(parts)

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the loss of the mixed batch; `model_outputs` are those for the mixed images."""
        images, targets = unpack_batch(batch)
        self._check_targets(targets)
        mixed_images, mixed_targets = self.mix(images, targets)
        outputs = self.model(mixed_images)
        return create_batch_output(self, self.loss_func, mixed_images, outputs, mixed_targets)

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return `eval_loss_func` of the batch as it is."""
        images, targets = unpack_batch(batch)
        return create_batch_output(self, self.eval_loss_func, images, self.model(images), targets)

    def _check_targets(self, targets: Any) -> None:
        # The shape alone, since looking at values would wait for the device in each step.
        shape = tuple(getattr(targets, "shape", ()))
        if len(shape) == 1 or (self.binary_targets and shape[1:] == (self.num_classes,)):
            return
        expected = (
            f"of shape (batch,) or (batch, {self.num_classes})"
            if self.binary_targets
            else "class indices of shape (batch,)"
        )
        raise ConfigurationError(
            f"The targets of the batch have the shape {shape}, but must be {expected}. Pass "
            "binary_targets=True for rows of zeros and ones, and num_classes as there are columns."
        )


def plain_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return cross entropy for class indices, binary cross entropy for rows of shape `(batch, classes)`."""
    if targets.ndim == 1:
        return F.cross_entropy(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))


def _create_loss(smoothing: float, is_mixed: bool, binary: bool, threshold: float | None) -> nn.Module:
    """Return the loss of training."""
    # Targets that were mixed have been smoothed already, so `smoothing` is 0 for them.
    losses = import_timm("timm.loss")
    if binary:
        return _BinaryLoss(
            losses.BinaryCrossEntropy(smoothing, target_threshold=threshold, smooth_dense=True)
        )
    if is_mixed:
        return losses.SoftTargetCrossEntropy()  # type: ignore[no-any-return]
    return losses.LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class _BinaryLoss(nn.Module):
    """Gives timm's binary loss targets of the dtype of the outputs, which it leaves to its caller."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.loss(outputs, targets if targets.ndim == 1 else targets.to(outputs.dtype))
        return result


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise unless each argument can be used."""
    num_classes = arguments["num_classes"]
    threshold = arguments["binary_target_threshold"]
    check_whole_number("num_classes", num_classes, "Pass the number of classes of the targets.")
    # Models of timm know their number of classes; that of others shows in the first loss.
    num_outputs = getattr(arguments["model"], "num_classes", num_classes)
    if num_outputs != num_classes:
        raise ConfigurationError(
            f"num_classes is {num_classes}, but the model was created for {num_outputs}. Give both the same "
            "number."
        )
    for name, most, way_out in (
        ("mixup_alpha", math.inf, "Use 0 for no mixup, 0.8 for strong mixing."),
        ("cutmix_alpha", math.inf, "Use 0 for no cutmix, 1 for patches of any size."),
        ("mixup_probability", 1, "Use 1 to mix always."),
        ("mixup_switch_probability", 1, "Use 0.5 for as much mixup as cutmix."),
        ("label_smoothing", 0.999, "Use 0.1, or 0 for none."),
    ):
        _check_number(name, arguments[name], most, way_out)
    if threshold is not None:
        _check_number("binary_target_threshold", threshold, 1, "Use 0.2, or None for soft targets.")
    check_choice("mixup_mode", arguments["mixup_mode"], ("batch", "pair", "elem"))
    check_choice("binary_targets", arguments["binary_targets"], (True, False))
    way_out = "Pass a function such as torch.nn.functional.cross_entropy."
    check_callable("eval_loss_func", arguments["eval_loss_func"], way_out)


def _check_number(name: str, value: Any, most: float, way_out: str) -> None:
    number = plain(value)
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (is_number and 0 <= float(number) <= most and float(number) < math.inf):
        limit = "of at least 0" if most == math.inf else f"from 0 to {most:g}"
        raise ConfigurationError(f"{name} is {preview(value)}, but must be a number {limit}. {way_out}")


def _check_loss(
    loss_func: Any, smoothing: float, is_mixed: bool, binary: bool, threshold: float | None
) -> None:
    """Raise if an argument would have no effect."""
    if loss_func is not None and smoothing and not is_mixed:
        raise ConfigurationError(
            f"label_smoothing is {smoothing}, but loss_func is your own and nothing is mixed, so it would "
            "have no effect. Smooth in the loss function, or leave loss_func out."
        )
    if threshold is not None and (loss_func is not None or not binary):
        raise ConfigurationError(
            f"binary_target_threshold is {threshold}, but belongs to the loss of binary_targets=True. Pass "
            "that without a loss_func, or leave the threshold out."
        )
