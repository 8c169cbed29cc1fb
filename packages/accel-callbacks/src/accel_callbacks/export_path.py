"""Check the path that a callback exports a model to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import run_on_main

if TYPE_CHECKING:
    from accel_core import Trainer


def check_export_path(trainer: Trainer, callback: TrainerCallback, save_path: Path) -> None:
    """Raise if `save_path` is a folder, or if another callback exports to it.

    Call it in `on_training_run_start`, before an epoch is spent. Every process takes part.
    """
    owner = type(callback).__name__
    for other in trainer.callbacks:
        if other is not callback and getattr(other, "save_path", None) == save_path:
            raise ConfigurationError(
                f"save_path is '{save_path}' for {owner} and for {type(other).__name__}, so each would "
                "overwrite what the other has saved. Give each callback a path of its own."
            )
    # The main process writes, so what it sees on its disk counts for all.
    if run_on_main(save_path.is_dir, trainer.is_main_process):
        raise ConfigurationError(
            f"save_path of {owner} is '{save_path}', which is a folder, but an export is a file. Pass "
            f"'{save_path / 'model.pt'}', for example."
        )
