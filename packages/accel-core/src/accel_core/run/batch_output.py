"""What the default loss step makes of a batch, and checks of what a loss step returned."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import AccelError, ConfigurationError
from ..text import counted, preview

_KEYS = {
    "loss": "the mean loss of the batch as a scalar tensor",
    "batch_size": "the number of samples in the batch, so that the epoch's loss can be averaged",
}

_WAYS_OUT = {
    "Expected more than 1 value per channel when training": (
        "Batch norm cannot train on a batch of one sample, which the last batch of an epoch may be. Pass "
        "train_dataloader_kwargs={'drop_last': True}, or another per_device_batch_size."
    ),
    "stack expects each tensor to be equal size": (
        "The samples of a batch differ in shape, so they cannot be put into one tensor. Pass a collate_fn "
        "that pads them, or give the samples one shape."
    ),
    "missing 1 required positional argument: 'closure'": (
        "The optimizer computes the loss several times an update, by a closure. Override optimizer_step: "
        "define the closure there, and call self.optimizer.step(closure)."
    ),
    "Expected to have finished reduction in the prior iteration": (
        "Some parameters that are trained got no gradient, which DistributedDataParallel does not expect. "
        "Remove or freeze them; or, if only some batches use them, pass "
        "accelerator=Accelerator(kwargs_handlers=[DistributedDataParallelKwargs("
        "find_unused_parameters=True)]), both from accelerate."
    ),
    # Of a loader that is iterated as it is. Torch goes on with "is killed by" or with "exited unexpectedly".
    "DataLoader worker (pid": (
        "A worker of the data was killed or has ended by itself. Was there not enough memory? Use fewer "
        "workers, a smaller batch or prefetch_factor, or a data set that holds less."
    ),
    "default_collate: batch must contain": (
        "The default collate_fn cannot join what the data set returns. Pass your own collate_fn, or "
        "return tensors, numbers, strings, tuples, lists or dictionaries. Samples that are dataclasses need "
        "one too."
    ),
}
"""What to do about errors of torch that do not say it themselves."""


def add_way_out(error: BaseException) -> None:
    """Add a note to an error of torch that does not name the way out. The error stays what it is."""
    if isinstance(error, AccelError):
        return
    text = str(error)
    for words, way_out in _WAYS_OUT.items():
        if words in text:
            error.add_note(way_out)


def unpack_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch that is a tuple or list of at least two.

    Raises `ConfigurationError` for any other.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    what = (
        f"{type(batch).__name__} with the keys {list(batch)}"
        if isinstance(batch, Mapping)
        else type(batch).__name__
    )
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise ConfigurationError(
        f"The batch is a {what}{size}, but the default loss step needs (inputs, targets). Override "
        f"calculate_train_batch_loss and calculate_eval_batch_loss, or let the data set return pairs."
    )


def num_samples_in(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor or list of values in it, however deep.

    Raises:
        ConfigurationError: there is none.
    """
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch.shape[0]
    parts = (
        list(batch.values())
        if isinstance(batch, Mapping)
        else [getattr(batch, field.name) for field in dataclasses.fields(batch)]
        if dataclasses.is_dataclass(batch) and not isinstance(batch, type)
        else batch
        if isinstance(batch, (tuple, list))
        else []
    )
    nested = [part for part in parts if _has_samples(part)]
    if nested:
        return num_samples_in(nested[0])
    if parts and isinstance(batch, (tuple, list)):
        return len(parts)
    raise ConfigurationError(
        f"The number of samples in a batch of type {type(batch).__name__} is not known. Override "
        "calculate_train_batch_loss and calculate_eval_batch_loss, and return it as 'batch_size'."
    )


def _has_samples(part: Any) -> bool:
    is_dataclass = dataclasses.is_dataclass(part) and not isinstance(part, type)
    return is_dataclass or isinstance(part, (torch.Tensor, Mapping, tuple, list))


