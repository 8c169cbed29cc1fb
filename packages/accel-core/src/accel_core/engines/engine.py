"""What an engine is: how one process, or several together, run the steps of a run.

The trainer asks its engine wherever engines differ, and never asks which engine it is. `choose.py` makes the
engine; a further one is a class in a file of its own and a line in the table there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..processes.group import DataGroup
from ..state.shards import Shards
from .carried_word import CarriedWord
from .further_optimizers import FurtherOptimizers
from .patches import Patches
from .trained import Trained

CreateState = Callable[[torch.nn.Module], dict[str, Any]]
LoadState = Callable[[torch.nn.Module, dict[str, Any]], None]
Context = contextlib.AbstractContextManager[Any]

StepWeight = Callable[[], float | None]

LEFT_TO_ENGINE = ("optimizer_step", "optimizer_zero_grad", "clip_gradients")
"""Methods that a trainer must not override if its engine steps in backward."""


@dataclasses.dataclass
class Prepared:
    """The user's model and optimizer, with what `prepare` made of them."""

    user_model: torch.nn.Module
    user_optimizer: Any
    model: torch.nn.Module
    optimizer: Any
    patches: Patches
    """What `prepare` has set on the user's model and in the accelerator; on in a run."""

    def is_of(self, model: torch.nn.Module, optimizer: Any) -> bool:
        """Whether these are the very objects that were prepared, and the model as it was then."""
        return self.user_model is model and self.user_optimizer is optimizer and self.patches.fit()


