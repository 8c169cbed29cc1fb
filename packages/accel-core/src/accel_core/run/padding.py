"""The step of a process that has no samples while others have some."""

from __future__ import annotations

from ..engines.weights import preserving_buffers_and_rng
from .run import Run
from .steps import Step
from .trainer_parts import TrainerParts
from .update_groups import UpdateGroup


def run_padding_step(trainer: TrainerParts, run: Run, step: Step, group: UpdateGroup) -> None:
    """Take part in the communication of a step without samples: its batch has weight zero."""
    group.count_padding(step)
    if step.batch is None:
        return
    preserving = preserving_buffers_and_rng(trainer.model, trainer.device)
    with preserving, run.engine.synchronize(trainer.model, step.is_last):
        trainer.backward_step(trainer.calculate_train_batch_loss(step.batch)["loss"] * 0.0)
