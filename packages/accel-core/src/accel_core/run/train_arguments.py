"""Train arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks.values import check_callable, check_choice, check_positive, check_whole_number
from ..data.dataset_checks import check_collate_fn, check_dataloader_arguments, check_dataset
from ..data.readers import is_map_style
from ..errors import ConfigurationError
from ..text import preview


def check_train_arguments(train_dataset: Any, eval_dataset: Any, arguments: Mapping[str, Any]) -> None:
    """Raise unless each argument of `train` can be used, and all of them together."""
    num_epochs, steps = arguments["num_epochs"], arguments["gradient_accumulation_steps"]
    check_whole_number("num_epochs", num_epochs, "Use 1 for a single pass over the data.", optional=True)
    name = "max_num_train_steps"
    check_whole_number(name, arguments[name], "It counts updates; use 1 for a single one.", optional=True)
    if num_epochs is None and arguments[name] is None:
        raise ConfigurationError(
            "num_epochs and max_num_train_steps are both None, but one must say when to end. Pass "
            "num_epochs=1."
        )
    check_dataset("train_dataset", train_dataset, num_epochs)
    if eval_dataset is not None:
        check_dataset("eval_dataset", eval_dataset, num_epochs)
    check_whole_number(
        "per_device_batch_size", arguments["per_device_batch_size"], "Use 1 for single samples."
    )
    name = "eval_per_device_batch_size"
    check_whole_number(name, arguments[name], "Leave it out to take per_device_batch_size.", optional=True)
    check_whole_number("gradient_accumulation_steps", steps, "Use 1 to update after every batch.")
    for name in ("gradient_clip_value", "gradient_clip_norm"):
        check_positive(name, arguments[name], "Use None to leave gradients as they are.", optional=True)
    for name, dataset in (
        ("train_dataloader_kwargs", train_dataset),
        ("eval_dataloader_kwargs", eval_dataset),
    ):
        check_dataloader_arguments(name, arguments[name], dataset)
    check_collate_fn(
        arguments["collate_fn"], train_dataset, *([] if eval_dataset is None else [eval_dataset])
    )
    check_scheduler_fn(arguments["create_scheduler_fn"])
    check_choice("scheduler_step_every", arguments["scheduler_step_every"], ("update", "epoch"))
    for name in ("reset_run_history", "seed_each_sample"):
        check_choice(name, arguments[name], (True, False))
    if not isinstance(arguments["scheduler_metric"], str):
        raise ConfigurationError(
            f"scheduler_metric is {preview(arguments['scheduler_metric'])}, but must be a string. Pass the "
            "name of a metric of the run history, such as 'eval_loss_epoch'."
        )
    if arguments["seed_each_sample"] and not is_map_style(getattr(train_dataset, "dataset", train_dataset)):
        raise ConfigurationError(
            f"seed_each_sample is True, but the samples of {type(train_dataset).__name__} have no index to "
            "seed them by. Leave it out, or pass a data set with __getitem__ and __len__."
        )
    resume_from = arguments["resume_from"]
    if isinstance(resume_from, bool) or resume_from == "":
        raise ConfigurationError(
            f"resume_from is {resume_from!r}, but must be the folder of a training state. Use "
            "latest_checkpoint('checkpoints'), which is None, to start afresh, where there is none yet."
        )


def check_scheduler_fn(create_scheduler_fn: Any) -> None:
    """Raise unless it is None or a factory."""
    is_scheduler = hasattr(create_scheduler_fn, "step") and hasattr(create_scheduler_fn, "state_dict")
    if is_scheduler and not isinstance(create_scheduler_fn, type):
        name = type(create_scheduler_fn).__name__
        raise ConfigurationError(
            f"create_scheduler_fn is a {name}, which is a scheduler, but must be a function from an "
            f"optimizer to one. Pass functools.partial({name}, ...) without the optimizer."
        )
    check_callable(
        "create_scheduler_fn", create_scheduler_fn, "Pass a function from an optimizer to a scheduler."
    )


def check_evaluation_arguments(dataset: Any, batch_size: Any, kwargs: Any, collate_fn: Any) -> None:
    """Raise unless the arguments of `evaluate` or `predict` can be used."""
    if dataset is None:
        raise ConfigurationError(
            "dataset is None, and no run before had an eval_dataset. Pass the data to read."
        )
    check_dataset("dataset", dataset)
    check_whole_number("per_device_batch_size", batch_size, "Use 1 for single samples.")
    check_dataloader_arguments("dataloader_kwargs", kwargs, dataset)
    check_collate_fn(collate_fn, dataset)
