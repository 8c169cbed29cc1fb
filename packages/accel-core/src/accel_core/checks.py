"""Checks of what users pass, made before anything is changed. Each error has the value, what was expected, the way out."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from .datasets import is_map_style
from .errors import ConfigurationError
from .run_history import did_you_mean


def check_whole_number(name: str, value: Any, way_out: str, optional: bool = False) -> None:
    """Raise unless `value` is a whole number of at least 1, or None where that is allowed."""
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}, but must be a whole number of at least 1. {way_out}")
    if int(value) < 1:
        raise ConfigurationError(f"{name} is {value}, but must be at least 1. {way_out}")


def check_positive(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is None or a finite number above 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < float(value) < math.inf):
        raise ConfigurationError(f"{name} is {value!r}, but must be a number above 0. {way_out}")


def check_callable(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name} is {value!r}, but must be a function. {way_out}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        hint = did_you_mean(str(value), map(str, choices))
        raise ConfigurationError(f"{name} is {value!r}, but must be one of {list(choices)}.{hint}")


def check_kwargs(name: str, value: Any) -> None:
    """Raise unless `value` is None or a dictionary of arguments that torch's `DataLoader` knows."""
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{name} is {value!r}, but must be a dictionary of arguments of torch's DataLoader.")
    known = list(inspect.signature(DataLoader).parameters)[1:]
    for key in value:
        if key not in known:
            raise ConfigurationError(
                f"{name} has the key {key!r}, which torch's DataLoader does not know.{did_you_mean(str(key), known)}"
            )
    if "batch_size" in value and value["batch_size"] is not None:
        check_whole_number(f"{name}['batch_size']", value["batch_size"], "Use 1 for batches of single samples.")


def check_dataset(name: str, dataset: Any) -> None:
    """Raise unless `dataset` is something to read samples or batches from, and not known to be empty."""
    if isinstance(dataset, (Mapping, str, bytes, type)) or not (is_map_style(dataset) or isinstance(dataset, Iterable)):
        raise ConfigurationError(
            f"{name} is a {type(dataset).__name__}, but must be a data set (with __getitem__ and __len__, or iterable) or a "
            f"ready DataLoader. Put tensors into a torch.utils.data.TensorDataset."
        )
    if is_map_style(dataset) and len(dataset) == 0:
        raise ConfigurationError(f"{name} is empty: its length is 0, but it must have at least one sample. Check how it is read.")


