"""A schedule-free optimizer, for tests of optimizers that have a train mode and an eval mode.

Source: The Road Less Scheduled, https://arxiv.org/abs/2405.15682, section 2.
"""

from typing import Any

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Holds the parameters where gradients are computed in train mode, and their average in eval mode.

    It is in eval mode at first, and steps in train mode only, as those of the package schedulefree.
    """

    def __init__(self, parameters: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "train_mode": False, "num_steps": 0})

    def train(self) -> None:
        self._interpolate(True, lambda beta: 1 - beta)

    def eval(self) -> None:
        self._interpolate(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def _interpolate(self, training: bool, weight_of: Any) -> None:
        for group in self.param_groups:
            if group["train_mode"] != training:
                group["train_mode"] = training
                for parameter in group["params"]:
                    if parameter in self.state:
                        parameter.lerp_(self.state[parameter]["z"], weight_of(group["beta"]))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("Optimizer was not in train mode when step is called.")
            group["num_steps"] += 1
            share = 1 / group["num_steps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, share)
                parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - share) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])
