"""Limits runs to a few batches, by a callback, a context manager or an environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType

from ..checks.values import check_flag, check_whole_number
from ..data.loader import ShardedDataLoader
from ..errors import ConfigurationError
from ..text import counted
from .callback import TrainerCallback

LIMIT_BATCHES_ENV_VAR = "ACCEL_LIMIT_BATCHES"
"""Holds a number of batches, such as `3`, or `3:overfit`."""


_WAY_OUT = "Use 1 for a single batch an epoch."


class LimitBatchesCallback(TrainerCallback):
    """End each epoch of training and evaluation after `num_batches` batches of each process."""

    def __init__(
        self,
        num_batches: int,
        eval_only: bool = False,
        intermediate_only: bool = False,
        *,
        overfit: bool = False,
    ) -> None:
        """Limit a run.

        Args:
            eval_only: leave training as it is.
            intermediate_only: limit the evaluations in the middle of an epoch alone.
            overfit: train on the same batches in every epoch, to see whether the model can overfit them.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        self.num_batches = check_whole_number("num_batches", num_batches, _WAY_OUT)
        self.eval_only = check_flag("eval_only", eval_only)
        self.intermediate_only = check_flag("intermediate_only", intermediate_only)
        self.overfit = check_flag("overfit", overfit)
        if overfit and (eval_only or intermediate_only):
            raise ConfigurationError(
                "overfit is True, but eval_only or intermediate_only leave training as it is. Drop one."
            )

    def limit(self, train: ShardedDataLoader | None, evaluation: ShardedDataLoader | None) -> None:
        """Limit the loaders `train` and `evaluation` of a run; of several limits the smallest counts."""
        if train is not None and not (self.eval_only or self.intermediate_only):
            # `max_steps` is None if nothing limits the loader yet.
            train.max_steps = min(train.max_steps or self.num_batches, self.num_batches)
            train.repeat_first_epoch = train.repeat_first_epoch or self.overfit
        if evaluation is not None:
            # All three modes limit the evaluations in mid-epoch.
            evaluation.max_intermediate_steps = min(
                evaluation.max_intermediate_steps or self.num_batches, self.num_batches
            )
            if not self.intermediate_only:
                evaluation.max_steps = min(evaluation.max_steps or self.num_batches, self.num_batches)

    def __str__(self) -> str:
        what = (
            "evaluation in mid-epoch"
            if self.intermediate_only
            else "evaluation"
            if self.eval_only
            else "epoch"
        )
        batches = counted(self.num_batches, "batches")
        again = ", the same ones in every epoch" if self.overfit else ""
        return f"Each {what} is limited to {batches} per process{again}."


class LimitBatches:
    """Limits all runs within its context as `LimitBatchesCallback(num_batches, overfit=overfit)` does.

    A trainer that is made within it stays limited: it has that callback.
    """

    def __init__(self, num_batches: int, *, overfit: bool = False) -> None:
        num_batches = check_whole_number("num_batches", num_batches, _WAY_OUT)
        self.wanted = f"{num_batches}:overfit" if overfit else str(num_batches)

    def __enter__(self) -> None:
        self.before = os.environ.get(LIMIT_BATCHES_ENV_VAR)
        # By the environment, so that it reaches trainers which other code makes.
        os.environ[LIMIT_BATCHES_ENV_VAR] = self.wanted

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.before is None:
            del os.environ[LIMIT_BATCHES_ENV_VAR]
        else:
            os.environ[LIMIT_BATCHES_ENV_VAR] = self.before


def batch_limits(callbacks: Iterable[TrainerCallback]) -> list[LimitBatchesCallback]:
    """Return the limits among `callbacks`, and the one that the environment asks for."""
    limits = [callback for callback in callbacks if isinstance(callback, LimitBatchesCallback)]
    # A trainer that was made under the same limit has it among its callbacks already.
    known = {str(limit) for limit in limits}
    return [*limits, *(limit for limit in limits_of_environment() if str(limit) not in known)]


def limits_of_environment() -> list[LimitBatchesCallback]:
    """Return the limit that the environment asks for, or none."""
    wanted = os.environ.get(LIMIT_BATCHES_ENV_VAR)
    if not wanted:
        return []
    number, _, overfit = wanted.partition(":")
    # `int` alone would accept ' 3' and '1_0'.
    if not (number.isdecimal() and int(number) > 0 and overfit in ("", "overfit")):
        raise ConfigurationError(
            f"The environment variable {LIMIT_BATCHES_ENV_VAR} is {wanted!r}, but must be a whole number of "
            "at least 1. Set it to 3, to 3:overfit to repeat the same batches, or unset it."
        )
    return [LimitBatchesCallback(int(number), overfit=bool(overfit))]


def limit_loaders(
    callbacks: Iterable[TrainerCallback],
    train: ShardedDataLoader | None,
    evaluations: Iterable[ShardedDataLoader],
) -> list[str]:
    """Limit the loaders of a run as `callbacks` and the environment ask for, and return messages about it."""
    limits = batch_limits(callbacks)
    for limit in limits:
        limit.limit(train, None)
        for evaluation in evaluations:
            limit.limit(None, evaluation)
    return [str(limit) for limit in limits]
