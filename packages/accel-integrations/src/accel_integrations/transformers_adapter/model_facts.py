"""Look up what a model of transformers takes, and what its loss is the mean of."""

from __future__ import annotations

import inspect
from typing import Any

import torch

IGNORED_LABEL = -100
"""Value of `labels` at positions that no loss of transformers counts."""
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "EncoderDecoderModel")
"""Endings of the names of models that generate: each token has a label."""
_LABELS_TOKENS = ("ForTokenClassification", "ForMaskedLM")


def base_model(model: Any) -> Any:
    """Return the model inside of torch.compile and of adapters of PEFT, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_encoder_decoder(model: torch.nn.Module) -> bool:
    """Whether the model has a decoder with inputs of its own, which may be made of the labels."""
    return bool(getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False))


def input_names(model: torch.nn.Module) -> frozenset[str] | None:
    """Return the entries of a batch that the model's `forward` names; None if it names none and takes all."""
    # `**kwargs` names nothing: many models have it, and pass it on to what refuses unknown entries.
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named) or None


def label_shift(model: torch.nn.Module) -> int | None:
    """Return how many labels at the beginning of a sequence the loss leaves out; None if it counts no tokens.

    It is 1 for causal language models, where each token is predicted from those before it. It is 0 for
    encoder-decoders, which shift the decoder's inputs instead, for masked language models and for classifying
    tokens.
    """
    # The bases too, since a class of the user's own may have another name.
    names = [kind.__name__ for kind in type(base_model(model)).__mro__]
    if any(name.endswith(_GENERATES) for name in names):
        return 0 if is_encoder_decoder(model) else 1
    return 0 if any(name.endswith(_LABELS_TOKENS) for name in names) else None
