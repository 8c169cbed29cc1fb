"""UnfreezeCallback: freeze parts of a model at first, and train them from a later epoch on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from accel_core import ConfigurationError, TrainerCallback
from accel_core.extending import (
    check_flag,
    check_positive,
    check_whole_number,
    counted,
    notify,
    plain,
    preview,
)

from .model_freezer import ModelFreezer

if TYPE_CHECKING:
    from accel_core import Trainer

Part = int | str


class _Entry(NamedTuple):
    """A part of the model, and the epoch from which on it is trained."""

    epoch: int
    part: Part
    lr: float | None


class UnfreezeCallback(TrainerCallback):
    """Freeze the parts in the schedule before the first epoch, and unfreeze each when its epoch begins.

    ```python
    UnfreezeCallback({2: -2, 4: {"encoder.*": 1e-5, "cls_token": 1e-6}})
    ```

    A part is the index of a layer group of `ModelFreezer`, negative from the end, or the name of parameters,
    in which `*` stands for anything. A part with a number is trained with that learning rate, in a parameter
    group of its own; the others stay in the group that they are in, or join the optimizer with its default
    rate. All groups are there from the first update, so schedulers know them: the rates are base rates, on
    which a scheduler acts from the beginning of the run.

    Parts that the schedule does not name stay as they are, as do adapters on a frozen base. A part that is
    named twice is trained from the first of its epochs on. Each run begins with all parts frozen; a later
    stage of it (`reset_run_history=False`) and a resumed run keep those that were unfrozen. On several
    processes the model is wrapped again, so that the gradients of what is unfrozen are synchronised.
    """

    order = -50
    """Before your own callbacks, which see the model as it will be trained."""

    def __init__(
        self,
        schedule: Mapping[int, Part | Sequence[Part] | Mapping[Part, float]],
        freeze_batch_norms: bool = False,
        set_modules_as_eval: bool = False,
    ) -> None:
        """Hold the schedule.

        Args:
            schedule: by epoch, counted from 1: a part, several, or parts with their learning rates.
            freeze_batch_norms: freeze batch norms in layer groups too, as in `ModelFreezer`.
            set_modules_as_eval: keep frozen modules in eval mode, without dropout.

        Raises:
            ConfigurationError: the schedule cannot be used.
        """
        self._entries = _entries_of(schedule)
        self.freeze_batch_norms = check_flag("freeze_batch_norms", freeze_batch_norms)
        self.set_modules_as_eval = check_flag("set_modules_as_eval", set_modules_as_eval)
        self.freezer: ModelFreezer | None = None
        """Freezes and unfreezes the model; None until it is prepared."""

    def on_prepare_start(self, trainer: Trainer) -> None:
        """Freeze, and give the optimizer the parameter groups of the schedule.

        Raises:
            ConfigurationError: the schedule does not fit the model, or the engine shards it.
        """
        # Before DDP wraps the model, which would wait for gradients of parameters that have none.
        if trainer.engine.shards_parameters:
            raise ConfigurationError(
                f"UnfreezeCallback cannot unfreeze what {trainer.engine.name} has "
                "sharded. Use DDP, or freeze for the whole run with ModelFreezer."
            )
        freezer = ModelFreezer(trainer.get_model(keep_torch_compile=False), self.freeze_batch_norms)
        parts = [(entry.lr, freezer.get_parameters(entry.part)) for entry in self._entries]
        self._check_parts([parameters for _, parameters in parts])
        # A run without anything to train fails in backward, with a message of torch.
        scheduled = {id(parameter) for _, parameters in parts for parameter in parameters}
        if scheduled.issuperset(map(id, freezer.get_trainable_parameters())):
            raise ConfigurationError(
                f"The schedule of UnfreezeCallback freezes all of {type(freezer.model).__name__}, so there "
                "is nothing to train in the first epoch. Leave out what is to be trained from the "
                "beginning, such as the last layer group."
            )
        self.freezer = freezer
        self._freeze(freezer)
        if trainer.optimizer is not None:
            names = {id(parameter): name for name, parameter in freezer.model.named_parameters()}
            for lr, parameters in _each_once(parts):
                _give_to_optimizer(trainer.optimizer, parameters, lr, names)

    def on_training_run_start(self, trainer: Trainer) -> None:
        """Freeze again, also in a second run; a later stage unfreezes when its first epoch begins."""
        # The model is prepared only once, so `on_prepare_start` fires only before the first run.
        self._freeze(self._freezer_of(trainer))

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Unfreeze what is due, and keep the rest in eval mode if that is wanted."""
        freezer = self._freezer_of(trainer)
        epoch = trainer.run_progress.current_epoch
        num_unfrozen = 0
        # Earlier epochs too, since a resumed run begins in the middle of the schedule.
        for entry in self._entries:
            if entry.epoch <= epoch:
                num_unfrozen += self._unfreeze(freezer, entry.part)
        # The trainer has put the whole model in train mode just before.
        freezer.restore_eval_modes()
        if num_unfrozen:
            notify(
                trainer,
                f"Training includes {counted(format(num_unfrozen, ','), 'more parameters')} from epoch "
                f"{epoch} on.",
            )

    def _check_parts(self, parameters_of_parts: list[list[nn.Parameter]]) -> None:
        """Raise if the schedule names only modules without parameters for some epoch."""
        with_parameters = {
            entry.epoch
            for entry, parameters in zip(self._entries, parameters_of_parts, strict=True)
            if parameters
        }
        for entry in self._entries:
            if entry.epoch not in with_parameters:
                raise ConfigurationError(
                    f"schedule has {entry.part!r} for epoch {entry.epoch}, but it holds no parameters that "
                    "could be frozen. ModelFreezer(model).get_layer_groups() has the groups; batch norms "
                    "count with freeze_batch_norms=True."
                )

    def _freezer_of(self, trainer: Trainer) -> ModelFreezer:
        if self.freezer is None or self.freezer.model is not trainer.get_model(keep_torch_compile=False):
            raise ConfigurationError(
                "UnfreezeCallback was added after the trainer had prepared its model, but it has to freeze "
                "before. Pass it to Trainer(..., callbacks=...)."
            )
        return self.freezer

    def _unfreeze(self, freezer: ModelFreezer, part: Part) -> int:
        """Unfreeze a part, and return the number of its elements that were frozen."""
        if isinstance(part, str):
            groups = freezer.unfreeze_parameters(part, set_modules_as_training=self.set_modules_as_eval)
        else:
            groups = freezer.unfreeze(part, part, set_modules_as_training=self.set_modules_as_eval)
        return sum(parameter.numel() for group in groups.values() for parameter in group["params"])

    def _freeze(self, freezer: ModelFreezer) -> None:
        for entry in self._entries:
            if isinstance(entry.part, str):
                freezer.freeze_parameters(entry.part, self.set_modules_as_eval)
            else:
                freezer.freeze(entry.part, entry.part, self.set_modules_as_eval)


