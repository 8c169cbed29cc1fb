"""What the arguments of a warm-up, stable, decay schedule must be."""

from __future__ import annotations

from torch.optim import Optimizer

from accel_core import ConfigurationError

from .scheduler_base import calculate_base_values, check_argument, check_field


def count_total_steps(
    num_epochs: float | None, num_update_steps_per_epoch: int | None, total_steps: float | None
) -> int:
    """Return the length of the run in updates, which is given in epochs or in updates, but not in both."""
    by_epochs = num_epochs is not None and num_update_steps_per_epoch is not None
    if by_epochs == (total_steps is not None):
        raise ConfigurationError(
            f"num_epochs is {num_epochs}, num_update_steps_per_epoch {num_update_steps_per_epoch} and "
            f"total_steps {total_steps}, but the length of the run must be given once. Pass the first two, "
            "or total_steps alone."
        )
    if num_epochs is not None and num_update_steps_per_epoch is not None:
        total_steps = num_epochs * num_update_steps_per_epoch
    # Fractions of an epoch need not be whole updates.
    return round(total_steps or 0)


def check_decay(decay_phase_ratio: float, lr_min: float, use_inverse_sqrt_decay: bool) -> None:
    """Raise `ConfigurationError` if an argument of the decay is out of its range."""
    check_argument(
        "decay_phase_ratio",
        decay_phase_ratio,
        0 <= decay_phase_ratio <= 1,
        "between 0 and 1",
        "It is the part of each period that is decay.",
    )
    check_argument(
        "lr_min",
        lr_min,
        0 <= lr_min <= 1,
        "between 0 and 1",
        "It is a fraction of each group's base rate.",
    )
    if not use_inverse_sqrt_decay:
        check_argument(
            "lr_min",
            lr_min,
            lr_min > 0,
            "above 0 for the inverse proportional decay, which divides by it",
            "Pass a small number such as 1e-6, or use_inverse_sqrt_decay=True.",
        )


def check_warmup(
    num_warmup_steps: int, warmup_starting_lr: float, pre_decay_step: int, optimizer: Optimizer
) -> None:
    """Raise `ConfigurationError` if the warm-up is too long, or begins above all rates of `optimizer`.

    Args:
        pre_decay_step: last update before the first decay.
    """
    # The warm-up has to end before the rate falls for the first time.
    check_argument(
        "num_warmup_steps",
        num_warmup_steps,
        0 <= num_warmup_steps <= pre_decay_step,
        f"between 0 and {pre_decay_step}, where the first decay begins",
        "Warm up for fewer updates (fractions of an epoch such as 0.5 are allowed), or train for longer.",
    )
    check_field(optimizer, "lr")
    highest = max(calculate_base_values(optimizer, "lr"))
    # Without a warm-up the starting rate is never used, and its default need not fit.
    if num_warmup_steps:
        check_argument(
            "warmup_starting_lr",
            warmup_starting_lr,
            0 <= warmup_starting_lr <= highest,
            f"between 0 and the largest learning rate of the optimizer, {highest}",
            "Pass a smaller warmup_starting_lr, or num_warmup_steps=0.",
        )
