"""Checks of what users pass, made before anything is changed. Each error has the value, what was expected, the way out."""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DataLoader

from .dataloaders import is_ready_loader
from .datasets import is_map_style
from .errors import AccelWarning, ConfigurationError
from .run_history import RunHistory, did_you_mean


def shown(value: Any) -> str:
    """What `value` looks like, on one line and not too long."""
    if isinstance(value, torch.Tensor) and value.numel() > 1:
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    text = f"the class {value.__name__}" if isinstance(value, type) else " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def sentence(error: Exception) -> str:
    """What `error` says, ended by one full stop."""
    return f"{str(error).rstrip('. ')}."


# ------------------------------------------------------------------ single values


def check_whole_number(name: str, value: Any, way_out: str, optional: bool = False) -> None:
    """Raise unless `value` is a whole number of at least 1, or None where that is allowed."""
    if optional and value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigurationError(f"{name} is {shown(value)}, but must be a whole number of at least 1. {way_out}")
    if int(value) < 1:
        raise ConfigurationError(f"{name} is {value}, but must be at least 1. {way_out}")


def check_positive(name: str, value: Any, way_out: str, optional: bool = False) -> None:
    """Raise unless `value` is a finite number above 0, or None where that is allowed."""
    if optional and value is None:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 < float(value) < math.inf):
        raise ConfigurationError(f"{name} is {shown(value)}, but must be a number above 0. {way_out}")


