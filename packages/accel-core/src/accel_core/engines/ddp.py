"""DistributedDataParallel: every process holds the whole model, and gradients are averaged in backward."""

from __future__ import annotations

import contextlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from ..processes.collectives import is_distributed
from ..processes.group import DataGroup
from .averaging import average_gradients, broadcast_together, check_equal_parameters
from .buckets import settle_buckets
from .carried_word import CarriedWord
from .engine import Context, Prepared, StepWeight
from .single import SingleProcess, _no_context
from .trained import Trained
from .weights import is_frozen

_NOTHING = contextlib.nullcontext()


class DDP(SingleProcess):
    """Runs the steps of several processes with a copy of the model each."""

    name = "DDP"
    wraps_by_ddp = True
    """DDP itself reduces the gradients; engines that begin here may do it otherwise."""

    def __init__(self, accelerator: Accelerator, group: DataGroup) -> None:
        super().__init__(accelerator, group)
        if not group.is_single:
            self.synchronize = self._synchronize_in_last_step
            self.word = CarriedWord(accelerator, group.index) if self.wraps_by_ddp else None
        self._trainable: list[bool] = []
        """Which parameters had gradients when the model was wrapped: those that DDP averages."""
        self._beside: list[torch.Tensor] = []
        """Parameters of the optimizer that DDP does not average, since they are not the model's."""
        self._num_held = 0
        """Parameters of the optimizer when `_beside` was made."""
        self._settled: WeakKeyDictionary[torch.nn.Module, str | None] = WeakKeyDictionary()
        """The wrappers that have their lasting buckets, and why they have not."""
        self._broadcast: dict[int, torch.Tensor] = {}
        """What is beside the model and has the main process's values already, by `id`."""

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Place and wrap by Accelerate, with the word that the processes share."""
        with self.carrying(model):
            return super().prepare(model, optimizer)

    def carrying(self, model: torch.nn.Module) -> Context:
        """Return a context in which DDP is made with the word, if there are other processes."""
        return _NOTHING if self.word is None else self.word.travelling_with(model)

    def keep(self, prepared: Prepared) -> None:
        """Keep what the trainer's `prepare` has made, and which parameters are averaged."""
        super().keep(prepared)
        if self.word is not None:
            self.word.attach(find_ddp(prepared.model))
        self._choose_synchronize(prepared.model)
        self._trainable = _trainable_of(prepared.model)
        self._broadcast.clear()

    def _settle_buckets(self) -> None:
        """Let all wrappers, also those of the user's own `prepare`, sum every update in the same order."""
        # Two numbers have the same sum in either order.
        if self.group.size <= 2 or self.trained is None:
            return
        for part in (self._parts().model, *self.trained.attributes.values()):
            wrapper = find_ddp(part) if isinstance(part, torch.nn.Module) else None
            if wrapper is not None and wrapper not in self._settled:
                self._settled[wrapper] = settle_buckets(wrapper)
        self.limits_of_exactness = [
            f"The resumed run equals an uninterrupted one only up to rounding, since {reason}: on "
            f"{self.group.size} processes its first update adds gradients in another order."
            for reason in sorted(set(filter(None, self._settled.values())))
        ]

    def train_beside(self, trained: Trained, step_weight: StepWeight, stepped: list[Any]) -> None:
        """Begin from the main process's values, as DDP does with those of the model."""
        super().train_beside(trained, step_weight, stepped)
        self._settle_buckets()
        self._find_beside()

    def _find_beside(self) -> None:
        if self.trained is None or not is_distributed():
            return
        # A parameter that is given to the optimizer later may be of a module that was not trained before.
        self.trained.refresh()
        self._beside = self.trained.beside(self.trained.optimizer)
        self._num_held = _num_held_by(self.trained.optimizer)
        begin_alike = {
            id(tensor): tensor
            for module in self.trained.modules.values()
            for tensor in (*module.parameters(), *module.buffers())
        }
        broadcast_together(tensor for key, tensor in begin_alike.items() if key not in self._broadcast)
        self._broadcast |= begin_alike

    def _notice_what_was_added(self) -> None:
        """Begin alike with a parameter that was given to the optimizer, before a step computes with it."""
        if self.trained is not None and _num_held_by(self.trained.optimizer) != self._num_held:
            self._find_beside()

    def average_beside(self) -> None:
        """Average by one all-reduce, if there is anything beside the model.

        Buffers there are the main process's.
        """
        if self.trained is None or not is_distributed():
            return
        self._notice_what_was_added()
        average_gradients(self._beside)
        if self.trained.modules:
            broadcast_together(
                buffer for module in self.trained.modules.values() for buffer in module.buffers()
            )

    def check_equal_parameters(self) -> str | None:
        """Compare by one small reduction."""
        if self.trained is None or not is_distributed():
            return None
        return check_equal_parameters(self.trained.named_parameters())

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model, wrapped again if parameters were frozen or unfrozen since.

        DDP would not synchronise those that it did not know.
        """
        prepared = self._parts()
        self._notice_what_was_added()
        trainable = _trainable_of(prepared.model)
        if not self.group.is_single and trainable != self._trainable:
            prepared.model = self._wrap_anew(prepared.model)
            if self.trained is not None:
                self.trained.model = prepared.model
            self._choose_synchronize(prepared.model)
            self._trainable = trainable
            self._settle_buckets()
        return prepared.model

    def _wrap_anew(self, model: torch.nn.Module) -> torch.nn.Module:
        inner = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.accelerator._models[:] = [known for known in self.accelerator._models if known is not model]
        if is_frozen(inner):
            return self._place_frozen(inner)
        with self.carrying(inner):
            wrapped: torch.nn.Module = self.accelerator.prepare_model(inner)
        if self.word is not None:
            self.word.attach(find_ddp(wrapped))
        return wrapped

    def module_to_evaluate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the module inside: the wrapper would wait for a process that has no batch."""
        wrapper = find_ddp(model)
        return model if wrapper is None else wrapper.module

    def _choose_synchronize(self, model: torch.nn.Module) -> None:
        """Reduce gradients in the last step of an update, or in each one where DDP knows no other way."""
        wrapper = find_ddp(model)
        # Engines that shard have no such wrapper, and a way of their own.
        if wrapper is None or self.group.is_single:
            return
        # With static_graph DDP counts on a reduction in each backward pass, and fails after one without it.
        # The mean of the sums so far leaves what was averaged before as it is, so the gradients are the same.
        self.synchronize = _no_context if wrapper.static_graph else self._synchronize_in_last_step

    def _synchronize_in_last_step(self, model: torch.nn.Module, is_last: bool) -> Context:
        return _NOTHING if is_last else self.accelerator.no_sync(model)


def _num_held_by(optimizer: Any) -> int:
    return 0 if optimizer is None else sum(len(group["params"]) for group in optimizer.param_groups)


def _trainable_of(model: torch.nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def find_ddp(model: torch.nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that averages gradients, also if Accelerate has compiled it, or None."""
    wrapper = getattr(model, "_orig_mod", model)
    return wrapper if isinstance(wrapper, DistributedDataParallel) else None
