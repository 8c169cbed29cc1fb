"""Makes what the default steps return: the loss, and the number of items that it is the mean of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from .batch_output import UnclearBatchSize, call_loss, num_samples_in
from .counted_loss import counted_loss
from .silent_mistakes import warn_of_loss
from .trainer_parts import TrainerParts

COUNTS_BY_DEFAULT = "what create_batch_output counts"
"""Stands as `step_counts` in a class whose step returns what `create_batch_output` returns."""

FEW = 64
"""A vector is no longer than this if Python looks through it faster than torch."""


def create_batch_output(
    trainer: TrainerParts, loss_func: Any, inputs: Any, outputs: Any, targets: Any
) -> dict[str, Any]:
    """Return the output of a step: `loss_func(outputs, targets)`, and what it is the mean of.

    The number of samples is the one that the loader gave. If a collate function of the user's own made the
    batch, the targets have to agree with it. Cross entropy of torch is the mean over other items: see
    `CountedLoss`. No number waits for an accelerator.

    Args:
        trainer: is in a run, or not if its user calls a step by hand.
    """
    run = trainer._run
    if run is not None and run.is_before_first_loss:
        run.is_before_first_loss = False
        warn_of_loss(loss_func, outputs, targets)
    loss = call_loss(loss_func, outputs, targets)
    given = None if run is None or run.step is None else run.step.num_samples
    ndim = targets.ndim if isinstance(targets, torch.Tensor) else 0
    # One comparison decides here for almost every batch, since this is called in each step.
    batch_size = given if ndim and targets.shape[0] == given else count_samples(targets, inputs, given)
    output = {"loss": loss, "model_outputs": outputs, "batch_size": batch_size}
    if run is None:
        counted = counted_loss(loss_func)
    else:
        if run.counted_loss[0] is not loss_func:
            run.counted_loss = (loss_func, counted_loss(loss_func))
        counted = run.counted_loss[1]
    if counted is None or not ndim:
        return output
    if ndim == 1 and counted.may_be_plain and targets.is_cpu:
        # A list of few numbers is made and looked through in a third of the time of torch's own minimum.
        values = targets.tolist() if targets.shape[0] <= FEW else [targets.min().item()]
        if min(values, default=0) >= 0:
            return output
    if targets.is_floating_point():
        return output
    num_items = counted.count(targets)
    output["num_items_in_batch"] = num_items
    if not targets.is_cpu or num_items <= 0:
        # The mean over nothing is nan, which would stay nan whatever it is multiplied by.
        output["loss"] = torch.where(num_items > 0, loss, 0.0)
    return output


def samples_of(trainer: TrainerParts, targets: Any, inputs: Any) -> int:
    """Return the samples of the batch of the current step, by the loader and by its targets.

    An `UnclearBatchSize` if the two differ.
    """
    step = None if trainer._run is None else trainer._run.step
    return count_samples(targets, inputs, None if step is None else step.num_samples)


def count_samples(targets: Any, inputs: Any, given: int | None) -> int:
    """Return the number of samples of a batch.

    Args:
        targets: one for each sample, or something that does not tell, such as None.
        inputs: tell if neither targets nor loader do.
        given: the number that the loader gave, or None if it does not know.

    Raises:
        ConfigurationError: nothing tells.
    """
    lengths = _possible_lengths(targets)
    if given is not None:
        return given if not lengths or given in lengths else UnclearBatchSize(lengths[0], given)
    if len(lengths) == 1:
        return lengths[0]
    by_inputs = num_samples_in(inputs)
    return lengths[0] if lengths and by_inputs not in lengths else by_inputs


def _possible_lengths(targets: Any) -> list[int]:
    """Return the numbers of samples that `targets` may stand for, the likeliest first."""
    if isinstance(targets, torch.Tensor):
        return [targets.shape[0]] if targets.ndim else []
    if isinstance(targets, PackedSequence):
        # The sequences that have a first step are all of them.
        return [int(targets.batch_sizes[0])]
    if isinstance(targets, Mapping):
        columns = (_possible_lengths(value) for value in targets.values())
        return next((lengths for lengths in columns if lengths), [])
    if not isinstance(targets, (list, tuple)):
        return []
    # A list has one entry for each sample, or it is a list of columns, as default_collate makes of tuples.
    return [len(targets), *(_possible_lengths(targets[0]) if targets else [])]


def describe_counting(trainer: TrainerParts, base: type) -> str:
    """Return what the loss of a batch of training is the mean of, in words.

    Args:
        base: `Trainer`, by which is known which step the trainer's class has.
    """
    name = "calculate_train_batch_loss"
    definer = next(kind for kind in type(trainer).__mro__ if name in vars(kind))
    counting = vars(definer).get("step_counts", f"what {definer.__name__}.{name} returns the number of")
    counted = counted_loss(trainer.loss_func)
    loader = trainer.train_dataloader
    has_own_collate = trainer.collate_fn is not None if loader is None else loader.has_own_collate
    if definer is not base and counting != COUNTS_BY_DEFAULT:
        pass
    elif counted is not None:
        by_weight = "" if counted.weight is None else ", by the weights of their classes"
        counting = f"targets that are not ignored{by_weight}"
    elif has_own_collate:
        counting = "samples, by the length of the targets, which has to be the loader's number"
    else:
        counting = "samples, as the loader gives them"
    return f"the loss of a batch is the mean over {counting}"