def check_not_negative(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is a finite number of at least 0."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and 0 <= float(value) < math.inf):
        raise ConfigurationError(f"{name} is {shown(value)}, but must be a number of at least 0. {way_out}")


def check_callable(name: str, value: Any, way_out: str) -> None:
    """Raise unless `value` is None or can be called."""
    if value is not None and not callable(value):
        raise ConfigurationError(f"{name} is {shown(value)}, but must be a function. {way_out}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise unless `value` is one of `choices`, and of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        hint = did_you_mean(str(value), map(str, choices))
        raise ConfigurationError(f"{name} is {shown(value)}, but must be one of {list(choices)}.{hint}")


# ------------------------------------------------------------------ the parts of a trainer


def check_parts(model: Any, loss_func: Any, optimizer: Any, run_history: Any, accelerator: Any, seed: Any) -> None:
    """Raise unless a trainer can be made of these."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(
            f"model is {shown(model)}, but must be an instance of torch.nn.Module. Create it first: model = Net()."
        )
    if isinstance(loss_func, type):
        name = loss_func.__name__
        raise ConfigurationError(f"loss_func is the class {name}, but must be an instance or a function. Create it: {name}().")
    check_callable("loss_func", loss_func, "Pass a function such as torch.nn.functional.cross_entropy, or a module.")
    if isinstance(optimizer, type):
        raise ConfigurationError(
            f"optimizer is the class {optimizer.__name__}, but must be an instance. Create it with the model's parameters: "
            f"{optimizer.__name__}(model.parameters())."
        )
    if optimizer is not None and not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")):
        raise ConfigurationError(
            f"optimizer is {shown(optimizer)}, but must be a torch.optim.Optimizer. Pass for example SGD(model.parameters())."
        )
    for part, value, kind in (("run_history", run_history, RunHistory), ("accelerator", accelerator, Accelerator)):
        if value is not None and not isinstance(value, kind):
            raise ConfigurationError(f"{part} is {shown(value)}, but must be an instance of {kind.__name__}. Or leave it out.")
    is_number = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if seed is not None and not (is_number and 0 <= int(seed) < 2**63):
        raise ConfigurationError(
            f"seed is {shown(seed)}, but must be a whole number from 0 to 2^63 - 1. Use None to seed nothing."
        )


def check_trainable(model: torch.nn.Module, optimizer: Any, attributes: Mapping[str, Any]) -> None:
    """Raise unless the optimizer can change the model; warn if it holds what neither model nor trainer `attributes` have."""
    if optimizer is None:
        raise ConfigurationError("optimizer is None, but train needs one. Pass an optimizer to the Trainer, or call evaluate.")
    own = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not own:
        raise ConfigurationError(
            "The model has no parameter with requires_grad=True, so there is nothing to train. Unfreeze some of it."
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not own & held:
        raise ConfigurationError(
            "The optimizer holds none of the model's trainable parameters, so training would change nothing. Create the "
            "optimizer from the parameters of this very model, after replacing layers, copying and moving it."
        )
    modules = [model, *(value for value in attributes.values() if isinstance(value, torch.nn.Module))]
    known = {id(parameter) for module in modules for parameter in module.parameters()} | set(map(id, attributes.values()))
    if held - known:
        warnings.warn(
            f"The optimizer holds {len(held - known)} parameters that are not the model's, as if layers had been replaced after "
            f"it was created. Create it afterwards, or let modules that belong to it be attributes of the trainer.",
            AccelWarning,
            stacklevel=3,
        )


def check_attributes(attributes: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Raise if the model is an attribute of the trainer under a second name too."""
    for name, value in attributes.items():
        if value is model and name != "model":
            raise ConfigurationError(
                f"trainer.{name} is the model itself, which would bypass what wraps it on several processes. Use trainer.model, "
                f"and delete trainer.{name}."
            )


def check_can_run(method: str, is_running: bool, needs_loss: str | None) -> None:
    """Raise inside another run, or if the loss function is needed by the method `needs_loss` and missing."""
    if is_running:
        raise ConfigurationError(
            f"{method} was called inside a run of the same trainer, but one run must end before the next. Call {method} "
            f"afterwards, or run_eval_epoch to evaluate in the middle of training."
        )
    if needs_loss is not None:
        raise ConfigurationError(f"loss_func is None, but {needs_loss} needs it. Pass a loss function, or override {needs_loss}.")


def check_can_save(has_run: bool, is_in_update: bool) -> None:
    """Raise unless there is a run between two updates, whose state can be saved."""
    if not has_run:
        raise ConfigurationError(
            "save_training_state was called before training, so there is no run to resume. Use save_checkpoint for the model."
        )
    if is_in_update:
        raise ConfigurationError(
            "save_training_state was called in the middle of an update, but gradients are not part of the state. Call it in "
            "on_optimizer_step_end or later."
        )


# ------------------------------------------------------------------ the arguments of a run


def check_dataset(name: str, dataset: Any, num_passes: int | None = 1) -> None:
    """Raise unless `dataset` is something to read samples or batches from `num_passes` times, and not known to be empty."""
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoaderStateMixin):
        raise ConfigurationError(
            f"{name} is a {kind}, which Accelerate has prepared already, so it would be shared out twice. Pass the loader as it "
            f"was before accelerator.prepare."
        )
    is_scalar = isinstance(dataset, torch.Tensor) and dataset.ndim == 0
    is_data = is_map_style(dataset) or isinstance(dataset, Iterable)
    if isinstance(dataset, (Mapping, str, bytes, type)) or is_scalar or not is_data:
        raise ConfigurationError(
            f"{name} is {shown(dataset)}, but must be a data set (with __getitem__ and __len__, or iterable) or a ready "
            f"DataLoader. Put tensors into a torch.utils.data.TensorDataset."
        )
    if is_map_style(dataset) and len(dataset) == 0:
        raise ConfigurationError(f"{name} is empty: its length is 0, but it must have at least one sample. Check how it is read.")
    if isinstance(dataset, Iterator) and num_passes is not None and num_passes > 1:
        raise ConfigurationError(
            f"{name} is an iterator ({kind}), which can be read only once, but num_epochs is {num_passes}. Use "
            f"num_epochs=1, or pass an object whose __iter__ begins again."
        )


def check_dataloader_arguments(name: str, kwargs: Any, dataset: Any) -> None:
    """Raise unless `kwargs` is None or a dictionary of arguments that torch's `DataLoader` knows, and `dataset` is none yet."""
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise ConfigurationError(
            f"{name} is {shown(kwargs)}, but must be a dictionary of arguments of torch's DataLoader. Pass dict(num_workers=2)."
        )
    known = list(inspect.signature(DataLoader).parameters)[1:]
    for key in kwargs:
        if key not in known:
            hint = did_you_mean(str(key), known) or f" It knows {known}."
            raise ConfigurationError(f"{name} has the key {key!r}, which torch's DataLoader does not know.{hint}")
    check_whole_number(f"{name}['batch_size']", kwargs.get("batch_size"), "Use 1 for batches of single samples.", optional=True)
    if kwargs and is_ready_loader(dataset):
        raise ConfigurationError(
            f"{name} is {shown(kwargs)}, but the data is a ready {type(dataset).__name__}, which keeps its own settings. Leave "
            f"{name} out, or pass the data set inside the loader."
        )


def check_collate_fn(collate_fn: Any, *datasets: Any) -> None:
    """Raise unless `collate_fn` is None, or a function that one of `datasets` has a use for."""
    check_callable("collate_fn", collate_fn, "Pass a function from a list of samples to a batch.")
    if collate_fn is not None and all(map(is_ready_loader, datasets)):
        raise ConfigurationError(
            f"collate_fn is {shown(collate_fn)}, but the data is a ready {type(datasets[0]).__name__}, which makes its own "
            f"batches. Give the loader its collate_fn, or pass the data set inside it."
        )


def check_train_arguments(train_dataset: Any, eval_dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise unless each argument of `train` can be used, and all of them together."""
    num_epochs, steps = arguments["num_epochs"], arguments["gradient_accumulation_steps"]
    check_whole_number("num_epochs", num_epochs, "Use 1 for a single pass over the data.", optional=True)
    name = "max_num_train_steps"
    check_whole_number(name, arguments[name], "It counts updates; use 1 for a single one.", optional=True)
    if num_epochs is None and arguments[name] is None:
        raise ConfigurationError(
            "num_epochs and max_num_train_steps are both None, but one must say when to end. Pass num_epochs=1."
        )
    check_dataset("train_dataset", train_dataset, num_epochs)
    if eval_dataset is not None:
        check_dataset("eval_dataset", eval_dataset, num_epochs)
    check_whole_number("per_device_batch_size", arguments["per_device_batch_size"], "Use 1 for single samples.")
    name = "eval_per_device_batch_size"
    check_whole_number(name, arguments[name], "Leave it out to take per_device_batch_size.", optional=True)
    check_whole_number("gradient_accumulation_steps", steps, "Use 1 to update after every batch.")
    for name in ("gradient_clip_value", "gradient_clip_norm"):
        check_positive(name, arguments[name], "Use None to leave gradients as they are.", optional=True)
    for name, dataset in (("train_dataloader_kwargs", train_dataset), ("eval_dataloader_kwargs", eval_dataset)):
        check_dataloader_arguments(name, arguments[name], dataset)
    check_collate_fn(arguments["collate_fn"], train_dataset, *([] if eval_dataset is None else [eval_dataset]))
    check_scheduler_fn(arguments["create_scheduler_fn"])
    check_choice("scheduler_step_every", arguments["scheduler_step_every"], ("update", "epoch"))
    for name in ("reset_run_history", "seed_each_sample"):
        check_choice(name, arguments[name], (True, False))
    if not isinstance(arguments["scheduler_metric"], str):
        raise ConfigurationError(
            f"scheduler_metric is {shown(arguments['scheduler_metric'])}, but must be a string. Pass the name of a metric of the "
            f"run history, such as 'eval_loss_epoch'."
        )
    if arguments["seed_each_sample"] and not is_map_style(getattr(train_dataset, "dataset", train_dataset)):
        raise ConfigurationError(
            f"seed_each_sample is True, but the samples of {type(train_dataset).__name__} have no index to seed them by. Leave "
            f"it out, or pass a data set with __getitem__ and __len__."
        )
    resume_from = arguments["resume_from"]
    if isinstance(resume_from, bool) or resume_from == "":
        raise ConfigurationError(
            f"resume_from is {resume_from!r}, but must be the folder of a training state. Use latest_checkpoint('checkpoints'), "
            f"which is None, to start afresh, where there is none yet."
        )


def check_scheduler_fn(create_scheduler_fn: Any) -> None:
    """Raise unless it is None or a factory."""
    is_scheduler = hasattr(create_scheduler_fn, "step") and hasattr(create_scheduler_fn, "state_dict")
    if is_scheduler and not isinstance(create_scheduler_fn, type):
        name = type(create_scheduler_fn).__name__
        raise ConfigurationError(
            f"create_scheduler_fn is a {name}, which is a scheduler, but must be a function from an optimizer to one. Pass "
            f"functools.partial({name}, ...) without the optimizer."
        )
    check_callable("create_scheduler_fn", create_scheduler_fn, "Pass a function from an optimizer to a scheduler.")


def check_evaluation_arguments(dataset: Any, batch_size: Any, kwargs: Any, collate_fn: Any) -> None:
    """Raise unless the arguments of `evaluate` or `predict` can be used."""
    if dataset is None:
        raise ConfigurationError("dataset is None, and no run before had an eval_dataset. Pass the data to read.")
    check_dataset("dataset", dataset)
    check_whole_number("per_device_batch_size", batch_size, "Use 1 for single samples.")
    check_dataloader_arguments("dataloader_kwargs", kwargs, dataset)
    check_collate_fn(collate_fn, dataset)
