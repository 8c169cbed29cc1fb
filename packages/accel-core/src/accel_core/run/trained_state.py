"""Saves and loads attributes of a trainer that are trained: modules, optimizers, schedulers."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..engines.engine import Engine, Prepared
from ..engines.trained import Trained
from ..engines.weights import load_into
from ..errors import AccelWarning, CheckpointError, ConfigurationError
from ..processes.collectives import all_gather_object
from ..state import files
from ..state.checkpoint import ATTRIBUTES_FILE, TrainerState
from ..state.shards import APART
from ..text import with_full_stop
from .run import Run
from .trainer_parts import TrainerParts

_KINDS = ("modules", "optimizers", "schedulers", APART)


def what_is_trained(trainer: TrainerParts, prepared: Prepared | None) -> Trained:
    """Return what the optimizers among the attributes of the trainer train.

    Args:
        prepared: None if the model and the optimizer are still the user's own.
    """
    if prepared is None:
        return Trained(vars(trainer), trainer.model, trainer.optimizer)
    return Trained(vars(trainer), prepared.model, prepared.user_optimizer)


def modules_of_optimizer(trainer: TrainerParts) -> Iterable[str]:
    """Return the names of what `trainer.optimizer` alone trains beside the model."""
    attributes = {
        name: value for name, value in vars(trainer).items() if not isinstance(value, torch.optim.Optimizer)
    }
    return Trained(attributes, trainer.model, trainer.optimizer).modules


def train_beside(run: Run, trained: Trained) -> None:
    """Let the steps and updates of `run` train all of `trained`. Every process takes part."""
    run.engine.train_beside(trained, run.weight_of_step, run.stepped)
    run.engine.bind(run.prepared.optimizer)


def find_made_at_start(run: Run) -> None:
    """Train also what `training_run_start` and callbacks have made. Every process takes part."""
    trained = run.engine.trained
    if trained is not None and trained.refresh():
        train_beside(run, trained)


def compare_weights(engine: Engine) -> None:
    """Raise on all processes if they have made different weights; warn once of rounding.

    Every process takes part.
    """
    message = engine.check_equal_parameters()
    if message is not None and engine.trained is not None and not engine.trained.has_warned_of_rounding:
        engine.trained.has_warned_of_rounding = True
        warnings.warn(message, AccelWarning, stacklevel=2)


def compare_weights_once(run: Run) -> None:
    """Compare after the first update of a run that has changed something. Every process takes part."""
    # A trial that may run out of memory in a step does not synchronise: its processes drift apart on purpose.
    if run.step is None or not run.step.is_last:
        return
    run.are_weights_compared = True
    try:
        compare_weights(run.engine)
    except ConfigurationError:
        # DDP has not averaged a bucket with a parameter that the loss does not reach. Its own error, which
        # comes at the next forward pass, names the parameters.
        if not any(all_gather_object(run.lacks_gradients)):
            raise


def names_of(trained: Trained | None) -> list[str]:
    """Return the names of the attributes whose state is saved."""
    if trained is None:
        return []
    trained.refresh()
    return sorted({*trained.modules, *trained.optimizers, *trained.schedulers})


def create_state(trained: Trained | None) -> dict[str, dict[str, Any]]:
    """Return the states of all attributes that are trained, by kind and name.

    Kinds without any are left out.
    """
    parts = {} if trained is None else {kind: getattr(trained, kind) for kind in _KINDS}
    return {
        kind: {name: part.state_dict() for name, part in named.items()}
        for kind, named in parts.items()
        if named
    }


def read_state(
    folder: Path, state: TrainerState, trained: Trained | None
) -> dict[str, dict[str, Any]] | None:
    """Return what `create_state` returned when `folder` was saved; None of a state that is older than this.

    Raises:
        CheckpointError: it has not the same attributes as this trainer.
    """
    if state["attributes"] is None:
        return None
    saved, own = set(state["attributes"]), set(names_of(trained))
    for lacks, has, names in (
        ("this trainer lacks", "the state has", saved - own),
        ("the state lacks", "this trainer trains", own - saved),
    ):
        if names:
            raise CheckpointError(
                f"'{folder}' does not fit this trainer: {has} {sorted(names)} among the attributes, which "
                f"{lacks}. Give the trainer the modules, optimizers and schedulers of the run that was "
                "saved, or begin a new run from an export: load_checkpoint(path, load_optimizer=False)."
            )
    return files.read_object(folder / ATTRIBUTES_FILE, dict) if saved else {}


@contextlib.contextmanager
def loaded(
    trained: Trained | None, content: dict[str, dict[str, Any]], source: Path, is_export: bool = False
) -> Iterator[None]:
    """Load what `create_state` returned, as far as the trainer has it.

    An error here or within leaves it as it was.

    Args:
        source: the file in which it is; `is_export` says of which kind, for messages.
    """
    if trained is None:
        yield
        return
    before = copy.deepcopy(create_state(trained))
    try:
        _load(trained, content, source, is_export)
        yield
    except Exception:
        _load(trained, before, source, is_export)
        raise


def _load(trained: Trained, content: dict[str, dict[str, Any]], source: Path, is_export: bool) -> None:
    for name, state in content.get("modules", {}).items():
        if name in trained.modules:
            try:
                trained.modules[name].load_state_dict(state)
            except (RuntimeError, KeyError) as error:
                raise CheckpointError(
                    f"'{source}' holds the state of another module than trainer.{name}: "
                    f"{with_full_stop(error)} Make trainer.{name} as it was in the run that was saved."
                ) from error
    for name, state in content.get("optimizers", {}).items():
        if name in trained.optimizers:
            load_into(trained.optimizers[name], source, state, is_export)
            # It has stepped before. Else torch warns of a scheduler that steps first.
            trained.optimizers[name]._opt_called = True  # type: ignore[attr-defined]
    for name, state in content.get(APART, {}).items():
        if name in trained.apart:
            load_into(trained.apart[name], source, state, is_export)
    # A scheduler changes nothing of its optimizer when it is loaded, and its rates are in the optimizer's
    # state.
    for name, state in content.get("schedulers", {}).items():
        if name in trained.schedulers:
            load_into(trained.schedulers[name], source, state, is_export)
