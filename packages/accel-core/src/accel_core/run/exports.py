"""Exports of a model to one file, and their loading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch

from ..checks.values import check_flag
from ..engines.trained import Trained
from ..engines.weights import (
    check_finite,
    load_into,
    load_optimizer,
    load_together,
    scheduler_fits,
)
from ..errors import AccelWarning
from ..notices import notify
from ..processes.collectives import run_on_main
from ..state import files
from ..state.export import read_export, write_export
from ..state.store import check_place_in_reach
from ..state.weight_names import with_plain_names
from .choose_load import choose_load
from .modes import loading_weights, weights_to_export
from .trained_state import compare_weights, create_state, loaded, what_is_trained
from .trainer_parts import TrainerParts


def save_export(
    trainer: TrainerParts,
    save_path: Any,
    values: dict[str, Any] | None,
    with_optimizer: bool,
    with_scheduler: bool,
    model: torch.nn.Module,
) -> None:
    """Write what `Trainer.save_checkpoint` promises. Every process takes part."""
    path = check_place_in_reach("save_path", save_path, "Pass the name of a file, such as 'model.pt'.")
    check_flag("save_optimizer", with_optimizer)
    check_flag("save_scheduler", with_scheduler)
    if trainer.run_progress.stage_skipped:
        warnings.warn(
            f"'{path}' was not written: the model does not have the weights of stage "
            f"{trainer.run_progress.stage}, which train skipped because resume_from is a state of a later "
            "stage. Call save_checkpoint only if trainer.run_progress.stage_skipped is False.",
            AccelWarning,
            stacklevel=3,
        )
        return
    # What is apart belongs to the state of an optimizer, which engines that leave it out do not export.
    wanted = {"modules": True, "optimizers": with_optimizer, "schedulers": with_scheduler, "apart": False}
    trained = _trained(trainer)
    check_finite(model, trained.modules)
    compare_weights(trainer.engine)
    with weights_to_export(trainer):
        attributes = trainer.engine.whole_state(create_state(trained))
        content = {
            "model_state_dict": with_plain_names(
                trainer.engine.full_weights(model, trainer.create_model_state)
            ),
            **{f"{kind}_state_dict": attributes[kind] for kind in attributes if wanted[kind]},
            **(values or {}),
        }
        if with_optimizer and trainer.optimizer is not None and trainer.engine.exports_optimizer:
            content["optimizer_state_dict"] = trainer.engine.whole_state(trainer.optimizer.state_dict())
        if with_scheduler and trainer.scheduler is not None:
            content["scheduler_state_dict"] = trainer.scheduler.state_dict()
        origin = {"run_id": trainer.run_id, "update": trainer.run_progress.updates_completed}
        run_on_main(lambda: write_export(path, content, origin), trainer.is_main_process)


def load_export(
    trainer: TrainerParts, checkpoint_path: Any, with_optimizer: bool, with_scheduler: bool
) -> dict[str, Any]:
    """Load an export, all of it or nothing, and return what is in it. Every process takes part."""
    place = check_place_in_reach(
        "checkpoint_path", checkpoint_path, "Pass the file that save_checkpoint wrote."
    )
    check_flag("load_optimizer", with_optimizer)
    check_flag("load_scheduler", with_scheduler)
    content: dict[str, Any] = run_on_main(lambda: read_export(place), trainer.is_main_process)
    # From here on it is only named, in messages.
    path = cast(Path, place)
    model = trainer.get_model(keep_torch_compile=False)
    optimizer = trainer.optimizer if with_optimizer and "optimizer_state_dict" in content else None
    own_load = trainer.load_model_state
    load = choose_load(trainer, path) or trainer.engine.load_full_weights(own_load)
    wanted = {"modules": True, "optimizers": with_optimizer, "schedulers": with_scheduler}
    attributes = {kind: content.get(f"{kind}_state_dict", {}) for kind in wanted if wanted[kind]}
    trained = _trained(trainer)
    with (
        loading_weights(trainer, training=False),
        loaded(trained, attributes, path, is_export=True),
        load_together(model, content["model_state_dict"], path, load, optimizer),
    ):
        if optimizer is not None:
            load_optimizer(optimizer, path, load, trained, content["optimizer_state_dict"])
        has_scheduler = trainer.scheduler is not None and "scheduler_state_dict" in content
        if with_scheduler and has_scheduler and scheduler_fits(load):
            load_into(trainer.scheduler, path, content["scheduler_state_dict"], is_export=True)
    missing = sorted(trained.modules.keys() - attributes["modules"].keys())
    if missing:
        notify(trainer, f"'{path}' has no weights of {missing}, which stay unchanged.", "resume")
    return {key: value for key, value in content.items() if key != files.ORIGIN}


def _trained(trainer: TrainerParts) -> Trained:
    """Return what the trainer trains, also before its first run."""
    return trainer.engine.trained or what_is_trained(trainer, None)