class Engine(Protocol):
    """The things in which engines differ.

    Every process takes part in each method, unless it says otherwise.
    """

    name: str
    """For messages."""
    group: DataGroup
    shards_parameters: bool
    """Parameters are spread over the processes: none of them has a whole model."""
    gathers_files: bool
    """Every process takes part in `main_files`, and not the main one alone."""
    writes_in_background: bool
    """A training state may be written while training goes on: nothing is exchanged for it after a copy."""
    exports_optimizer: bool
    """The state of the optimizer can be had whole, so exports may hold it."""
    steps_in_backward: bool
    """The parameters change inside backward, so nothing can be done to the gradients before."""
    has_collective_forward: bool
    """A forward pass communicates, so every process has to make the same number of them."""
    may_skip_updates: bool
    """An update whose float16 gradients are not finite changes nothing."""
    prepared: Prepared | None
    """What was prepared last; kept, so that a second run trains the same objects."""
    limits_of_exactness: list[str]
    """Sentences on what a resumed run cannot promise with this engine, known once it has prepared."""
    trained: Trained | None
    """What the latest run trains, as it was at its beginning."""
    further: FurtherOptimizers | None
    """Steps the further optimizers of the latest run."""
    word: CarriedWord | None
    """Travels with the gradients of an update, so that processes agree without a message of their own."""

    # What a step calls, bound by `bind`: attributes, so that a step makes no call more than by hand.
    backward: Callable[[torch.Tensor], None]
    optimizer: Any
    """The object whose `step` is called.

    Its `step` is looked up at each update, since schedulers replace it.
    """
    zero_grad: Callable[[], None]
    clip_norm: Callable[..., Any]
    """From parameters and the largest norm."""
    synchronize: Callable[[torch.nn.Module, bool], Context]
    """From the model, and whether a step is the last of its update, to the context of that step."""

    # ---------------------------------------------------------------- before a run

    def check(self, overridden: list[str], clip_value: Any, clip_norm: Any, has_plan: bool) -> None:
        """Raise `ConfigurationError` if the run asks for what this engine does not do.

        Args:
            overridden: those of `LEFT_TO_ENGINE` that the trainer's class overrides.
            clip_value: `gradient_clip_value` of the run.
            clip_norm: `gradient_clip_norm` of the run.
            has_plan: the items of an update are known before its first backward.
        """

    def check_model(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Raise `ConfigurationError` for a model that the user has laid out in another way than this engine.

        No communication.

        Args:
            optimizer: the user's, or None.
        """

    def completed_config(self, per_device_batch_size: int) -> Context:
        """Return a context in which the engine's own configuration has what preparing needs."""

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> tuple[torch.nn.Module, Any]:
        """Return model and optimizer, placed on the device and wrapped."""

    def keep(self, prepared: Prepared) -> None:
        """Keep what the trainer's `prepare`, which a user may override, has made. No communication."""

    def check_trained(self, modules: Iterable[str], optimizers: Iterable[str]) -> None:
        """Raise `ConfigurationError` if this engine cannot train what is beside the model. No communication.

        Args:
            modules: names of attributes of the trainer of which its optimizer holds a parameter.
            optimizers: names of its further optimizers.
        """

    def check_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Raise `ConfigurationError` if preparing has left an attribute of the trainer behind.

        No communication.
        """

    def train_beside(self, trained: Trained, step_weight: StepWeight, stepped: list[Any]) -> None:
        """Train what is beside the model too, from the same values on every process.

        Args:
            step_weight: returns what this process weighs in the current step, or None outside of steps.
            stepped: takes the further optimizers that step inside that step.
        """

    def bypasses_accelerate(self, optimizer: Any) -> bool:
        """Whether steps call torch itself, since Accelerate has nothing to add. The weights are the same."""

    def bind(self, optimizer: Any) -> None:
        """Choose what a step calls, for the prepared `optimizer`, or for None if nothing is trained."""

    def set_clipping(self, gradient_clip_norm: float | None) -> None:
        """Tell an engine that clips by itself what `train` was told."""

    # ---------------------------------------------------------------- in the loop

    def model_to_train(self) -> torch.nn.Module:
        """Return the prepared model, wrapped again if parameters were frozen or unfrozen since."""

    def module_to_evaluate(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return what an evaluation calls. No communication."""

    def average_beside(self) -> None:
        """Average the gradients that backward has not averaged: those of parameters beside the model."""

    def scale_gradients(self, model: torch.nn.Module, factor: float | torch.Tensor) -> None:
        """Multiply all gradients of the update by `factor`."""

    def clip_gradients(
        self, model: torch.nn.Module, clip_value: float | None, clip_norm: float | None
    ) -> None:
        """Clip the gradients of the parameters that the optimizer holds, by value and then by norm."""

    def check_equal_parameters(self) -> str | None:
        """Compare what the processes have made of the parameters.

        Returns:
            What to warn of, if they differ by no more than rounding.

        Raises:
            ConfigurationError: they differ by more.
        """

    # ---------------------------------------------------------------- weights and files

    def full_weights(self, model: torch.nn.Module, create_state: CreateState) -> dict[str, Any]:
        """Return the whole model's state, with the main process's buffers, as `create_state` makes it."""

    def whole_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state of anything that is trained, with whole tensors on the main process."""

    def load_full_weights(self, load: LoadState) -> LoadState:
        """Return what loads the state of the whole model: `load`, unless the parameters are spread."""

    def main_files(self, scheduler: Any, create_state: CreateState) -> dict[str, Any]:
        """Return the contents of the files that the main process writes into a training state, by name."""

    def create_shards(self) -> Shards | None:
        """Return what this process writes of model and optimizer, without a message to others.

        None if `write_own_files` writes them, or the main process. No communication.
        """

    @property
    def write_own_files(self) -> Callable[[Path], None] | None:
        """Writes the engine's own files into a folder, all processes together; None if it has none."""

    def load_files(self, folder: Path, scheduler: Any, load: LoadState) -> None:
        """Load what `main_files` and the engine itself have written."""

    def check_files(self, folder: Path, saved_processes: int, trust_engine_files: bool) -> None:
        """Raise if this engine cannot continue from a training state, or is not trusted to read it.

        No communication.
        """
