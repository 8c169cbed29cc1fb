"""find_learning_rate: the range test, on a copy of the trainer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import (
    check_positive,
    check_trial,
    check_whole_number,
    sum_over_processes,
    trial_of,
)

from .picture import create_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from accel_core import Trainer

_SMOOTHING = 0.9
"""What is kept of the exponential mean of the losses at an update."""


class LearningRateRecord(TypedDict):
    """One update of the range test."""

    learning_rate: float
    """Rate of the parameter group that has the highest."""
    loss: float
    """Mean over the samples of the update on all processes, before the parameters changed."""
    smoothed_loss: float
    """Exponential mean of the losses so far, corrected for its beginning."""


@dataclasses.dataclass(frozen=True)
class LearningRateRange:
    """What a range test has found."""

    records: list[LearningRateRecord]
    """By update, with rising learning rates."""

    @property
    def suggestion(self) -> float:
        """Learning rate at which the smoothed loss fell the fastest, by the logarithm of the rate.

        The speed is the slope of the line of least squares through a fifth of the test, so that the noise of
        single batches does not count.

        Raises:
            ConfigurationError: the loss never fell.
        """
        losses = [record["smoothed_loss"] for record in self.records]
        # Behind the lowest loss training fails, so no slope there counts.
        lowest = losses.index(min(losses))
        width = min(max(3, len(losses) // 5), lowest + 1)
        slopes = [
            (_slope(losses[start : start + width]), start + width // 2) for start in range(lowest + 2 - width)
        ]
        # Rates rise by the same factor at each update, so the slope by update is that by their logarithm.
        steepest, middle = min(slopes)
        if steepest >= 0:
            rates = [record["learning_rate"] for record in self.records]
            raise ConfigurationError(
                f"The loss did not fall with any learning rate from {rates[0]:.3g} to {rates[-1]:.3g}, so "
                "none can be suggested. Look at plot(path), and try another min_lr, a longer test or "
                "another batch size."
            )
        return self.records[middle]["learning_rate"]

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the loss by learning rate, with the suggestion marked, and save it as `path` if that is given.

        Needs matplotlib. Returns the figure.
        """
        figure = create_figure("LearningRateRange.plot", (6.4, 3.8))
        axes = figure.subplots()
        rates = [record["learning_rate"] for record in self.records]
        axes.plot(
            rates,
            [record["loss"] for record in self.records],
            color="#999999",
            linewidth=1,
            label="loss of each update",
        )
        axes.plot(
            rates,
            [record["smoothed_loss"] for record in self.records],
            color="#0072B2",
            linewidth=2,
            label="smoothed loss",
        )
        try:
            suggestion = self.suggestion
        except ConfigurationError:
            # The picture is needed most if there is nothing to suggest.
            axes.set_title("The loss did not fall", loc="left")
        else:
            loss = next(
                record["smoothed_loss"] for record in self.records if record["learning_rate"] == suggestion
            )
            label = f"suggestion: {suggestion:.2g}, where it falls fastest"
            axes.plot(suggestion, loss, "o", color="#D55E00", markersize=9, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss")
        # The last losses of a test are huge, and would press the rest to a line: the losses up to the
        # lowest are to fill the height.
        smoothed = [record["smoothed_loss"] for record in self.records]
        low, high = min(smoothed), max(smoothed[: smoothed.index(min(smoothed)) + 1])
        room = (high - low) or abs(low) or 1.0
        axes.set_ylim(low - 0.1 * room, high + 0.3 * room)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", framealpha=0.8)
        save_figure(figure, path)
        return figure


def _slope(values: list[float]) -> float:
    """Return the slope of the line of least squares through `values`, by their index."""
    middle = (len(values) - 1) / 2
    squares = sum((index - middle) ** 2 for index in range(len(values)))
    # A single value has no slope.
    return sum((index - middle) * value for index, value in enumerate(values)) / squares if squares else 0.0


def find_learning_rate(
    trainer: Trainer,
    dataset: Any,
    per_device_batch_size: int = 8,
    *,
    min_lr: float = 1e-7,
    max_lr: float = 10.0,
    num_updates: int = 100,
    stop_factor: float = 4.0,
    **train_arguments: Any,
) -> LearningRateRange:
    """Train a copy of the model with a learning rate that rises with each update, and return the losses.

    The rate rises from `min_lr` to `max_lr` by the same factor at each update; groups of parameters keep the
    ratio of their rates. The test ends early when the loss is far above its lowest value or not finite.
    `trainer` is not changed: the copy has modules and optimizers of its own, no callbacks, and random numbers
    are put back, so a run that follows is bit-identical. It needs memory for the copy. Every
    process takes part and gets the same result.

        found = find_learning_rate(trainer, train_data, per_device_batch_size=32)
        found.plot("learning_rate.png")
        for group in trainer.optimizer.param_groups:
            group["lr"] = found.suggestion

    Args:
        dataset: data as for `Trainer.train`; it is read as often as needed.
        per_device_batch_size: samples in a step of one process.
        min_lr: learning rate of the first update.
        max_lr: learning rate of the last update.
        num_updates: updates of the whole test.
        stop_factor: the test ends when the smoothed loss is this many times its lowest value.
        train_arguments: further arguments of `Trainer.train` about data, accumulation and clipping.

    Raises:
        ConfigurationError: an argument cannot be used; nothing was changed.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv 1506.01186, section 3.3.
    """
    min_lr = check_positive("min_lr", min_lr, "Use 1e-7 for a rate at which nothing is learned.")
    max_lr = check_positive("max_lr", max_lr, "Use 10.0 for a rate at which training fails.")
    way_out = "Use 4.0 to stop at four times the lowest loss."
    stop_factor = check_positive("stop_factor", stop_factor, way_out)
    num_updates = check_whole_number("num_updates", num_updates, "Use 100 for a curve that can be read.")
    if not (min_lr or 0) < (max_lr or 0) or stop_factor is None or stop_factor <= 1 or num_updates < 3:
        raise ConfigurationError(
            f"min_lr is {min_lr}, max_lr {max_lr}, stop_factor {stop_factor} and num_updates {num_updates}, "
            "but min_lr must be below max_lr, stop_factor above 1 and num_updates at least 3. Leave them "
            "out to use the defaults."
        )
    check_trial("find_learning_rate", trainer, dataset, per_device_batch_size, train_arguments)
    _check_has_rates(trainer.optimizer)
    test = _RangeTest(min_lr, max_lr, num_updates, stop_factor)
    with trial_of(trainer, dataset, test) as trial:
        trial.train(
            dataset,
            max_num_train_steps=num_updates,
            per_device_batch_size=per_device_batch_size,
            **train_arguments,
        )
    return LearningRateRange(test.records)


class _RangeTest(TrainerCallback):
    """Sets the learning rates of each update, and keeps its loss."""

    def __init__(self, min_lr: float, max_lr: float, num_updates: int, stop_factor: float) -> None:
        self.min_lr = min_lr
        self.factor: float = (max_lr / min_lr) ** (1 / (num_updates - 1))
        """What the rate is multiplied by at each update."""
        self.stop_factor = stop_factor
        self.records: list[LearningRateRecord] = []
        self.mean = 0.0
        """Exponential mean of the losses, which begins at zero and is corrected for that."""
        self.is_over = False

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Keep the ratio of the groups' rates."""
        # Without any rate above 0, as before a warm-up, there is no ratio to keep.
        rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]
        highest = max(rates)
        self.ratios = [rate / highest if highest > 0 else 1.0 for rate in rates]

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Begin with sums of the loss at zero, as `train_loss` does."""
        self.sums = (0.0, 0.0)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Keep the loss of the update, and set its learning rates."""
        # What the epoch's tracker has added up since the update before is the loss of this one.
        sums = float(trainer.train_loss.total), float(trainer.train_loss.count)
        own = [now - before for now, before in zip(sums, self.sums, strict=True)]
        self.sums = sums
        total, count = sum_over_processes(own, trainer.device)
        rate = self.min_lr * self.factor ** len(self.records)
        for group, ratio in zip(trainer.optimizer.param_groups, self.ratios, strict=True):
            set_learning_rate(group, rate * ratio)
        self._add(trainer, rate, total / count)

    def _add(self, trainer: Trainer, rate: float, loss: float) -> None:
        # Several processes make one more update after a stop was requested.
        if self.is_over or not math.isfinite(loss):
            self._end(trainer)
            return
        self.mean = _SMOOTHING * self.mean + (1 - _SMOOTHING) * loss
        # Corrected for the mean's beginning at zero, as Adam does.
        smoothed = self.mean / (1 - _SMOOTHING ** (len(self.records) + 1))
        self.records.append({"learning_rate": rate, "loss": loss, "smoothed_loss": smoothed})
        lowest = min(record["smoothed_loss"] for record in self.records)
        # A loss below zero has no multiple that would be far above it.
        if lowest > 0 and smoothed > self.stop_factor * lowest:
            self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        self.is_over = True
        trainer.request_stop("the range test is over")


def _check_has_rates(optimizer: Any) -> None:
    """Raise if the optimizer chooses its learning rate itself, so that there is none to be found."""
    if any(group.get("lr") is None for group in optimizer.param_groups):
        name = type(optimizer).__name__
        raise ConfigurationError(
            f"The learning rate of {name} is None: {name} chooses it at each update, so find_learning_rate "
            "has none to find. Give the optimizer a number as lr, or do not call find_learning_rate."
        )


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group of parameters."""
    # Captured and compiled optimizers read the tensor that they were built with.
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
