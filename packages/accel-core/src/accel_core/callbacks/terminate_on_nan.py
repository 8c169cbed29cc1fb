"""TerminateOnNaNCallback stops all processes when the loss is no longer finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .callback import TrainerCallback

if TYPE_CHECKING:
    from ..trainer import Trainer


class TerminateOnNaNCallback(TrainerCallback):
    """Ask all processes to stop when the loss of a batch is nan or infinite on any of them.

    On a CPU the callback looks at the loss at once. It does not wait for an accelerator, whose loss it reads
    one step later.
    """

    reads_batches = False

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Forget the run before."""
        # The loss on its way to the CPU, the event after its copy, and the number of its batch.
        self._pending: tuple[torch.Tensor, torch.Event, int] | None = None

    def on_train_step_end(
        self, trainer: Trainer, batch: Any, batch_output: dict[str, Any], step: int
    ) -> None:
        """Look at the loss, or at the one before if it is on an accelerator."""
        loss = batch_output["loss"]
        if loss.is_cpu:
            if not math.isfinite(loss.item()):
                self._stop(trainer, loss.item(), step)
            return
        pending, self._pending = self._pending, self._copy(loss.detach(), step)
        if pending is not None:
            value, copied, step = pending
            # Waits for the copy of the batch before, not for the work of this one.
            copied.synchronize()
            if not math.isfinite(value.item()):
                self._stop(trainer, value.item(), step)

    def _copy(self, loss: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Event, int]:
        # Only a copy into pinned memory runs beside the computation.
        value = torch.empty_like(loss, device="cpu", pin_memory=True)
        value.copy_(loss, non_blocking=True)
        copied = torch.Event(loss.device)
        copied.record()
        return value, copied, step

    def _stop(self, trainer: Trainer, loss: float, step: int) -> None:
        trainer.request_stop(
            f"the loss is {loss} in epoch {trainer.run_progress.current_epoch}, batch {step}"
        )
