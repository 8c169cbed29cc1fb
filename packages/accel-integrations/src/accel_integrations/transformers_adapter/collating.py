"""Make batches of samples that are mappings, if the user gives no collate function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from accel_core import ConfigurationError
from accel_core.extending import with_full_stop

from .import_transformers import import_transformers
from .model_facts import input_names, label_shift

_LABELS = frozenset(["labels", "label", "label_ids"])


def create_collate_fn(model: torch.nn.Module, tokenizer: Any) -> Callable[[list[Any]], Any]:
    """Return a function that makes a batch of samples for `model`.

    With a tokenizer the samples may differ in length. They are padded to the longest of the batch, labels
    of tokens with -100. Without one, or with a processor of another kind, they have to be of one shape.
    Entries that the model does not take, such as the text, are left out.

    Raises:
        ConfigurationError: the tokenizer has no padding token.
    """
    transformers = import_transformers()
    pads = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    # Its `pad` raises without one, also for samples of one length, but only at the first batch.
    if pads and tokenizer.pad_token is None:
        raise ConfigurationError(
            f"tokenizer is a {type(tokenizer).__name__} without a padding token, so it cannot pad. Set "
            "tokenizer.pad_token = tokenizer.eos_token before training, or pass a collate_fn."
        )
    if not pads:
        collate = transformers.default_data_collator
    elif label_shift(model) is None:
        # Labels are one class a sample, so only the inputs are padded.
        collate = transformers.DataCollatorWithPadding(tokenizer)
    else:
        # It also pads labels of tokens, with the label that no loss counts.
        collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    names = input_names(model)
    return CollateKnown(collate, None if names is None else names | _LABELS)


class CollateKnown:
    """Collates the entries of the samples that are in `names`; None keeps all."""

    def __init__(self, collate: Callable[[list[Any]], Any], names: frozenset[str] | None) -> None:
        self.collate = collate
        self.names = names

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch.

        Raises:
            ConfigurationError: the samples are no mappings, or do not fit each other.
        """
        if not isinstance(samples[0], Mapping):
            raise ConfigurationError(
                f"A sample is a {type(samples[0]).__name__}, but TransformersTrainer needs mappings from the "
                "names of the model's inputs to values, such as {'input_ids': ..., 'labels': ...}. Pass "
                "such a data set, or a collate_fn that makes mappings of the samples."
            )
        known = [{name: _as_list(value) for name, value in self._known(sample)} for sample in samples]
        try:
            return self.collate(known)
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"{len(samples)} samples could not be put into one batch: {with_full_stop(error)} If they "
                "differ in length, pass tokenizer to TransformersTrainer, or a collate_fn that pads."
            ) from error

    def _known(self, sample: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in sample.items() if self.names is None or name in self.names]


def _as_list(value: Any) -> Any:
    """Return a tensor of tokens as a list, and anything else as it is."""
    # Collators of transformers pad lists quickly, but tensors through arrays, and warn of it.
    is_tokens = isinstance(value, torch.Tensor) and value.ndim == 1 and not value.is_floating_point()
    return value.tolist() if is_tokens else value
