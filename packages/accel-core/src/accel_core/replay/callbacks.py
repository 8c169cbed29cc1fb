"""The callbacks that take part in a replay: copies of the trainer's own, and the recorder."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch

from ..callbacks.callback import TrainerCallback
from ..callbacks.callback_list import CallbackList
from ..data.batch_sampler import ShardedBatchSampler
from ..data.devices import move_to_device
from ..data.loader import ShardedDataLoader
from ..data.map_style import MapStyleSource
from ..errors import ConfigurationError
from ..processes.group import DataGroup
from ..run.run_progress import RunProgress
from ..text import with_full_stop

CPU = torch.device("cpu")


class UpdateReached(BaseException):
    """Ends a replay. No `Exception`, since nothing has gone wrong and nothing should handle it."""


class ReplayCallbacks(CallbackList):
    """Holds the callbacks of a replay. None of them is told of the exception by which it ends."""

    def _bind(self) -> None:
        super()._bind()
        self.__dict__.pop("on_exception", None)


def copy_callbacks(callbacks: Iterable[TrainerCallback], memo: dict[int, Any]) -> list[TrainerCallback]:
    """Return copies of those that take part in a replay, which share nothing with them.

    Args:
        memo: knows what was copied already, such as the model.

    Raises:
        ConfigurationError: one cannot be copied.
    """
    copies = []
    for callback in callbacks:
        if not callback.runs_in_replay:
            continue
        try:
            copies.append(copy.deepcopy(callback, memo))
        # Raised for open files, locks, and tensors with a graph.
        except (RuntimeError, TypeError) as error:
            name = type(callback).__name__
            raise ConfigurationError(
                f"{name} cannot be copied, but a replay works on copies: {with_full_stop(error)} Set "
                f"runs_in_replay = False in {name} if it has no influence on the training, or make "
                "copy.deepcopy of it work."
            ) from error
    return copies


class Recorder(TrainerCallback):
    """Keeps what the steps of one update have in hand, and ends the replay before the parameters change."""

    order = 10**9
    """After all others, so that gradients are what those have made of them."""

    def __init__(self, update: int, keeps_layers: bool) -> None:
        self.update = update
        self.keeps_layers = keeps_layers
        self.batches: list[Any] = []
        self.outputs: list[Any] = []
        self.losses: list[tuple[float, float]] = []
        """The mean loss of each step, and its number of items."""
        self.gradients: dict[str, torch.Tensor | None] = {}
        self.learning_rates: list[float] = []
        self.layers: dict[str, list[Any]] = {}
        self.hooks: list[Any] = []
        self.indices: list[Any] | None = None
        self.limits_of_exactness: list[str] = []
        self.model: Any = None

    def is_at_update(self, trainer: Any) -> bool:
        """Whether the current update is the one to replay."""
        return bool(trainer.run_progress.updates_completed + 1 == self.update)

    def on_train_step_start(self, trainer: Any, batch: Any) -> None:
        """Let the layers be watched from the first step of the update on."""
        if self.keeps_layers and not self.hooks and self.is_at_update(trainer):
            for name, module in trainer.get_model(keep_torch_compile=False).named_modules():
                if name and not list(module.children()):
                    self.hooks.append(module.register_forward_hook(self._keeper(name)))

    def _keeper(self, name: str) -> Any:
        def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            self.layers.setdefault(name, []).append(detached(output, is_copied=True))

        return keep

    def on_train_step_end(self, trainer: Any, batch: Any, batch_output: dict[str, Any], step: int) -> None:
        """Keep the batch and what came of it."""
        if self.is_at_update(trainer):
            items = batch_output.get("num_items_in_batch", batch_output["batch_size"])
            self.batches.append(batch)
            self.outputs.append(detached(batch_output.get("model_outputs")))
            self.losses.append((batch_output["loss"].item(), float(items)))

    def on_optimizer_step_start(self, trainer: Any) -> None:
        """Keep the gradients, and end the replay."""
        if not self.is_at_update(trainer):
            return
        for hook in self.hooks:
            hook.remove()
        self.model = trainer.get_model(keep_torch_compile=False)
        # Closing the run clears the gradients, some optimizers in place.
        self.gradients = {
            name: None if parameter.grad is None else parameter.grad.detach().clone()
            for name, parameter in self.model.named_parameters()
        }
        loader, progress = trainer.train_dataloader, trainer.run_progress
        self.indices = indices_of_update(loader, progress, trainer.run_config)
        seeds_samples = trainer._run.arguments.seed_each_sample
        self.limits_of_exactness = loader.limits_of_exactness(0, loader.group.size, seeds_samples)
        self.learning_rates = [
            float(group["lr"]) for group in trainer.optimizer.param_groups if "lr" in group
        ]
        raise UpdateReached

    def own_steps(self) -> dict[str, Any]:
        """Return what the steps of this process had in hand, on the CPU, to send to other processes."""
        kept = {"batches": self.batches, "outputs": self.outputs, "layers": self.layers}
        return {**{name: move_to_device(each, CPU) for name, each in kept.items()}, "losses": self.losses}

    def join(self, of_all: list[dict[str, Any]]) -> None:
        """Keep the steps of all processes, those of the first one first."""
        self.batches, self.outputs, self.losses = (
            [step for own in of_all for step in own[name]] for name in ("batches", "outputs", "losses")
        )
        self.layers = {
            name: [output for own in of_all for output in own["layers"].get(name, [])] for name in self.layers
        }

    @property
    def loss(self) -> float:
        """Return the mean over all items of the update."""
        total = sum(items for _, items in self.losses)
        # Of one step it is the loss itself: times its items and divided by them it might be rounded.
        if len(self.losses) == 1 or not total:
            return self.losses[0][0] if self.losses else float("nan")
        return sum(loss * items for loss, items in self.losses) / total


def indices_of_update(loader: ShardedDataLoader, progress: RunProgress, config: Any) -> list[Any] | None:
    """Return the indices of the samples of the current update: those of each process after another.

    None if the data has no index, or gives another order whenever it is asked.
    """
    source = loader.source
    if loader.data_is_sharded or not isinstance(source, MapStyleSource):
        return None
    own = source.sampler
    if not own.order.is_function_of_epoch:
        return None
    indices: list[Any] = []
    for index in range(loader.group.size):
        group = DataGroup(loader.group.size, index)
        sampler = ShardedBatchSampler(own.order, own.batch_size, own.drop_last, group)
        sampler.max_steps, sampler.is_live = own.max_steps, False
        sampler.begin_epoch(own.epoch, progress.samples_completed_in_epoch)
        batches = sampler.batches_with_samples()
        for batch in itertools.islice(batches, config.gradient_accumulation_steps):
            indices += batch
    return indices


def detached(value: Any, is_copied: bool = False) -> Any:
    """Return `value` with its tensors without their graph.

    Args:
        is_copied: copy them too, as layers that work in place would change them.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if is_copied else value.detach()
    if isinstance(value, dict):
        # A copy of the same class, such as the outputs of transformers, which are dictionaries.
        twin = copy.copy(value)
        for key, inner in value.items():
            twin[key] = detached(inner, is_copied)
        return twin
    if isinstance(value, (list, tuple)):
        parts = [detached(inner, is_copied) for inner in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
