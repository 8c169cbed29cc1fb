"""Cosine annealing with linear warm-up and cooldown."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch.optim import Optimizer

from accel_core import TrainerPlaceholderValues
from accel_core.extending import counted, plain

from .scheduler_base import (
    StatefulSchedulerBase,
    calculate_base_values,
    check_argument,
    check_field,
    interpolate,
)


class CosineLrScheduler(StatefulSchedulerBase):
    """Raises the learning rate linearly, anneals it along half a cosine wave, and holds the minimum.

    With T updates in all, of which W are warm-up and C cooldown, a group with the base rate b has after n
    updates

    - `start + (b - start) * n / W` for n < W,
    - `low + (b - low) * (1 + cos(pi * ((n - W) / (T - C - W)) ** k_decay)) / 2` for W <= n < T - C,
    - `low` from then on, so that `low` is reached after exactly T - C updates.

    There are no restarts. `low` and `start` are never above the base rate of the group: a group with a tiny
    or zero rate keeps it.

    Args:
        optimizer: each parameter group has a base rate of its own.
        total_num_epochs: length of the run, warm-up and cooldown included; may be fractional.
        num_update_steps_per_epoch: updates in an epoch, the same number on every process.
        k_decay: above 1 the rate stays high for longer, below 1 it falls earlier.
        lr_min: the rate at the end.
        min_lr_ratio: the rate at the end as a fraction of each group's base rate; overrides `lr_min`.
        num_warmup_epochs: length of the warm-up, which may be fractional; it is rounded to whole updates.
        warmup_starting_lr: the rate of the first update, if there is a warm-up.
        warmup_starting_lr_ratio: that rate as a fraction of each group's base rate; overrides
            `warmup_starting_lr`.
        num_cooldown_epochs: number of epochs for which the rate at the end is held; may be fractional.

    Raises:
        ConfigurationError: an argument is out of its range, or nothing is left of the run between warm-up and
            cooldown.

    Source:
        Loshchilov and Hutter, SGDR, https://arxiv.org/abs/1608.03983, equation 5, for a single cycle.
        k-decay: Zhang and Li, https://arxiv.org/abs/2004.05909.
    """

    plan_fields: ClassVar[tuple[str, ...]] = (
        "total_updates",
        "num_warmup_updates",
        "num_cooldown_updates",
        "k_decay",
        "lr_min",
        "min_lr_ratio",
        "warmup_starting_lr",
        "warmup_starting_lr_ratio",
    )

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_epochs: float,
        num_update_steps_per_epoch: int,
        k_decay: float = 1.0,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
    ) -> None:
        epochs = {
            "total_num_epochs": plain(total_num_epochs),
            "num_warmup_epochs": plain(num_warmup_epochs),
            "num_cooldown_epochs": plain(num_cooldown_epochs),
        }
        num_update_steps_per_epoch = plain(num_update_steps_per_epoch)
        k_decay = plain(k_decay)
        self.total_updates, self.num_warmup_updates, self.num_cooldown_updates = _count_updates(
            epochs, num_update_steps_per_epoch
        )
        check_argument("k_decay", k_decay, k_decay > 0, "positive", "Leave it at 1 for the plain cosine.")
        self.k_decay = k_decay
        self.lr_min = plain(lr_min)
        self.min_lr_ratio = plain(min_lr_ratio)
        self.warmup_starting_lr = plain(warmup_starting_lr)
        self.warmup_starting_lr_ratio = plain(warmup_starting_lr_ratio)
        check_field(optimizer, "lr")
        # Smaller groups keep their own rate, so the limits only have to make sense for the largest one.
        highest = max(calculate_base_values(optimizer, "lr"))
        _check_rate("lr_min", lr_min, "min_lr_ratio", min_lr_ratio, highest)
        # Without a warm-up the starting rate is never used, and its default need not fit.
        if self.num_warmup_updates:
            _check_rate(
                "warmup_starting_lr",
                warmup_starting_lr,
                "warmup_starting_lr_ratio",
                warmup_starting_lr_ratio,
                highest,
            )
        super().__init__(optimizer)

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each group after `num_updates` updates.

        Beyond the last update it is the rate at the end.
        """
        return [self._calculate_value(num_updates, base) for base in self.base_values]

    def _calculate_value(self, num_updates: int, base: float) -> float:
        if num_updates < self.num_warmup_updates:
            low = _rate(self.warmup_starting_lr, self.warmup_starting_lr_ratio, base)
            share_of_base = num_updates / self.num_warmup_updates
        else:
            low = _rate(self.lr_min, self.min_lr_ratio, base)
            annealing_updates = self.total_updates - self.num_cooldown_updates - self.num_warmup_updates
            # The cooldown, and updates beyond the plan, hold the end.
            progress = min(1.0, (num_updates - self.num_warmup_updates) / annealing_updates)
            # Equation 5 of SGDR; k-decay bends the progress.
            share_of_base = (1 + math.cos(math.pi * progress**self.k_decay)) / 2
        return interpolate(low, base, share_of_base)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: float | None = None,
        num_update_steps_per_epoch: int = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        k_decay: float = 1.0,
        lr_min: float = 1e-6,
        min_lr_ratio: float | None = None,
        num_warmup_epochs: float = 0,
        warmup_starting_lr: float = 1e-6,
        warmup_starting_lr_ratio: float | None = None,
        num_cooldown_epochs: float = 0,
    ) -> Callable[[Optimizer], CosineLrScheduler]:
        """Return a function to pass to `Trainer.train` as `create_scheduler_fn`: a `functools.partial`.

        ```python
        create_scheduler_fn = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=1)
        trainer.train(dataset, num_epochs=10, create_scheduler_fn=create_scheduler_fn)
        ```

        The trainer fills in the updates of an epoch. With `total_num_epochs=None` the schedule is as long
        as the run, also if `max_num_train_steps` ends it in the middle of an epoch. For data without a
        length, pass `num_update_steps_per_epoch`, which then defines an epoch of warm-up. The other
        arguments are those of the class.
        """
        # Placeholders can be calculated with; the trainer puts numbers in when it knows them.
        if total_num_epochs is None:
            total_num_epochs = TrainerPlaceholderValues.NUM_UPDATE_STEPS / num_update_steps_per_epoch
        arguments: dict[str, Any] = {
            "total_num_epochs": total_num_epochs,
            "num_update_steps_per_epoch": num_update_steps_per_epoch,
            "k_decay": k_decay,
            "lr_min": lr_min,
            "min_lr_ratio": min_lr_ratio,
            "num_warmup_epochs": num_warmup_epochs,
            "warmup_starting_lr": warmup_starting_lr,
            "warmup_starting_lr_ratio": warmup_starting_lr_ratio,
            "num_cooldown_epochs": num_cooldown_epochs,
        }
        return functools.partial(cls, **arguments)


