"""Create models of timm with your own classifier, and the transforms that fit their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from accel_core import ConfigurationError
from accel_core.extending import check_whole_number, did_you_mean

from .import_timm import import_timm
from .pretrained_weights import find_weights

_SEE = "See timm.list_models('*resnet*')."


class TimmTransforms(NamedTuple):
    """Transforms that turn images into inputs of a model of timm."""

    train: Callable[[Any], Any]
    """Turns a PIL image into a normalised tensor of shape (channels, height, width), with augmentation."""
    evaluation: Callable[[Any], Any]
    """Does the same without anything random."""
    data_config: dict[str, Any]
    """Input size, interpolation, mean, standard deviation and crop, for `timm.data.create_transform`."""


def create_timm_model(
    name: str,
    num_classes: int,
    pretrained: bool = True,
    *,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Return a model of timm with a classifier for `num_classes` classes.

    The weights come from the hub, and stay in its cache. Without a network they come from the cache, or from
    a file: `pretrained_cfg_overlay=dict(file="weights.safetensors")`. `create_timm_transforms(model)` returns
    the transforms.

    Args:
        name: name such as `"resnet50.a1_in1k"`; `timm.list_models(pretrained=True)` lists all.
        num_classes: classes of the data; the classifier is new if the weights were trained for another
            number.
        pretrained: begin with trained weights.
        pretrained_cfg_overlay: replaces parts of what timm knows about the weights.
        cache_dir: folder for downloaded weights, if not the cache of the hub.
        kwargs: further arguments of `timm.create_model`, such as `in_chans`, `img_size` or `drop_path_rate`.

    Raises:
        ConfigurationError: timm is missing, there is no such model, or its weights cannot be reached; nothing
            was downloaded.
    """
    timm = import_timm()
    way_out = "timm.create_model makes models without a classifier."
    num_classes = check_whole_number("num_classes", num_classes, way_out)
    _check_name(name)
    overlay = dict(pretrained_cfg_overlay or {})
    if pretrained:
        # timm tries for minutes before it gives up, and its message does not help.
        overlay |= find_weights(name, overlay, kwargs.get("pretrained_cfg"), cache_dir)
    return timm.create_model(  # type: ignore[no-any-return]
        name,
        pretrained=pretrained,
        num_classes=num_classes,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        **kwargs,
    )


def create_timm_transforms(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, **augmentation: Any
) -> TimmTransforms:
    """Return the transforms for training and evaluation with which `model` was trained, or is meant to be.

    Args:
        model: model of timm, not wrapped.
        input_size: channels, height and width, if not those with which the model was created.
        augmentation: further arguments of `timm.data.create_transform` for training, such as `auto_augment`,
            `re_prob`, `scale`, `hflip` or `color_jitter`; `no_aug=True` for none.

    Raises:
        ConfigurationError: timm is missing, the model is not timm's, or cannot take the size.
    """
    data = import_timm("timm.data")
    if not hasattr(model, "pretrained_cfg"):
        raise ConfigurationError(
            f"model is a {type(model).__name__} without a pretrained_cfg, so its images are not known. "
            "Pass a model of create_timm_model as it is, before anything wraps it."
        )
    # A model may have been created for another size than its weights were trained with.
    size = input_size or import_timm("timm.models").get_model_input_config(model)["input_size"]
    try:
        config = data.resolve_input_data_config(model, {"input_size": size})
    except ValueError as error:
        raise ConfigurationError(
            f"input_size is {input_size}, but does not fit the model: {error} Create the model with in_chans "
            "or img_size."
        ) from error
    return TimmTransforms(
        train=data.create_transform(**config, is_training=True, **augmentation),
        evaluation=data.create_transform(**config, is_training=False),
        data_config=config,
    )


def _check_name(name: Any) -> None:
    """Raise unless timm knows the architecture, and the weights that are named after the dot."""
    models = import_timm("timm.models")
    try:
        source, model_id = models.parse_model_name(name)
        architecture = model_id.partition(".")[0]
        # A name with a source, such as hf-hub, is looked up when its weights are.
        if source is None and models.is_model(architecture):
            models.get_pretrained_cfg(model_id)
    except (AttributeError, ValueError, RuntimeError) as error:
        # What comes after the dot is wrong, or the name is no string at all.
        tags = models.list_models(f"{str(name).partition('.')[0]}.*", pretrained=True)
        raise ConfigurationError(
            f"name is {name!r}, but must be the name of a model of timm: {error} "
            + (f"There are {tags}." if tags else _SEE)
        ) from None
    if source is None and not models.is_model(architecture):
        hint = did_you_mean(architecture, models.list_models()) or f" {_SEE}"
        raise ConfigurationError(f"name is {name!r}, but timm has no such model.{hint}")
