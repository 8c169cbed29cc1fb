"""Where a callback exports a model, and whether what stands there is its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from accel_core import CheckpointError, ConfigurationError, TrainerCallback
from accel_core.extending import read_origin, run_on_main

if TYPE_CHECKING:
    from accel_core import Trainer


class Exported(TypedDict):
    """What a callback knows of a model that it has exported."""

    run_id: str | None
    """None for what an older version has saved."""
    update: int | None
    value: float
    """Of the watched metric."""


def why_not_own(path: Path, exported: Exported, metric: str) -> str | None:
    """Return why the file at `path` is not what the callback has exported; None if it is.

    One process calls it.
    """
    try:
        origin = read_origin(path)
    except CheckpointError as error:
        return str(error).rstrip(".")
    found = Exported(
        run_id=origin["run_id"], update=origin["update"], value=origin["values"].get(metric, float("nan"))
    )
    if path.suffix == ".safetensors" and found["run_id"] is None and exported["run_id"] is None:
        # Those of older versions hold weights and nothing else.
        return None
    if found == exported:
        return None
    there, own = (
        f"of the run {each['run_id']!r}, update {each['update']}, with {metric} {each['value']:.6g}"
        for each in (found, exported)
    )
    return f"'{path}' is {there}, and not {own}"


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
