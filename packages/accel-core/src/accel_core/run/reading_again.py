"""Reads the training data once more between two epochs, for what has to be computed of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from . import preparing
from .loaders import training_data_again
from .run import require_training
from .trainer_parts import TrainerParts


@contextlib.contextmanager
def reading_training_data(trainer: TrainerParts, model: torch.nn.Module) -> Iterator[Iterator[Any]]:
    """Give this process's batches of the training data while `model` stands in for the trainer's.

    They are computed without gradients. Training goes on as if nothing had been read: modes, the random state
    and the position in the data are put back. Call it between two epochs; every process takes part.
    """
    run, arguments = require_training(trainer._run, "reading_training_data")
    with (
        training_data_again(trainer, run, arguments) as loader,
        preparing.standing_in(trainer, model),
        preparing.evaluating(trainer, run),
    ):
        # A padding step repeats a batch, and a batch that is left out is None.
        yield (
            step.batch for step in run.eval_steps(loader) if step.batch is not None and not step.is_padding
        )
