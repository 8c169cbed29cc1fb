"""ConvertSyncBatchNormCallback: batch norms with the statistics of all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import is_frozen

if TYPE_CHECKING:
    from accel_core import Trainer


class ConvertSyncBatchNormCallback(TrainerCallback):
    """Replace the batch norms of the model by `torch.nn.SyncBatchNorm`.

    `SyncBatchNorm` normalises over the batches of all processes. Use it if the batch of one process is too
    small for good statistics. The model is converted before it is wrapped, and only if several processes
    share the data. `SyncBatchNorm` trains on accelerators only.
    """

    order = -100
    """Before all that looks at the modules of the model, as freezing does."""

    def on_prepare_start(self, trainer: Trainer) -> None:
        """Convert the model; raise `ConfigurationError` on a CPU, where torch cannot train it."""
        # A single process sees the whole batch already.
        if trainer.data_group.is_single:
            return
        # A frozen model is evaluated only, with statistics that it has already, which works on a CPU too.
        if trainer.device.type == "cpu" and not is_frozen(trainer.model):
            raise ConfigurationError(
                "ConvertSyncBatchNormCallback needs an accelerator, but this run is on the CPU, where torch "
                "has no SyncBatchNorm for training. Leave the callback out on a CPU."
            )
        # The new modules hold the old parameters and buffers, so the optimizer need not know.
        trainer.model = nn.SyncBatchNorm.convert_sync_batchnorm(trainer.model)