def check_model(model: Any) -> None:
    """Raise unless `model` is a module."""
    if not isinstance(model, torch.nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else repr(model)
        raise ConfigurationError(f"model is {kind}, but must be an instance of torch.nn.Module. Create it first: model = Net().")


def check_optimizer(optimizer: Any) -> None:
    """Raise unless `optimizer` is one, or None (which is enough to evaluate)."""
    if isinstance(optimizer, type):
        raise ConfigurationError(
            f"optimizer is the class {optimizer.__name__}, but must be an instance. Create it with the model's parameters: "
            f"{optimizer.__name__}(model.parameters())."
        )
    if optimizer is not None and not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
        raise ConfigurationError(f"optimizer is {optimizer!r}, but must be a torch.optim.Optimizer, for example SGD(...).")


def check_trainable(model: torch.nn.Module, optimizer: Any) -> None:
    """Raise unless the optimizer can change the model."""
    if optimizer is None:
        raise ConfigurationError("optimizer is None, but train needs one. Pass an optimizer to the Trainer, or call evaluate.")
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not own:
        raise ConfigurationError(
            "The model has no parameter with requires_grad=True, so there is nothing to train. Unfreeze some of it."
        )
    if not own & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
        raise ConfigurationError(
            "The optimizer holds none of the model's trainable parameters, so training would change nothing. Create the "
            "optimizer from the parameters of this very model, after replacing layers and moving it."
        )


def check_attributes(attributes: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Raise if the model is an attribute of the trainer under a second name too."""
    for name, value in attributes.items():
        if value is model:
            raise ConfigurationError(
                f"trainer.{name} is the model itself, which would bypass what wraps it on several processes. Use trainer.model, "
                f"and delete trainer.{name}."
            )


def check_scheduler_fn(create_scheduler_fn: Any) -> None:
    """Raise unless it is None or a factory."""
    if hasattr(create_scheduler_fn, "step") and hasattr(create_scheduler_fn, "state_dict"):
        name = type(create_scheduler_fn).__name__
        if not isinstance(create_scheduler_fn, type):
            raise ConfigurationError(
                f"create_scheduler_fn is a {name}, which is a scheduler, but must be a function from an optimizer to one. Pass "
                f"functools.partial({name}, ...) without the optimizer."
            )
    check_callable("create_scheduler_fn", create_scheduler_fn, "Pass a function from an optimizer to a scheduler.")


def check_limits(num_epochs: Any, max_num_train_steps: Any) -> None:
    """Raise unless at least one of the limits of a run is given, and both are whole numbers."""
    check_whole_number("num_epochs", num_epochs, "Use 1 for a single pass over the data.", optional=True)
    check_whole_number("max_num_train_steps", max_num_train_steps, "It counts updates; use 1 for a single one.", optional=True)
    if num_epochs is None and max_num_train_steps is None:
        raise ConfigurationError(
            "num_epochs and max_num_train_steps are both None, but one must say when to end. Pass num_epochs=1."
        )


def check_train_arguments(train_dataset: Any, eval_dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise unless each argument of `train` can be used, and all of them together."""
    check_dataset("train_dataset", train_dataset)
    if eval_dataset is not None:
        check_dataset("eval_dataset", eval_dataset)
    check_limits(arguments["num_epochs"], arguments["max_num_train_steps"])
    check_whole_number("per_device_batch_size", arguments["per_device_batch_size"], "Use 1 for single samples.")
    check_whole_number("eval_per_device_batch_size", arguments["eval_per_device_batch_size"], "Leave it out.", optional=True)
    steps = arguments["gradient_accumulation_steps"]
    check_whole_number("gradient_accumulation_steps", steps, "Use 1 to update after every batch.")
    for name in ("gradient_clip_value", "gradient_clip_norm"):
        check_positive(name, arguments[name], "Use None to leave gradients as they are.")
    for name in ("train_dataloader_kwargs", "eval_dataloader_kwargs"):
        check_kwargs(name, arguments[name])
    check_scheduler_fn(arguments["create_scheduler_fn"])
    check_callable("collate_fn", arguments["collate_fn"], "Pass a function from a list of samples to a batch.")
    check_choice("scheduler_step_every", arguments["scheduler_step_every"], ("update", "epoch"))
    for name in ("reset_run_history", "seed_each_sample"):
        check_choice(name, arguments[name], (True, False))
    if not isinstance(arguments["scheduler_metric"], str):
        raise ConfigurationError(f"scheduler_metric is {arguments['scheduler_metric']!r}, but must be the name of a metric.")


def check_evaluation_arguments(dataset: Any, batch_size: Any, kwargs: Any, collate_fn: Any) -> None:
    """Raise unless the arguments of `evaluate` or `predict` can be used."""
    if dataset is None:
        raise ConfigurationError("dataset is None, and no run before had an eval_dataset. Pass the data to evaluate on.")
    check_dataset("dataset", dataset)
    check_whole_number("per_device_batch_size", batch_size, "Use 1 for single samples.")
    check_kwargs("dataloader_kwargs", kwargs)
    check_callable("collate_fn", collate_fn, "Pass a function from a list of samples to a batch.")


def check_seed(seed: Any) -> None:
    """Raise unless `seed` is None or a whole number in [0, 2^63)."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise ConfigurationError(f"seed is {seed!r}, but must be a whole number from 0 on, or None to seed nothing.")


def scheduler_interval(scheduler: Any, wanted: str) -> tuple[str, bool]:
    """When a scheduler steps, `"update"` or `"epoch"`, and whether its `step` needs a metric. Raises if it cannot step."""
    if scheduler is None:
        return wanted, False
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigurationError(
            f"create_scheduler_fn returned {scheduler!r}, which has no step(). Return a scheduler over the given optimizer."
        )
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    needs_metric = bool(parameters) and parameters[0].default is parameters[0].empty and parameters[0].kind < 2
    return ("epoch", True) if needs_metric else (wanted, False)


def check_batch_output(output: Any, method: str, needs_gradient: bool, is_first: bool) -> None:
    """Raise unless `output` of `calculate_*_batch_loss` has all that is needed; the rest once a run, since it waits."""
    if not isinstance(output, Mapping):
        raise ConfigurationError(
            f"{method} returned a {type(output).__name__}, but must return a dictionary with the keys 'loss', 'model_outputs' "
            f"and 'batch_size'."
        )
    for key, what in _KEYS.items():
        if key not in output:
            raise ConfigurationError(f"{method} returned the keys {list(output)}, but {key!r} is missing. Return {what}.")
    loss = output["loss"]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.ndim != 0:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise ConfigurationError(
            f"{method} returned {shape} as 'loss', but it must be a scalar tensor. Take the mean over the batch: loss.mean()."
        )
    for key in ("batch_size", "num_items_in_batch"):
        value = output.get(key, 1)
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if not isinstance(number, numbers.Real) or isinstance(number, bool) or number < (key == "batch_size"):
            raise ConfigurationError(f"{method} returned {value!r} as {key!r}, but it must be a number above 0, such as len(xb).")
    if needs_gradient and not loss.requires_grad:
        raise ConfigurationError(
            f"{method} returned a 'loss' without a gradient, so nothing could be learned. Compute it from the model's outputs "
            f"without detach(), item() or torch.no_grad()."
        )
    if is_first and not torch.isfinite(loss):
        raise ConfigurationError(
            f"{method} returned the loss {loss.item()} for the first batch, but it must be finite. Look for nan or inf in the "
            f"data, and for log or division of zero in the loss function."
        )


_KEYS = {
    "loss": "the mean loss of the batch as a scalar tensor",
    "model_outputs": "what the model gave, for callbacks and metrics",
    "batch_size": "the number of samples in the batch, so that the epoch's loss can be averaged",
}


def call_loss(loss_func: Any, outputs: Any, targets: Any) -> torch.Tensor:
    """Return `loss_func(outputs, targets)`; what it refuses is raised as `ConfigurationError` with what it was given."""
    try:
        return loss_func(outputs, targets)  # type: ignore[no-any-return]
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, (torch.OutOfMemoryError, ConfigurationError)):
            raise
        raise ConfigurationError(
            f"loss_func refused the model's outputs, {_kind(outputs)}, with the targets, {_kind(targets)}: {error} Fit them to "
            f"each other, or override calculate_train_batch_loss."
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def unpack_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch that is a tuple or list of at least two. Raises `ConfigurationError` for any other."""
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise ConfigurationError(
        f"The batch is a {type(batch).__name__}{size}, but the default loss step needs (inputs, targets). Override "
        f"calculate_train_batch_loss and calculate_eval_batch_loss, or let the data set return pairs."
    )


def num_samples_in(batch: Any) -> int:
    """Samples in a batch: the first dimension of the first tensor in it. Raises `ConfigurationError` if there is none."""
    if isinstance(batch, torch.Tensor) and batch.ndim:
        return batch.shape[0]
    for part in batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ():
        if isinstance(part, (torch.Tensor, Mapping, tuple, list)):
            return num_samples_in(part)
    raise ConfigurationError(
        f"The size of a batch of type {type(batch).__name__} is not known. Override calculate_train_batch_loss."
    )
