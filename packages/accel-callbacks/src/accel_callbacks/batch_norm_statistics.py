"""Computes the statistics of batch norm again for weights that no forward pass of training has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from accel_core.extending import is_distributed, stays_in_eval_mode, sum_over_processes


def normalising_modules(model: nn.Module, trained: nn.Module) -> list[_BatchNorm]:
    """Return the modules of batch norm in `model` whose statistics training changes.

    Args:
        trained: the model that is trained, of which `model` is a copy, or `model` itself.
    """
    pairs = zip(model.modules(), trained.modules(), strict=True)
    return [
        module
        for module, twin in pairs
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and not stays_in_eval_mode(twin)
        and (twin.training or not trained.training)
    ]


class _Forward(nn.Module):
    """What `update_bn` sees: a model with those modules of batch norm only whose statistics are wanted."""

    def __init__(self, trainer: Any, model: nn.Module, wanted: list[_BatchNorm]) -> None:
        super().__init__()
        self.trainer = trainer
        self.model = model
        self.wanted = wanted

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return iter(self.wanted)

    def train(self, mode: bool = True) -> _Forward:
        self.training = mode
        self.model.train(mode)
        frozen = {
            each for each in self.model.modules() if isinstance(each, _BatchNorm) and each not in self.wanted
        }
        for module in frozen:
            module.eval()
        return self

    def forward(self, batch: Any) -> None:
        self.trainer.calculate_predictions(batch)


def update_statistics(
    trainer: Any, model: nn.Module, wanted: list[_BatchNorm], batches: Iterable[Any]
) -> None:
    """Compute the statistics of `wanted` over the batches of all processes. Every process takes part.

    The model of the trainer has to be `model`. Each batch counts alike, as in `update_bn` of torch.
    """
    with _forward_on_this_process_alone(wanted):
        # update_bn takes the first item of what it is given.
        update_bn(([batch] for batch in batches), _Forward(trainer, model, wanted))
    if is_distributed():
        _join_over_processes(wanted, trainer.device)


@contextlib.contextmanager
def _forward_on_this_process_alone(modules: list[_BatchNorm]) -> Iterator[None]:
    """Let synchronised batch norm wait for nobody: a process may have fewer batches than others."""
    synchronised = [module for module in modules if isinstance(module, nn.SyncBatchNorm)]
    for module in synchronised:
        vars(module)["forward"] = partial(_BatchNorm.forward, module)
    try:
        yield
    finally:
        for module in synchronised:
            del vars(module)["forward"]


@torch.no_grad()
def _join_over_processes(modules: list[_BatchNorm], device: torch.device) -> None:
    """Take the means of the statistics over all processes, weighted by their numbers of batches."""
    buffers: list[Any] = [
        (module.running_mean, module.running_var, module.num_batches_tracked) for module in modules
    ]
    sums = [[value.double() * number for value in (mean, var)] for mean, var, number in buffers]
    own = [[*each, buffer[2].double().reshape(1)] for each, buffer in zip(sums, buffers, strict=True)]
    flat = torch.cat([value.flatten() for each in own for value in each])
    totals = torch.tensor(sum_over_processes(flat.tolist(), device), dtype=torch.float64)
    parts = iter(totals.split([value.numel() for each in own for value in each]))
    for mean, var, number in buffers:
        mean_sum, var_sum, count = next(parts), next(parts), next(parts)
        mean.copy_((mean_sum / count).reshape(mean.shape))
        var.copy_((var_sum / count).reshape(var.shape))
        number.fill_(int(count))
