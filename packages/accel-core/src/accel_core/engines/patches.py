"""What preparing sets on the user's own model and in the accelerator: there in a run, away outside of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

_NAMES = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Accelerate computes in lower precision by a `forward` of the object, and marks what it has prepared."""


class Patches:
    """What preparing has set, to take off and put on again.

    Accelerate keeps whatever it has prepared: an accelerator that several trainers share would keep the
    models of all of them alive.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Accelerator, leaves_model: bool = False) -> None:
        """Remember model and accelerator as they are, before the model is prepared.

        Args:
            leaves_model: the engine needs what it has set on the model outside of a run too.
        """
        inner = getattr(model, "_orig_mod", model)
        modules = [model] if inner is model else [model, inner]
        known = (accelerator._models, accelerator._optimizers, accelerator._schedulers)
        self._attributes: list[dict[str, Any]] = [] if leaves_model else [vars(module) for module in modules]
        self._known: tuple[list[Any], ...] = known
        self._accelerator: Any = accelerator
        self._deepspeed: Any = None
        """What the accelerator's `backward` calls with DeepSpeed, of which it knows one."""
        # Accelerate keeps the first one: `backward` of a second trainer would call the engine of the first.
        self._deepspeed_before = self._exchange_deepspeed(None)
        self._own = self._read()
        self._prepared = self._own
        self._before = [list(values) for values in self._known]
        self._added: list[list[Any]] = [[] for _ in self._known]
        self._are_on = True

    def take_off(self) -> None:
        """Leave model and accelerator as they were before."""
        if self._are_on:
            self._are_on = False
            self._prepared = self._read()
            self._write(self._own)
            self._deepspeed = self._exchange_deepspeed(self._deepspeed_before)
            for number, values in enumerate(self._known):
                before = {id(value) for value in self._before[number]}
                self._added[number] = [value for value in values if id(value) not in before]
                values[:] = self._before[number]
            self._before = []

    def put_on(self) -> None:
        """Set what preparing has set."""
        if not self._are_on:
            self._are_on = True
            self._write(self._prepared)
            self._deepspeed_before = self._exchange_deepspeed(self._deepspeed)
            self._before = [list(values) for values in self._known]
            for values, added in zip(self._known, self._added, strict=True):
                values += added

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put on what is within, and leave it as it was."""
        were_on = self._are_on
        self.put_on()
        try:
            yield
        finally:
            if not were_on:
                self.take_off()

    def fit(self) -> bool:
        """Whether the model is as it was when they were taken off: they know nothing of a newer `forward`."""
        return self._are_on or self._read() == self._own

    def _exchange_deepspeed(self, engine: Any) -> Any:
        """Let `backward` call this engine of DeepSpeed, and return which one it has called."""
        before = getattr(self._accelerator, "deepspeed_engine_wrapped", None)
        if before is not engine:
            self._accelerator.deepspeed_engine_wrapped = engine
        return before

    def _read(self) -> list[dict[str, Any]]:
        return [
            {name: attributes[name] for name in _NAMES if name in attributes}
            for attributes in self._attributes
        ]

    def _write(self, values: list[dict[str, Any]]) -> None:
        for attributes, chosen in zip(self._attributes, values, strict=True):
            for name in _NAMES:
                attributes.pop(name, None)
            attributes.update(chosen)
