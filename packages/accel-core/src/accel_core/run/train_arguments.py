"""Holds the arguments of `train`, `evaluate` and `predict`, with their checks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..checks.values import (
    check_callable,
    check_choice,
    check_path,
    check_positive,
    check_whole_number,
    plain_arguments,
)
from ..data.dataset_checks import check_collate_fn, check_dataloader_arguments, check_dataset
from ..data.readers import is_map_style
from ..errors import ConfigurationError
from ..text import preview
from .evaluation_sets import batch_sizes, check_named_sets, label_of, loader_arguments, named_sets


def _checked(check: Callable[..., Any], default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """Return a field whose value goes through `check(name, value, **options)`, which returns what is kept."""
    return dataclasses.field(default=default, metadata={"check": partial(check, **options)})


def _check_scheduler_fn(name: str, value: Any) -> Any:
    # By attributes: schedulers of other libraries need not derive from torch's class.
    is_scheduler = hasattr(value, "step") and hasattr(value, "state_dict")
    if is_scheduler and not isinstance(value, type):
        kind = type(value).__name__
        raise ConfigurationError(
            f"{name} is a {kind}, which is a scheduler, but must be a function from an optimizer to one. "
            f"Pass functools.partial({kind}, ...) without the optimizer."
        )
    return check_callable(name, value, "Pass a function from an optimizer to a scheduler.")


def _check_metric_name(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{name} is {preview(value)}, but must be a string. Pass the name of a metric of the run "
            "history, such as 'eval_loss_epoch'."
        )
    return value


def _check_resume_from(name: str, value: Any) -> Any:
    way_out = (
        "Pass the folder of a training state, such as latest_checkpoint('checkpoints') gives it, which is "
        "None, to start afresh, if there is none yet."
    )
    # An empty string would be read as the current folder.
    return value if value is None else check_path(name, value, way_out)


def _plain_arguments(name: str, value: Any) -> Any:
    # `check_dataloader_arguments` checks them later, together with the data.
    return plain_arguments(value)


def _check_eval_batch_size(name: str, value: Any) -> Any:
    way_out = "Leave it out to take per_device_batch_size."
    if not isinstance(value, Mapping):
        return check_whole_number(name, value, way_out, optional=True)
    return {
        part: check_whole_number(label_of(name, part), size, way_out, optional=True)
        for part, size in value.items()
    }


_KEEP_GRADIENTS = "Use None to leave gradients as they are."


class SetArguments(NamedTuple):
    """What one evaluation set of a run is read with."""

    dataset: Any
    batch_size: int
    """Samples in a step of one process."""
    dataloader_kwargs: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Holds the arguments of `train`. Making one raises `ConfigurationError` if one cannot be used."""

    train_dataset: Any
    eval_dataset: Any = None
    num_epochs: int | None = _checked(
        check_whole_number, None, way_out="Use 1 for a single pass over the data.", optional=True
    )
    per_device_batch_size: int = _checked(check_whole_number, 8, way_out="Use 1 for single samples.")
    max_num_train_steps: int | None = _checked(
        check_whole_number, None, way_out="It counts updates; use 1 for a single one.", optional=True
    )
    gradient_accumulation_steps: int = _checked(
        check_whole_number, 1, way_out="Use 1 to update after every batch."
    )
    gradient_clip_value: float | None = _checked(check_positive, None, way_out=_KEEP_GRADIENTS, optional=True)
    create_scheduler_fn: Callable[[Any], Any] | None = _checked(  # noqa: RUF009
        _check_scheduler_fn, None
    )
    train_dataloader_kwargs: dict[str, Any] | None = _checked(_plain_arguments, None)  # noqa: RUF009
    eval_dataloader_kwargs: dict[str, Any] | None = _checked(_plain_arguments, None)  # noqa: RUF009
    reset_run_history: bool = _checked(check_choice, True, choices=(True, False))
    collate_fn: Callable[[list[Any]], Any] | None = None
    resume_from: str | Path | None = _checked(_check_resume_from, None)  # noqa: RUF009
    gradient_clip_norm: float | None = _checked(check_positive, None, way_out=_KEEP_GRADIENTS, optional=True)
    eval_per_device_batch_size: int | dict[str, int] | None = _checked(  # noqa: RUF009
        _check_eval_batch_size, None
    )
    eval_every_n_epochs: int = _checked(
        check_whole_number, 1, way_out="Use 1 to evaluate after every epoch; the last one always is."
    )
    eval_at_start: bool = _checked(check_choice, False, choices=(True, False))
    scheduler_step_every: str = _checked(check_choice, "update", choices=("update", "epoch", "evaluation"))
    scheduler_metric: str = _checked(_check_metric_name, "eval_loss_epoch")
    seed_each_sample: bool = _checked(check_choice, False, choices=(True, False))
    data_is_sharded: bool = _checked(check_choice, False, choices=(True, False))

    def __post_init__(self) -> None:
        """Check each field, then all of them together."""
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                value = field.metadata["check"](field.name, getattr(self, field.name))
                # The instance is frozen for everybody else.
                object.__setattr__(self, field.name, value)
        self._check_limits()
        self._check_data()

    def _check_limits(self) -> None:
        if self.num_epochs is None and self.max_num_train_steps is None:
            raise ConfigurationError(
                "num_epochs and max_num_train_steps are both None, but one must say when to end. Pass "
                "num_epochs=1."
            )

    def _check_data(self) -> None:
        # Without training data there is nothing to train on, so None is refused there.
        check_dataset("train_dataset", self.train_dataset, self.num_epochs)
        check_dataloader_arguments(
            "train_dataloader_kwargs", self.train_dataloader_kwargs, self.train_dataset
        )
        joined = [(self.train_dataset, self.train_dataloader_kwargs)]
        check_named_sets("eval_dataset", self.eval_dataset)
        for name, arguments in self.eval_sets.items():
            check_dataset(label_of("eval_dataset", name), arguments.dataset, self.num_epochs)
            kwargs = arguments.dataloader_kwargs
            check_dataloader_arguments("eval_dataloader_kwargs", kwargs, arguments.dataset)
            joined.append((arguments.dataset, kwargs))
        if self.eval_dataset is None:
            check_dataloader_arguments("eval_dataloader_kwargs", self.eval_dataloader_kwargs, None)
        check_collate_fn(self.collate_fn, *joined)
        # A ready loader stands for the data that it holds.
        if self.seed_each_sample and not is_map_style(
            getattr(self.train_dataset, "dataset", self.train_dataset)
        ):
            raise ConfigurationError(
                f"seed_each_sample is True, but the samples of {type(self.train_dataset).__name__} have no "
                "index to seed them by. Leave it out, or pass a data set with __getitem__ and __len__."
            )
        if self.eval_at_start and self.eval_dataset is None:
            raise ConfigurationError(
                "eval_at_start is True, but eval_dataset is None, so there is nothing to evaluate on. Pass "
                "an eval_dataset, or leave eval_at_start out."
            )

    @functools.cached_property
    def eval_sets(self) -> dict[str, SetArguments]:
        """Return what each evaluation set is read with, by name; there are none without an `eval_dataset`."""
        datasets = named_sets(self.eval_dataset)
        names = list(datasets)
        sizes = batch_sizes("eval_per_device_batch_size", self.eval_per_device_batch_size, names)
        kwargs = loader_arguments("eval_dataloader_kwargs", self.eval_dataloader_kwargs, names)
        return {
            name: SetArguments(dataset, sizes[name] or self.per_device_batch_size, kwargs[name])
            for name, dataset in datasets.items()
        }

    @property
    def eval_batch_size(self) -> int:
        """Return the samples in a step on one process of an evaluation on data that no set is called by."""
        size = self.eval_per_device_batch_size
        return (None if isinstance(size, Mapping) else size) or self.per_device_batch_size

    @property
    def further_eval_kwargs(self) -> dict[str, Any] | None:
        """Return the arguments of a loader for such data: those of all sets, if they are the same for all."""
        kwargs = self.eval_dataloader_kwargs or {}
        return None if any(isinstance(part, Mapping) for part in kwargs.values()) else kwargs or None

    def as_keywords(self) -> dict[str, Any]:
        """Return the arguments by name, but for the data sets: what `create_run_config` gets."""
        # The loaders say all about the data that the numbers of a run need.
        names = [field.name for field in dataclasses.fields(self) if not field.name.endswith("_dataset")]
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class EvaluationArguments:
    """What `evaluate` or `predict` was asked for.

    Making one raises `ConfigurationError` unless everything in it can be used.
    """

    dataset: Any
    per_device_batch_size: int = 8
    dataloader_kwargs: dict[str, Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    data_is_sharded: bool = False
    set_name: str = ""
    """Name of the evaluation set, if there are several."""

    def __post_init__(self) -> None:
        """Check each argument."""
        if self.dataset is None:
            raise ConfigurationError(
                "dataset is None, and no run before had an eval_dataset. Pass the data to read."
            )
        check_dataset(label_of("dataset", self.set_name), self.dataset)
        way_out = "Use 1 for single samples."
        batch_size = check_whole_number("per_device_batch_size", self.per_device_batch_size, way_out)
        # In numbers of Python. The instance is frozen for everybody else.
        object.__setattr__(self, "per_device_batch_size", batch_size)
        object.__setattr__(self, "dataloader_kwargs", plain_arguments(self.dataloader_kwargs))
        check_dataloader_arguments("dataloader_kwargs", self.dataloader_kwargs, self.dataset)
        check_collate_fn(self.collate_fn, (self.dataset, self.dataloader_kwargs))
        check_choice("data_is_sharded", self.data_is_sharded, (True, False))


def named_evaluations(
    dataset: Any, batch_size: Any, dataloader_kwargs: Any, collate_fn: Any, data_is_sharded: bool
) -> dict[str, EvaluationArguments]:
    """Return the arguments of `evaluate` for each set of `dataset`, by name, checked.

    Batch size and loader arguments may be given by name too.
    """
    check_named_sets("dataset", dataset)
    datasets = {"": None} if dataset is None else named_sets(dataset)
    names = list(datasets)
    sizes = batch_sizes("per_device_batch_size", batch_size, names)
    kwargs = loader_arguments("dataloader_kwargs", dataloader_kwargs, names)
    return {
        name: EvaluationArguments(
            each,
            sizes[name] if sizes[name] is not None else 8,
            kwargs[name],
            collate_fn,
            data_is_sharded,
            name,
        )
        for name, each in datasets.items()
    }


def check_eval_dataset(name: str, dataset: Any) -> None:
    """Raise unless `dataset` is None, data that can be read, or several of those by name."""
    check_named_sets(name, dataset)
    for set_name, each in named_sets(dataset).items():
        # An iterator would be read to its end by the first evaluation.
        check_dataset(label_of(name, set_name), each, num_passes=2)
