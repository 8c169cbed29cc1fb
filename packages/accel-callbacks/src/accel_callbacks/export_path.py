"""Where a callback exports a model, and whether what stands there is its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from accel_core import AccelWarning, CheckpointError, ConfigurationError, TrainerCallback
from accel_core.extending import Address, NotFiniteError, StoreError, read_origin, run_on_main

if TYPE_CHECKING:
    from accel_core import Trainer


class Exported(TypedDict):
    """What a callback knows of a model that it has exported."""

    run_id: str | None
    """None for what an older version has saved."""
    update: int | None
    value: float
    """Of the watched metric."""


def why_not_own(path: Path | Address, exported: Exported, metric: str) -> str | None:
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


def export_to(trainer: Trainer, place: Path | Address, values: dict[str, Any], **arguments: Any) -> bool:
    """Export the model as `save_checkpoint` does, and return whether it stands. Every process takes part.

    If the parameters are not finite, or a store fails, this warns: the export before is intact, and the run
    goes on.
    """
    try:
        trainer.save_checkpoint(as_argument(place), values, **arguments)
    except (NotFiniteError, StoreError) as error:
        warnings.warn(str(error), AccelWarning, stacklevel=2)
        return False
    return True


def as_argument(place: Path | Address) -> Path | str:
    """Return a place as the methods of the trainer take it."""
    return place if isinstance(place, Path) else str(place)


def check_export_path(trainer: Trainer, callback: TrainerCallback, save_path: Path | Address) -> None:
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
    if isinstance(save_path, Address):
        return
    # The main process writes, so what it sees on its disk counts for all.
    if run_on_main(save_path.is_dir, trainer.is_main_process):
        raise ConfigurationError(
            f"save_path of {owner} is '{save_path}', which is a folder, but an export is a file. Pass "
            f"'{save_path / 'model.pt'}', for example."
        )
