"""TerminateOnNaNCallback stops all processes when the loss is no longer finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..processes.arrivals import Arrivals
from .callback import TrainerCallback

if TYPE_CHECKING:
    from ..trainer import Trainer


class TerminateOnNaNCallback(TrainerCallback):
    """Ask all processes to stop when the loss of a batch is nan or infinite on any of them.

    On a CPU the callback looks at the loss at once. It does not wait for an accelerator, whose loss it reads
    two steps later, or when the epoch ends.
    """

    runs_in_replay = False

    reads_batches = False

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before."""
        self._arrivals = Arrivals(distance=2)

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Look at the loss, or at an earlier one if it is on an accelerator."""
        arrived = self._arrivals.add(batch_output["loss"].detach(), step)
        if arrived is not None:
            self._look(trainer, *arrived)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """Look at the losses that are still on their way."""
        for arrived in self._arrivals.drain():
            self._look(trainer, *arrived)

    def _look(self, trainer: Trainer, value: torch.Tensor, step: int) -> None:
        loss = value.item()
        if not math.isfinite(loss):
            self._stop(trainer, loss, step)

    def _stop(self, trainer: Trainer, loss: float, step: int) -> None:
        trainer.request_stop(
            f"the loss is {loss} in epoch {trainer.run_progress.current_epoch}, batch {step}"
        )
