"""The periods of a warm-up, stable, decay schedule: where each begins, decays and ends, in updates."""

from __future__ import annotations

from typing import Literal, TypedDict

from .scheduler_base import check_argument


class DecayInfo(TypedDict):
    """A period of the schedule, which ends with a checkpoint. All numbers are updates completed."""

    period_start: int
    period_end: int
    """Update that ends the decay, after which the model is exported."""
    decay_steps: int
    pre_decay_step: int
    """Last update of the stable phase. A run can be continued from a state that was saved after it."""


class PhaseInfo(DecayInfo):
    """The period of an update, and its phase."""

    phase: Literal["warmup", "stable", "decay"]


def estimate_checkpoint_steps(total_steps: int, num_checkpoints: int = 3) -> list[int]:
    """Return the updates at which to have a decayed model, each after twice as many as the one before.

    With the 3 of `num_checkpoints` they are at 25%, 50% and 100% of `total_steps`, rounded down.

    Raises:
        ConfigurationError: there are too few steps for so many checkpoints.

    Source:
        Wen et al., https://arxiv.org/abs/2410.05192: decays at 50, 100 and 200 billion tokens.
    """
    check_argument(
        "num_checkpoints", num_checkpoints, num_checkpoints >= 1, "at least 1", "1 decays at the end only."
    )
    check_argument(
        "total_steps",
        total_steps,
        total_steps >= 2 ** (num_checkpoints - 1),
        f"at least {2 ** (num_checkpoints - 1)} for num_checkpoints={num_checkpoints}, each of which comes "
        "after twice as many steps as the one before",
        "Train for longer, or ask for fewer checkpoints.",
    )
    return [total_steps // 2**halvings for halvings in reversed(range(num_checkpoints))]


def plan_periods(
    first_step: int, total_steps: int, num_checkpoints: int, decay_phase_ratio: float
) -> list[DecayInfo]:
    """Return the periods from update `first_step` to update `total_steps`, in their order."""
    # A continuation counts on from `first_step`, but doubles only what it adds itself.
    periods: list[DecayInfo] = []
    start = first_step
    for steps in estimate_checkpoint_steps(total_steps - first_step, num_checkpoints):
        end = first_step + steps
        decay_steps = round((end - start) * decay_phase_ratio)
        periods.append(
            {
                "period_start": start,
                "period_end": end,
                "decay_steps": decay_steps,
                "pre_decay_step": end - decay_steps,
            }
        )
        start = end
    return periods
