"""DistributedDataParallel: every process holds the whole model, and gradients are averaged in backward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from ..processes.group import DataGroup
from .engine import Context, Prepared
from .single import SingleProcess
from .weights import is_frozen

_NOTHING = contextlib.nullcontext()


class DDP(SingleProcess):
    """Runs the steps of several processes with a copy of the model each."""

    name = "DDP"

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        if not group.is_single:
            self.synchronize = self._synchronize_in_last_step
        self._trainable: list[bool] = []
        """Which parameters had gradients when the model was wrapped: those that DDP averages."""

    def keep(self, prepared: Prepared) -> None:
        """Keep what the trainer's `prepare` has made, and which parameters are averaged."""
        super().keep(prepared)
        self._trainable = _trainable_of(prepared.model)

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model, wrapped anew if parameters were frozen or unfrozen since.

        DDP would not synchronise those that it did not know.
        """
        prepared = self._parts()
        trainable = _trainable_of(prepared.model)
        if not self.group.is_single and trainable != self._trainable:
            prepared.model = self._wrap_anew(prepared.model)
            self._trainable = trainable
        return prepared.model

    def _wrap_anew(self, model: torch.nn.Module) -> torch.nn.Module:
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.accelerator._models[:] = [known for known in self.accelerator._models if known is not model]
        if is_frozen(inner):
            return self._place_frozen(inner)
        return self.accelerator.prepare_model(inner)  # type: ignore[no-any-return]

    def module_to_evaluate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the module inside: the wrapper would wait for a process that has no batch."""
        wrapper = find_ddp(model)
        return model if wrapper is None else wrapper.module

    def _synchronize_in_last_step(self, model: torch.nn.Module, is_last: bool) -> Context:
        return _NOTHING if is_last else self.accelerator.no_sync(model)


class XLA(DDP):
    """Runs the steps of processes on XLA devices, where Accelerate marks the steps."""

    name = "XLA"

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        self.has_collective_forward = not group.is_single

    def bypasses_accelerate(self, optimizer: Any) -> bool:
        """Return False."""
        return False


def _trainable_of(model: torch.nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def find_ddp(model: torch.nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients, also if Accelerate has compiled it, or None."""
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None
