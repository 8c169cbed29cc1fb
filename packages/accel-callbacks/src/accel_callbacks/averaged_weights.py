"""The averages of a model's weights: in a copy of the model, or of the parts that each process holds."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import nn

from accel_core import AccelWarning
from accel_core.extending import broadcast_tensors, with_names_of, with_plain_names

from .model_copy import copy_model, remove_patches
from .sharded_average import ShardedAverage, is_fractional


class AveragedWeights:
    """Pairs of an average and the value that it follows, which begins as a copy of the value."""

    def __init__(self, model: nn.Module, owner: str, is_sharded: bool, averages_buffers: bool) -> None:
        """Begin with the weights of `model`.

        Args:
            model: without what is wrapped around it.
            owner: the class of the callback, for errors and warnings.
            is_sharded: its parameters lie on several processes.
            averages_buffers: those of floating-point numbers; all others are copied.

        Raises:
            ConfigurationError: the model cannot be copied.
        """
        self.sharded = ShardedAverage(model) if is_sharded else None
        self.model: nn.Module | None = None
        """The averaged model, in eval mode and without gradients; None if it is sharded."""
        if self.sharded is not None:
            self.averages, self.values = self.sharded.averages, self.sharded.values
            self._buffers = [
                (holder, module, name, averages_buffers and is_averaged)
                for holder, module, name, is_averaged in self.sharded.buffers
            ]
            return
        self.model = copy_model(model, owner).requires_grad_(False).eval()
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        # Whole numbers are quantised weights, which no optimizer changes.
        changing = [(average, value) for average, value in pairs if is_fractional(average)]
        self.averages = [average for average, _ in changing]
        self.values = [value for _, value in changing]
        modules = zip(self.model.modules(), model.modules(), strict=True)
        # With the modules that hold them, since a forward pass may replace a buffer by another tensor.
        self._buffers = [
            (averaged_module, module, name, averages_buffers and _is_averaged(buffer))
            for averaged_module, module in modules
            for name, buffer in module.named_buffers(recurse=False)
        ]
        coarse = [average.dtype for average in self.averages if average.element_size() < 4]
        if coarse:
            warnings.warn(
                f"{owner} averages parameters in {str(coarse[0]).removeprefix('torch.')}, whose few digits "
                "lose the small changes of an average. Keep the model in float32, and pass "
                "accelerator=Accelerator(mixed_precision='bf16') to the Trainer to compute in half "
                "precision.",
                AccelWarning,
            )

    def follow(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copy what is not averaged, and return the averages and the values for the rest."""
        averages, values = [*self.averages], [*self.values]
        for averaged_module, module, name, is_averaged in self._buffers:
            average, value = getattr(averaged_module, name), getattr(module, name)
            if average.shape != value.shape:
                # A table that grew with the length of the sequences.
                setattr(averaged_module, name, value.detach().clone())
            elif is_averaged:
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        return averages, values

    def standing_in(self) -> contextlib.AbstractContextManager[nn.Module | None]:
        """Return a context that gives the model with the averages."""
        return contextlib.nullcontext(self.model) if self.sharded is None else self.sharded.standing_in()

    def release(self) -> None:
        """Leave an average that computes as its weights are, whatever the precision of the run."""
        if self.model is not None:
            remove_patches(self.model)

    def state(self, is_main: bool) -> dict[str, Any]:
        """Return the averages by name; the main process's part holds the parameters.

        Every process takes part.
        """
        if self.sharded is not None:
            return with_plain_names(self.sharded.state(is_main))
        model = self._copy
        state = model.state_dict()
        if not is_main:
            # The parameters of all processes are equal, so one copy is enough; buffers may differ.
            parameters = dict(model.named_parameters(remove_duplicate=False))
            state = {name: value for name, value in state.items() if name not in parameters}
        return with_plain_names(state)

    def load(self, state: dict[str, Any], only_what_fits: bool) -> None:
        """Take the averages of `state`, whose parameters the main process has. Every process takes part.

        Args:
            only_what_fits: the average of what has another shape stays as it is, like that of a new layer.
        """
        if self.sharded is not None:
            self.sharded.load(state)
            return
        model = self._copy
        own = model.state_dict()
        averages = with_names_of(own, state)
        if only_what_fits:
            averages = {name: value for name, value in averages.items() if _fits(own.get(name), value)}
        model.load_state_dict(averages, strict=False)
        broadcast_tensors(self.averages)

    @property
    def _copy(self) -> nn.Module:
        if self.model is None:
            raise AttributeError("The averages are sharded, so there is no averaged model.")
        return self.model


def _is_averaged(buffer: torch.Tensor) -> bool:
    """Whether a buffer can be averaged; one that is not finite is a mask."""
    return is_fractional(buffer) and bool(torch.isfinite(buffer).all())


def _fits(own: Any, value: Any) -> bool:
    """Whether `value` has the shape of `own`, which is None if the model has nothing of that name."""
    return own is not None and getattr(own, "shape", None) == getattr(value, "shape", None)
