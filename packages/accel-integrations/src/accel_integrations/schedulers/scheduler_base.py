"""Bases of schedulers: a value for each parameter group as a function of the updates completed.

Units: everything counts *updates*, which are steps of the optimizer. An update is made by all processes
together, so the counts are the same on any number of them. `num_updates` is the number of updates completed;
0 asks for the value that the first update uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from accel_core import ConfigurationError
from accel_core.extending import ForeignName, plain


class SchedulerBase(ABC):
    """Sets one field of every parameter group, from a number of updates that the caller gives.

    Override `get_updated_values`. Calculate the values from `base_values`, never from the current ones:
    then any update can be asked for, in any order, and always gives the same answer.

    Args:
        optimizer: the optimizer whose parameter groups are changed in place. Groups that are added later are
            scheduled too.
        param_group_field: the key of the parameter groups that is scheduled: `"lr"`, `"weight_decay"` or any
            other number.

    Raises:
        ConfigurationError: a parameter group has no such field, or it is not a number.
    """

    plan_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that determine the values.

    They are saved with the state, and a loaded state sets them.
    """

    base_lr_values = ForeignName("Use base_values.")

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        check_field(optimizer, param_group_field)
        self.optimizer = optimizer
        self.param_group_field = param_group_field
        self._remember_base_values()

    @property
    def base_values(self) -> list[float]:
        """Value of each group before any schedule, in the order of the groups.

        It is the group's `initial_lr` (or `initial_weight_decay` and so on), which PyTorch's schedulers use
        too. A group that has none gets its current value as such. A second run on one optimizer therefore
        begins at the first one's base.
        """
        return calculate_base_values(self.optimizer, self.param_group_field)

    @abstractmethod
    def get_updated_values(self, num_updates: int) -> list[float]:
        """Return the value of each group after `num_updates` updates: that of update `num_updates + 1`."""

    def step_update(self, num_updates: int) -> None:
        """Give every group its value after `num_updates` updates. Call it after the update.

        Raises:
            ConfigurationError: `get_updated_values` did not return a list with a number for each group.
        """
        # Groups that were added since, as by unfreezing, have a base of their own.
        self._remember_base_values()
        values = self.get_updated_values(num_updates)
        groups = self.optimizer.param_groups
        if not isinstance(values, (list, tuple)) or len(values) != len(groups):
            raise ConfigurationError(
                f"{type(self).__name__}.get_updated_values({num_updates}) returned {values!r}, but must "
                f"return a list with a number for each of the {len(groups)} parameter groups. To leave them "
                "as they were built, return self.base_values."
            )
        for group, value in zip(groups, values, strict=True):
            current = group[self.param_group_field]
            if isinstance(current, torch.Tensor):
                # Captured and compiled optimizers read the tensor that they were built with.
                current.fill_(value)
            else:
                group[self.param_group_field] = plain(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the base values, and the attributes named in `plan_fields`."""
        return {"base_values": self.base_values, **{name: getattr(self, name) for name in self.plan_fields}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take base values and plan from `state_dict`: the saved plan replaces that of the constructor.

        Raises:
            ConfigurationError: the state is of another class, or of another number of parameter groups.
        """
        # Loading a part would give a mixture of two plans.
        missing = self.state_dict().keys() - state_dict.keys()
        if missing:
            raise ConfigurationError(
                f"The state has the keys {sorted(state_dict)}, but {type(self).__name__} also needs "
                f"{sorted(missing)}. Load a state that this class has saved, or leave the scheduler's out "
                "(load_scheduler=False)."
            )
        groups = self.optimizer.param_groups
        base_values = state_dict["base_values"]
        if len(base_values) != len(groups):
            raise ConfigurationError(
                f"The state is for {len(base_values)} parameter groups, but the optimizer has {len(groups)}. "
                "Build the optimizer with the groups of the saved run, or leave the scheduler's state out "
                "(load_scheduler=False)."
            )
        for group, value in zip(groups, base_values, strict=True):
            group[initial_field(self.param_group_field)] = value
        for name in self.plan_fields:
            setattr(self, name, state_dict[name])

    def _remember_base_values(self) -> None:
        key = initial_field(self.param_group_field)
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group[key] = value


class StatefulSchedulerBase(SchedulerBase, ABC):
    """Counts the updates itself, like PyTorch's schedulers.

    A `create_scheduler_fn` of `Trainer.train` returns one of these.

    Once it is constructed, the groups hold the value of the first update; after the n-th `step()`, the value
    after n updates. The constructor calls `get_updated_values(0)`, so a subclass sets what that reads before
    `super().__init__`:

    ```python
    class HalvedWeightDecay(StatefulSchedulerBase):
        plan_fields = ("every_n_updates",)

        def __init__(self, optimizer, every_n_updates=1000):
            self.every_n_updates = every_n_updates
            super().__init__(optimizer, param_group_field="weight_decay")

        def get_updated_values(self, num_updates):
            factor = 0.5 ** (num_updates // self.every_n_updates)
            return [base * factor for base in self.base_values]
    ```
    """

    num_updates: int
    """Updates completed, which are calls of `step()`."""

    def __init__(self, optimizer: Optimizer, param_group_field: str = "lr") -> None:
        super().__init__(optimizer, param_group_field)
        self.num_updates = 0
        # The first update is made with the schedule's value already, as with PyTorch's schedulers.
        try:
            self.step_update(0)
        except AttributeError as error:
            error.add_note(
                "The constructor of StatefulSchedulerBase asks for the first value. In "
                f"{type(self).__name__}.__init__, set the attributes that get_updated_values reads before "
                "calling super().__init__(...)."
            )
            raise

    def step(self) -> None:
        """Count one update and give every group the value of the next.

        Call it after each step of the optimizer.
        """
        self.num_updates += 1
        self.step_update(self.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, the base values and the plan: plain numbers, strings and lists."""
        return {"num_updates": self.num_updates, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, which gives the groups the value that they had when it was saved."""
        super().load_state_dict(state_dict)
        self.num_updates = state_dict["num_updates"]
        self.step_update(self.num_updates)


def initial_field(param_group_field: str) -> str:
    """Return the key of a parameter group for its base value: `"lr"` gives PyTorch's `"initial_lr"`."""
    return f"initial_{param_group_field}"


def calculate_base_values(optimizer: Optimizer, param_group_field: str) -> list[float]:
    """Return the remembered base value of each group, or its current value if it has none."""
    key = initial_field(param_group_field)
    return [
        float(group[key] if key in group else group[param_group_field]) for group in optimizer.param_groups
    ]


def interpolate(low: float, base: float, share: float) -> float:
    """Return a value between `low`, for a share of 0, and `base`, for a share of 1."""
    # Exact at both ends, and never above `base`. The usual `low + (base - low) * share` may miss `base` at a
    # share of 1.
    return low if share == 0 else base - (base - low) * (1 - share)


def check_field(optimizer: Optimizer, param_group_field: str) -> None:
    """Raise `ConfigurationError` if some group of `optimizer` has no number in this field."""
    for index, group in enumerate(optimizer.param_groups):
        numbers = sorted(key for key, value in group.items() if isinstance(value, float))
        value = group.get(param_group_field)
        if param_group_field not in group:
            problem = f"is missing in parameter group {index} of {type(optimizer).__name__}"
        # A bool is an int for Python: `nesterov` is no number to schedule.
        elif isinstance(value, bool) or not isinstance(value, (int, float, torch.Tensor)):
            problem = f"is {value!r} in parameter group {index}, but must be a number"
        else:
            continue
        raise ConfigurationError(
            f"param_group_field {param_group_field!r} {problem}. Schedule one of {numbers}."
        )


def check_argument(name: str, value: object, is_right: bool, expected: str, way_out: str) -> None:
    """Raise `ConfigurationError` with the value, what was expected and the way out, unless `is_right`."""
    if not is_right:
        raise ConfigurationError(f"{name} is {value!r}, but must be {expected}. {way_out}")