def _entries_of(schedule: Any) -> list[_Entry]:
    example = "Pass {2: -2, 4: {'encoder.*': 1e-5}}, for example."
    if not isinstance(schedule, Mapping) or not schedule:
        raise ConfigurationError(
            f"schedule is {preview(schedule)}, but must be a dictionary of parts by epoch. {example}"
        )
    entries = []
    for epoch, parts in schedule.items():
        epoch = check_whole_number("An epoch in schedule", epoch, example)
        if epoch == 1:
            raise ConfigurationError(
                f"schedule has {preview(parts)} for epoch 1, but all that schedule names is frozen in epoch "
                "1. Begin with epoch 2, and leave out what is to be trained from the beginning."
            )
        parts = plain(parts)
        several = isinstance(parts, Iterable) and not isinstance(parts, str)
        rates = parts if isinstance(parts, Mapping) else dict.fromkeys(parts if several else [parts])
        for part, lr in rates.items():
            part = plain(part)
            if not _is_part(part):
                raise ConfigurationError(
                    f"schedule has {preview(part)} for epoch {epoch}, but must have the index of a layer "
                    f"group or the name of parameters. {example}"
                )
            lr = check_positive(f"The learning rate of {part!r} in schedule", lr, example, optional=True)
            entries.append(_Entry(epoch, part, lr))
    return sorted(entries, key=lambda entry: entry.epoch)


def _is_part(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _each_once(
    parts: list[tuple[float | None, list[nn.Parameter]]],
) -> list[tuple[float | None, list[nn.Parameter]]]:
    """Return the parts without the parameters that an earlier part has."""
    seen: set[int] = set()
    separate = []
    for lr, parameters in parts:
        separate.append((lr, [parameter for parameter in parameters if id(parameter) not in seen]))
        seen.update(map(id, parameters))
    return separate


def _give_to_optimizer(
    optimizer: Any, parameters: list[nn.Parameter], lr: float | None, names: Mapping[int, str]
) -> None:
    """Let the optimizer hold `parameters`, with the learning rate `lr` if it is not None.

    Args:
        names: names of the parameters by their `id`.
    """
    # An optimizer that was made of named parameters takes only such.
    has_names = "param_names" in optimizer.param_groups[0]

    def add(chosen: list[nn.Parameter], **options: Any) -> None:
        named = [(names[id(parameter)], parameter) for parameter in chosen]
        optimizer.add_param_group({**options, "params": named if has_names else chosen})

    wanted = {id(parameter) for parameter in parameters}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # A list of its own, since new groups are added below.
    groups_before = list(optimizer.param_groups)
    if wanted - held:
        add(
            [parameter for parameter in parameters if id(parameter) not in held],
            **({} if lr is None else {"lr": lr}),
        )
    for group in groups_before if lr is not None else ():
        chosen = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if len(chosen) == len(group["params"]):
            group["lr"] = lr
            # The base of an earlier scheduler, which a new one would take in place of the rate.
            group.pop("initial_lr", None)
        elif chosen:
            # The optimizer's states belong to parameters, not to groups, so they stay with those that move.
            stays = [id(parameter) not in wanted for parameter in group["params"]]
            for key in {"params", "param_names"} & group.keys():
                group[key] = list(itertools.compress(group[key], stays))
            options = {
                key: value
                for key, value in group.items()
                if key not in ("params", "param_names", "initial_lr")
            }
            add(chosen, **{**options, "lr": lr})
