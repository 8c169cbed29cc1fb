"""Chooses how much of a model's state is loaded: all of it, or what fits."""

from __future__ import annotations

import functools
from pathlib import Path

from ..engines.partial_loading import PartialLoad
from ..errors import ConfigurationError
from ..notices import notify
from .trainer_parts import TrainerParts


def choose_load(trainer: TrainerParts, source: Path) -> PartialLoad | None:
    """Return what loads the part that fits, if the trainer asks for it, else None.

    Raises:
        ConfigurationError: the engine shards the model.
    """
    if not trainer.load_partial_states:
        return None
    if trainer.engine.shards_parameters:
        raise ConfigurationError(
            f"trainer.load_partial_states is {trainer.load_partial_states}, but {trainer.engine.name} shards "
            "the model and loads whole states only. Set it to False; to load a part, use one process or DDP, "
            "and export there."
        )
    return PartialLoad(
        trainer.load_model_state,
        trainer.create_model_state,
        source,
        functools.partial(notify, trainer, room="resume"),
    )