class UnclearBatchSize(int):
    """The number of samples by the targets of a batch, if the loader gave another one.

    A step that knows better replaces it in its output. Whatever is still unclear when the batch is weighed is
    refused.
    """

    given: int
    """Samples that the loader gave for the batch."""

    def __new__(cls, number: int, given: int) -> UnclearBatchSize:
        """Make the number."""
        unclear = super().__new__(cls, number)
        unclear.given = given
        return unclear

    def refuse(self) -> None:
        """Raise `ConfigurationError`."""
        raise ConfigurationError(
            f"The targets of the batch have the length {int(self)}, but its collate function was given "
            f"{counted(self.given, 'samples')}, so it is not known what the loss is the mean of. Let the "
            "targets have one entry for each sample, or override calculate_train_batch_loss and "
            "calculate_eval_batch_loss: call super() and set 'batch_size', the number of samples, in what "
            "it returns."
        )


def call_loss(loss_func: Any, outputs: Any, targets: Any) -> torch.Tensor:
    """Return `loss_func(outputs, targets)`; an error gets a note on what the function was given."""
    try:
        return loss_func(outputs, targets)  # type: ignore[no-any-return]
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, AccelError)):
            error.add_note(
                f"loss_func was given the model's outputs, {_kind(outputs)}, with the targets, "
                f"{_kind(targets)}. Fit them to each other, or override calculate_train_batch_loss."
            )
        raise


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def check_batch_output(output: Any, method: str, needs_gradient: bool, is_first: bool) -> None:
    """Raise unless `output` of `calculate_*_batch_loss` has all that is needed.

    Once a run, since it waits for the device.
    """
    if not isinstance(output, Mapping):
        raise ConfigurationError(
            f"{method} returned {preview(output)}, but must return a dictionary. Return the keys 'loss', "
            "'model_outputs' and 'batch_size'."
        )
    for key, what in _KEYS.items():
        if key not in output:
            raise ConfigurationError(
                f"{method} returned the keys {list(output)}, but {key!r} is missing. Return {what}."
            )
    loss = output["loss"]
    if not isinstance(loss, torch.Tensor) or loss.ndim != 0 or loss.is_complex():
        raise ConfigurationError(
            f"{method} returned {preview(loss)} as 'loss', but it must be a scalar tensor. Take the mean: "
            "loss.mean()."
        )
    for key in ("batch_size", "num_items_in_batch"):
        number = _number(output.get(key, 1))
        if number is None or not number >= (key == "batch_size"):
            raise ConfigurationError(
                f"{method} returned {preview(output[key])} as {key!r}, but it must be a number of at least "
                f"{int(key == 'batch_size')}, such as len(xb). Return the number of samples or items that "
                "the loss is the mean of."
            )
    _check_extras(output, method)
    if needs_gradient and not loss.requires_grad:
        raise ConfigurationError(
            f"{method} returned a 'loss' without a gradient, so nothing could be learned. Compute it from "
            "the model's outputs without detach(), item() or torch.no_grad()."
        )
    if is_first and not torch.isfinite(loss):
        raise ConfigurationError(
            f"{method} returned the loss {loss.item()} for the first batch, but it must be finite. Look for "
            "nan or inf in the data, and for a logarithm of 0 or a division by 0 in the loss function."
        )


def _check_extras(output: Mapping[str, Any], method: str) -> None:
    """Raise unless what is averaged over the epoch, and what the progress bar shows, can be so."""
    log = output.get("log", {})
    if not isinstance(log, Mapping) or any(_number(value) is None for value in log.values()):
        raise ConfigurationError(
            f"{method} returned {preview(log)} as 'log', but it must be a dictionary of numbers or tensors "
            "of one element. Take the mean over the batch, or return what is not a number under another key."
        )
    if not isinstance(output.get("progress", {}), Mapping):
        raise ConfigurationError(
            f"{method} returned {preview(output['progress'])} as 'progress', but it must be a dictionary of "
            "numbers, tensors of one element or texts, which the progress bar shows beside the loss. Return, "
            "for example, {'accuracy': accuracy} as 'progress'."
        )


def _number(value: Any) -> float | None:
    """`value` as a number, or None if it is not a single one."""
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