def _count_updates(epochs: dict[str, float], num_update_steps_per_epoch: int) -> list[int]:
    """Return the updates of the run, of its warm-up and of its cooldown, in whole numbers."""
    check_argument(
        "num_update_steps_per_epoch",
        num_update_steps_per_epoch,
        num_update_steps_per_epoch >= 1,
        "at least 1",
        "Give the number of updates in an epoch, or use create_scheduler_fn, which asks the trainer.",
    )
    for name, value in epochs.items():
        check_argument(name, value, value >= 0, "at least 0", "Fractions such as 0.5 are allowed.")
    # Rounded, since 0.29 epochs of 100 updates are 28.999999999999996.
    total, warmup, cooldown = (round(value * num_update_steps_per_epoch) for value in epochs.values())
    check_argument(
        "total_num_epochs",
        epochs["total_num_epochs"],
        total > warmup + cooldown,
        f"longer than warm-up and cooldown, as {counted(total, 'updates')} cannot hold {warmup} of warm-up, "
        f"{cooldown} of cooldown and at least 1 between them",
        "Shorten them (fractions such as num_warmup_epochs=0.5 are allowed), or train for longer.",
    )
    return [total, warmup, cooldown]


def _check_rate(name: str, rate: float, ratio_name: str, ratio: float | None, highest_base: float) -> None:
    # A ratio wins, so the rate that it overrides is not looked at.
    if ratio is not None:
        check_argument(
            ratio_name,
            ratio,
            0 <= ratio <= 1,
            "between 0 and 1",
            "It is a fraction of each group's base rate.",
        )
        return
    check_argument(
        name,
        rate,
        0 <= rate <= highest_base,
        f"between 0 and the largest learning rate of the optimizer, {highest_base}",
        f"Pass a smaller {name}, or {ratio_name}.",
    )


def _rate(rate: float, ratio: float | None, base: float) -> float:
    # A rate in absolute numbers may be above that of a small group, which must not rise to it.
    return min(rate, base) if ratio is None else ratio * base
