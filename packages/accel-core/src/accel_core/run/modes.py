"""Train mode and eval mode in a run: of the trainer's model, and of its optimizers that have modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..engines.modes import optimizers_in_mode, optimizers_with_modes, set_optimizer_modes, switch_optimizers
from ..errors import ConfigurationError
from ..notices import notify
from .run import Run
from .trainer_parts import TrainerParts


def own_model(trainer: TrainerParts) -> torch.nn.Module:
    """Return the user's own model, unwrapped and uncompiled: its mode is what counts."""
    prepared = trainer.engine.prepared
    model = trainer.model if prepared is None else prepared.user_model
    inner: torch.nn.Module = getattr(model, "_orig_mod", model)
    return inner


def begin_train_mode(trainer: TrainerParts, run: Run) -> None:
    """Put all in train mode at the beginning of a run.

    A model that is in eval mode itself, as `from_pretrained` returns it, is put in train mode with all that
    is in it. Prints which modules of the model stay in eval mode.

    Raises:
        ConfigurationError: the engine holds the weights where an optimizer cannot exchange them.
    """
    with_modes = optimizers_with_modes(vars(trainer))
    if with_modes and run.engine.steps_in_backward:
        raise ConfigurationError(
            f"The optimizer {type(with_modes[0]).__name__} exchanges the weights by its train() and eval(), "
            f"but {run.engine.name} holds them in a copy of its own. Use DDP or FSDP2, or another optimizer."
        )
    put_in_train_mode(trainer, run)
    if message := run.training_modes.describe(own_model(trainer)):
        notify(trainer, message)


def put_in_train_mode(trainer: TrainerParts, run: Run) -> None:
    """Put the model in train mode, without the modules that stay in eval mode, and optimizers with modes."""
    run.training_modes.restore(trainer.model, own_model(trainer))
    set_optimizer_modes(vars(trainer), training=True)


@contextlib.contextmanager
def loading_weights(trainer: TrainerParts, training: bool) -> Iterator[None]:
    """Let optimizers that have modes be in the mode of the weights that are loaded within.

    Afterwards they are in the mode of the model. After an error everything is as it was.

    Args:
        training: those of train mode, as in training states; else those of eval mode, as in exports.
    """
    switch_back = switch_optimizers(vars(trainer), training)
    try:
        yield
    except BaseException:
        switch_back()
        raise
    set_optimizer_modes(vars(trainer), own_model(trainer).training)


def weights_to_export(trainer: TrainerParts) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model has the weights to use: those of its optimizer's eval mode."""
    return optimizers_in_mode(vars(trainer), training=False)


def weights_to_train(trainer: TrainerParts) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the model has the weights to train: those of its optimizer's train mode."""
    return optimizers_in_mode(vars(trainer), training=True)
