"""Warm-up, stable, decay: a schedule that can be continued, and that gives decayed models on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch.optim import Optimizer

from accel_core import TrainerPlaceholderValues
from accel_core.extending import counted, plain

from .scheduler_base import StatefulSchedulerBase, check_argument, interpolate
from .wsd_arguments import check_decay, check_warmup, count_total_steps
from .wsd_periods import DecayInfo as DecayInfo
from .wsd_periods import PhaseInfo as PhaseInfo
from .wsd_periods import estimate_checkpoint_steps as estimate_checkpoint_steps
from .wsd_periods import plan_periods


class WSDLrScheduler(StatefulSchedulerBase):
    """Raises the learning rate linearly, holds it, and lets it fall shortly before each checkpoint.

    The run is divided into periods, one for each checkpoint. A period from update S to update E has `D =
    round((E - S) * decay_phase_ratio)` updates of decay. With `t = (n - (E - D)) / D`, a group with the
    base rate b has after n updates

    - `start + (b - start) * n / num_warmup_steps` during the warm-up, which only the first period has,
    - `b` before the decay,
    - `b * (lr_min + (1 - lr_min) * (1 - sqrt(t)))` during it, if `use_inverse_sqrt_decay`,
    - `b / (t / lr_min + 1 - t)` during it otherwise (*inverse proportional*, the choice of the paper),
    - `b` again when the next period begins, without a second warm-up (WSD-S), and `b * lr_min` from the last
      update on.

    **Continuing.** A state that was saved at a `pre_decay_step`, or after a decay, can be continued for
    longer:

    ```python
    create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(
        is_continuation_from_checkpoint=True
    )
    trainer.train(
        dataset,
        num_epochs=20,
        resume_from=folder,
        create_scheduler_fn=create_scheduler_fn,
    )
    ```

    Totals count from the beginning of the first run, as in every resumed run. Loading the state begins a
    new stable phase at the update of the state, and plans checkpoints and decay for the updates that are
    left. A state of the same total is resumed as it is, so the script that continues a run may itself be
    restarted. If no state is loaded, the phase begins at update 0, as a new run from another run's weights
    needs it.

    Args:
        optimizer: each parameter group has a base rate of its own.
        num_epochs: length of the run in epochs, together with `num_update_steps_per_epoch`.
        num_update_steps_per_epoch: updates in an epoch, the same number on every process.
        total_steps: length of the run in updates, in place of these two.
        num_warmup_steps: updates of the warm-up, rounded to a whole number; `None` is a hundredth of the run.
            A continuation has none.
        decay_phase_ratio: fraction of each period that is decay.
        lr_min: the rate after a decay, *as a fraction of the base rate*.
        warmup_starting_lr: the rate of the first update, if there is a warm-up; never above the base rate of
            the group.
        use_inverse_sqrt_decay: decay by the square root, or else inverse proportionally.
        num_checkpoints: number of periods, each of which ends after twice as many updates as the one
            before; see `estimate_checkpoint_steps`.
        is_continuation_from_checkpoint: leave out the warm-up, and continue a loaded state of another total.

    Raises:
        ConfigurationError: an argument is out of its range, the length of the run is given twice or not at
            all, or the warm-up reaches into the first decay.

    Source:
        Wen et al., Understanding Warmup-Stable-Decay Learning Rates, https://arxiv.org/abs/2410.05192 (WSD-S,
        inverse proportional decay). Decay by the square root: Hägele et al.,
        https://arxiv.org/abs/2405.18392.
    """

    plan_fields: ClassVar[tuple[str, ...]] = (
        "total_steps",
        "num_warmup_steps",
        "decay_phase_ratio",
        "lr_min",
        "warmup_starting_lr",
        "use_inverse_sqrt_decay",
        "num_checkpoints",
        "is_continuation_from_checkpoint",
        "continued_from_step",
    )

    continued_from_step: int
    """Updates completed when this continuation began; 0 in a run that continues no other."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_epochs: float | None = None,
        num_update_steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        num_warmup_steps: float | None = 0,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> None:
        lengths = (plain(num_epochs), plain(num_update_steps_per_epoch), plain(total_steps))
        self.total_steps = count_total_steps(*lengths)
        if num_warmup_steps is None:
            num_warmup_steps = self.total_steps // 100
        self.num_warmup_steps = 0 if is_continuation_from_checkpoint else round(plain(num_warmup_steps))
        self.decay_phase_ratio = plain(decay_phase_ratio)
        self.lr_min = plain(lr_min)
        self.warmup_starting_lr = plain(warmup_starting_lr)
        self.use_inverse_sqrt_decay = plain(use_inverse_sqrt_decay)
        self.num_checkpoints = plain(num_checkpoints)
        self.is_continuation_from_checkpoint = plain(is_continuation_from_checkpoint)
        self.continued_from_step = 0
        check_decay(self.decay_phase_ratio, self.lr_min, self.use_inverse_sqrt_decay)
        pre_decay_step = self.get_decay_info()[0]["pre_decay_step"]
        check_warmup(self.num_warmup_steps, self.warmup_starting_lr, pre_decay_step, optimizer)
        # Last, since it asks for the values of the first update.
        super().__init__(optimizer)

    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the learning rate of each group after `num_updates` updates.

        Beyond the last update it is the rate at the end.
        """
        if num_updates < self.num_warmup_steps:
            share = num_updates / self.num_warmup_steps
            return [interpolate(min(self.warmup_starting_lr, base), base, share) for base in self.base_values]
        # The value after the last update of a period is the one that the next period begins with.
        periods = self.get_decay_info()
        period = next((period for period in periods if num_updates < period["period_end"]), periods[-1])
        factor = self._calculate_factor(num_updates, period)
        return [base * factor for base in self.base_values]

    def get_checkpoint_steps(self) -> list[int]:
        """Return the numbers of updates after which a decay is done."""
        return [period["period_end"] for period in self.get_decay_info()]

    def get_decay_info(self) -> list[DecayInfo]:
        """Return the periods of the schedule in their order, each with the beginning of its decay."""
        return plan_periods(
            self.continued_from_step, self.total_steps, self.num_checkpoints, self.decay_phase_ratio
        )

    def get_phase_info(self, num_updates: int) -> PhaseInfo:
        """Return the period and the phase of update `num_updates`.

        The last update of a period still belongs to it. For 0 the phase is that of the first update.
        """
        periods = self.get_decay_info()
        period = next((period for period in periods if num_updates <= period["period_end"]), periods[-1])
        newest = max(num_updates, 1)
        phase: Literal["warmup", "stable", "decay"] = "decay"
        if newest <= self.num_warmup_steps:
            phase = "warmup"
        elif newest <= period["pre_decay_step"]:
            phase = "stable"
        return {**period, "phase": phase}

    def get_current_step(self) -> int:
        """Return the updates completed, with those of a run that this one continues."""
        return self.num_updates

    def get_current_phase_info(self) -> PhaseInfo:
        """Return the period and the phase of the newest update."""
        return self.get_phase_info(self.num_updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` with its plan, or with a new one if this continues it to another total.

        Raises:
            ConfigurationError: the state is of another class or another number of parameter groups, or this
                is a continuation that ends before the update at which the state was saved.
        """
        # The same total means that the continuation itself was interrupted, and continues with its own plan.
        saved_total = state_dict.get("total_steps", self.total_steps)
        if self.is_continuation_from_checkpoint and saved_total != self.total_steps:
            state_dict = self._continue(state_dict)
        super().load_state_dict(state_dict)

    @classmethod
    def create_scheduler_fn(
        cls,
        total_num_epochs: float | None = None,
        num_update_steps_per_epoch: int = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH,
        num_warmup_epochs: float | None = None,
        decay_phase_ratio: float = 0.1,
        lr_min: float = 1e-6,
        warmup_starting_lr: float = 1e-6,
        use_inverse_sqrt_decay: bool = True,
        num_checkpoints: int = 1,
        is_continuation_from_checkpoint: bool = False,
    ) -> Callable[[Optimizer], WSDLrScheduler]:
        """Return a function to pass to `Trainer.train` as `create_scheduler_fn`: a `functools.partial`.

        ```python
        create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5)
        trainer.train(dataset, num_epochs=10, create_scheduler_fn=create_scheduler_fn)
        ```

        With `total_num_epochs=None` the schedule is as long as the run, also if `max_num_train_steps` ends
        it in the middle of an epoch. `num_warmup_epochs=None` is a hundredth of it. With both, data without
        a length needs nothing else. The other arguments are those of the class.
        """
        # Placeholders can be calculated with; the trainer puts numbers in when it knows them.
        total_steps = TrainerPlaceholderValues.NUM_UPDATE_STEPS
        if total_num_epochs is not None:
            total_steps = total_num_epochs * num_update_steps_per_epoch
        arguments: dict[str, Any] = {
            "total_steps": total_steps,
            "num_warmup_steps": None
            if num_warmup_epochs is None
            else num_warmup_epochs * num_update_steps_per_epoch,
            "decay_phase_ratio": decay_phase_ratio,
            "lr_min": lr_min,
            "warmup_starting_lr": warmup_starting_lr,
            "use_inverse_sqrt_decay": use_inverse_sqrt_decay,
            "num_checkpoints": num_checkpoints,
            "is_continuation_from_checkpoint": is_continuation_from_checkpoint,
        }
        return functools.partial(cls, **arguments)

    def _calculate_factor(self, num_updates: int, period: DecayInfo) -> float:
        """Return what a base rate is multiplied by: 1 before the decay, `lr_min` after the period."""
        # With decay_phase_ratio=0 there is no decay to divide by.
        if num_updates <= period["pre_decay_step"] or not period["decay_steps"]:
            return 1.0
        # Updates beyond the plan hold the end of the last decay.
        progress = min(1.0, (num_updates - period["pre_decay_step"]) / period["decay_steps"])
        if self.use_inverse_sqrt_decay:
            return self.lr_min + (1 - self.lr_min) * (1 - math.sqrt(progress))
        return 1 / (progress / self.lr_min + 1 - progress)

    def _continue(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a new stable phase that begins at the update of `state_dict`."""
        updates = state_dict.get("num_updates", 0)
        check_argument(
            "total_steps",
            self.total_steps,
            self.total_steps > updates,
            f"more than the {counted(updates, 'updates')} that the state has completed, as totals count "
            "from the beginning of the first run",
            f"For 1000 more updates, pass total_steps={updates + 1000}; with the trainer, raise num_epochs.",
        )
        # Raises before anything is changed if too few updates are left for the checkpoints.
        plan_periods(updates, self.total_steps, self.num_checkpoints, self.decay_phase_ratio)
        own_plan = {name: getattr(self, name) for name in self.plan_fields}
        return {**state_dict, **own_plan, "continued_from_step": updates}
