"""Trains what is beside a model that is in parts: each process holds it whole, and gradients are averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from ..processes.collectives import is_distributed
from .apart import HeldApart, held_apart
from .averaging import check_equal_parameters
from .clearing import call_both
from .ddp import DDP
from .engine import LoadState
from .mixtures import check_mixtures, compute_one_by_one
from .parts import is_dtensor, reshard
from .trained import clear_gradients


class TrainsBeside(DDP):
    """Comes before an engine whose parameters are `DTensor`s, and treats what is beside them as DDP does."""

    def check_trained(self, modules: Iterable[str], optimizers: Iterable[str]) -> None:
        """Refuse float16 beside the model: a scaler looks at parts and plain tensors in one call of torch."""
        for name in (*modules, *optimizers):
            if self.accelerator.scaler is not None:
                raise ConfigurationError(
                    f"trainer.{name} is trained beside the model, and mixed_precision is 'fp16', but a "
                    f"scaler does not unscale it together with the parts of {self.name}. Use "
                    "mixed_precision='bf16' or 'no', or make it a part of the model."
                )

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Refuse an optimizer that was told to compute parts and plain tensors at once."""
        super().check_model(model, optimizer)
        apart = held_apart(optimizer, model)
        # The model is still whole, so a group has both kinds if some of it is beside the model.
        if apart is not None:
            check_mixtures(optimizer, set(map(id, apart.parameters)))

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Shard by Accelerate, which knows what is in the model only."""
        apart = held_apart(optimizer, model)
        with contextlib.nullcontext() if apart is None else apart.taken_out():
            return super().prepare(model, optimizer)

    def _find_beside(self) -> None:
        # Between a forward pass and its backward the model has other parameters than its optimizer.
        reshard(self._parts().model)
        super()._find_beside()
        apart = self._apart()
        if self.trained is not None:
            self.trained.apart = {} if apart is None else {"optimizer": apart}
        compute_one_by_one(self._parts().optimizer)

    def bind(self, optimizer: Any) -> None:
        """Let an update also clear the gradients of what further optimizers train."""
        super().bind(optimizer)
        if self.trained is not None:
            self.zero_grad = partial(
                call_both, self.zero_grad, partial(clear_gradients, self.trained.cleared)
            )

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model, after a look at what the optimizer was given."""
        self._notice_what_was_added()
        return super().model_to_train()

    def parameters_to_clip(self, model: torch.nn.Module) -> list[torch.Tensor]:
        """Return those of the model, and what the optimizer holds beside it."""
        return [*super().parameters_to_clip(model), *self._beside]

    def check_equal_parameters(self) -> str | None:
        """Compare the parameters that all processes hold whole, by one small reduction."""
        if self.trained is None or not is_distributed():
            return None
        named = self.trained.named_parameters()
        return check_equal_parameters((name, held) for name, held in named if not is_dtensor(held))

    def _save_shards(self, folder: Path) -> None:
        with self.without_beside():
            super()._save_shards(folder)  # type: ignore[misc]  # That of the engine that comes after this.

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Load the files of the engine, which knows what is in the model only."""
        with self.without_beside():
            super().load_files(folder, scheduler, load)
        compute_one_by_one(self._parts().optimizer)

    @contextlib.contextmanager
    def without_beside(self) -> Iterator[None]:
        """Let the optimizer hold what is in the model only, while the engine writes or reads it."""
        apart = self._apart()
        with contextlib.nullcontext() if apart is None else apart.taken_out():
            yield

    def _apart(self) -> HeldApart | None:
        prepared = self._parts()
        return held_apart(prepared.optimizer, prepared.model)
