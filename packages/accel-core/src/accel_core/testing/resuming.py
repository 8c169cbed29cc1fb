"""Whether a run goes on as if it had never ended; the error names the state that is missing."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..callbacks.callback import TrainerCallback
from ..checks.values import check_whole_number
from ..engines.trained import without_wrappers
from ..errors import ConfigurationError
from ..state.digests import digest_of_value
from ..state.random import capture_random_state
from ..text import counted

_MOST_NESTED = 20
_OF_MODULES = frozenset(vars(torch.nn.Module()))
"""What torch itself keeps in a module: parameters, buffers, hooks, whether it trains."""

_PACKAGES = ("accel_core", "accel_callbacks", "accel_integrations")

Facts = dict[tuple[str, str], str]
"""Digests of what a run holds after an update, by its owner and its name."""


def assert_resumes_exactly(
    make_trainer: Callable[[], Any],
    data: Any,
    kills: int = 5,
    *,
    num_epochs: int = 2,
    ignore: tuple[str, ...] = (),
    **arguments: Any,
) -> None:
    """Assert that a run that ended at any update continues as if nothing had happened.

    Trains once without a stop, once more while states are saved, and from each of these states once with a
    new trainer. Everything happens in this process: what a module keeps in its globals is not
    lost as it would be with the process.

    Args:
        make_trainer: returns a new trainer with new callbacks, a seed, and no callback that saves states.
        data: the training data; each run has a copy of its own.
        kills: states to continue from, spread over the run.
        num_epochs: as `arguments`, what `Trainer.train` takes.
        ignore: attributes that may differ, such as `"MyCallback.started_at"`.

    Raises:
        AssertionError: something differs; the text names the state that is missing, if that is known.
        ConfigurationError: `kills` is not a positive whole number, or the run has less than two updates.
    """
    check_whole_number("kills", kills, "Pass how many states to go on from.")
    given = {"num_epochs": num_epochs, **arguments}
    plain = _train(make_trainer, data, given, {})
    last = max(plain.seen, default=0)
    if last < 2:
        raise ConfigurationError(
            f"The run has {counted(last, 'updates')}, but at least 2 are needed to end in between. Pass more "
            "data or more epochs."
        )
    updates = sorted({max(1, number * last // (kills + 1)) for number in range(1, kills + 1)})
    with tempfile.TemporaryDirectory(prefix="accel-testing-") as folder:
        states = {update: Path(folder, str(update)) for update in updates}
        saving = _train(make_trainer, data, given, states)
        # What no two runs have in common, such as the time of day, is nobody's state.
        clocks = {
            key
            for update, facts in plain.seen.items()
            for key, digest in facts.items()
            if saving.seen.get(update, {}).get(key) != digest
        }
        _raise_if_not_repeatable(plain, saving, clocks)
        ignored = clocks | {key for facts in plain.seen.values() for key in facts if ".".join(key) in ignore}
        for update, path in states.items():
            resumed = _train(make_trainer, data, {**given, "resume_from": path}, {})
            _raise_if_different(plain, resumed, update, ignored, saving.saved_names)


class _Recorder(TrainerCallback):
    """Notes after each update what a resumed run would have to hold too."""

    order = 2**31
    """After all others, so that it sees what they did after the same update."""

    def __init__(self, states: dict[int, Path]) -> None:
        self.states = states
        self.seen: dict[int, Facts] = {}
        self.saved_names: dict[str, set[str]] = {}
        self.batches: list[str] = []

    def on_train_step_start(self, trainer: Any, batch: Any) -> None:
        self.batches.append(digest_of_value(content_of(batch)))

    def on_optimizer_step_end(self, trainer: Any) -> None:
        update = trainer.run_progress.updates_completed
        self.seen[update] = {**_facts_of(trainer, self), ("", "the batch"): digest_of_value(self.batches)}
        self.batches = []
        if update in self.states:
            for name, callback in [*trainer.callbacks.named(), (type(trainer).__name__, trainer)]:
                self.saved_names[name] = set(callback.state_dict())
            trainer.save_training_state(self.states[update])


def _train(
    make_trainer: Callable[[], Any], data: Any, given: dict[str, Any], states: dict[int, Path]
) -> _Recorder:
    trainer, recorder = make_trainer(), _Recorder(states)
    trainer.callbacks.add_callback(recorder)
    # A data set that changes as it is read must not bring what it is now to the next run. What cannot be
    # copied, such as an open file, serves all runs.
    with contextlib.suppress(Exception):
        data = copy.deepcopy(data)
    trainer.train(data, **given)
    return recorder


def _facts_of(trainer: Any, recorder: _Recorder) -> Facts:
    facts: Facts = {}
    for part, value in capture_random_state(trainer.device).items():
        facts["", f"the random state of {part}"] = digest_of_value(value)
    model = without_wrappers(trainer.model)
    facts["", "the weights"] = digest_of_value(dict(model.state_dict()))
    rates = [group["lr"] for group in trainer.optimizer.param_groups] if trainer.optimizer else []
    facts["", "the learning rates"] = digest_of_value(content_of(rates))
    for owner, holder, own in _holders(trainer, recorder, model):
        for name, value in vars(holder).items():
            if name not in own:
                facts[owner, name] = digest_of_value(content_of(value))
    return facts


def _holders(
    trainer: Any, recorder: _Recorder, model: torch.nn.Module
) -> Iterator[tuple[str, Any, frozenset[str]]]:
    """Yield what may hold state of the user's, with its name and the attributes that are not the user's."""
    for name, callback in trainer.callbacks.named():
        if callback is not recorder:
            yield name, callback, _names_of_accel(type(callback))
    yield type(trainer).__name__, trainer, _names_of_accel(type(trainer))
    for path, module in model.named_modules():
        yield f"{type(module).__name__}{f' ({path})' if path else ''}", module, _OF_MODULES
    for holder in (trainer.loss_func, trainer.train_dataset, trainer.collate_fn):
        if hasattr(holder, "__dict__") and not isinstance(holder, torch.nn.Module):
            yield getattr(holder, "__qualname__", type(holder).__name__), holder, frozenset()


def _names_of_accel(cls: type) -> frozenset[str]:
    """Return what classes of accel keep in an object: what they do not save is no state of the run."""
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in _PACKAGES]
    names = {name for base in bases for name in vars(base)}
    # A name in an overridden method counts too.
    codes = [
        member.__code__ for base in bases for member in vars(base).values() if hasattr(member, "__code__")
    ]
    return frozenset(names).union(*(code.co_names for code in codes))


def content_of(value: Any, depth: int = 0) -> Any:
    """Return plain values that are equal if `value` is, whatever its place in memory."""
    if depth > _MOST_NESTED:
        return type(value).__qualname__
    if isinstance(value, (torch.Tensor, str, bytes, int, float, complex, type(None))):
        return value
    if isinstance(value, dict):
        return {str(key): content_of(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [content_of(inner, depth + 1) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(content_of(inner, depth + 1)) for inner in value)
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tobytes() if value.dtype != object else value.tolist()]
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return content_of(value.bit_generator.state, depth + 1)
    # Objects of libraries have states of their own; what a model or a trainer holds is compared once.
    library = type(value).__module__.partition(".")[0] in ("torch", "accelerate", "accel_core")
    if library or isinstance(value, (torch.nn.Module, type)) or not hasattr(value, "__dict__"):
        return type(value).__qualname__
    if "accel_core.trainer" in {cls.__module__ for cls in type(value).__mro__}:
        return type(value).__qualname__
    return [type(value).__qualname__, content_of(vars(value), depth + 1)]


def _raise_if_not_repeatable(plain: _Recorder, saving: _Recorder, clocks: set[tuple[str, str]]) -> None:
    for update, facts in plain.seen.items():
        names = [
            name
            for (owner, name), digest in facts.items()
            if not owner and (owner, name) in clocks
            if saving.seen.get(update, {}).get((owner, name)) != digest
        ]
        if names:
            held = [f"the attribute `{name}` of {owner}" for owner, name in sorted(clocks) if owner]
            raise AssertionError(
                f"Two runs without an end in between differ, from update {update} on, in {', '.join(names)}. "
                "Something is no function of the seed: the clock, random numbers of a generator that is not "
                "seeded anew by `make_trainer`, or a `state_dict` that changes what it saves."
                + (f" These differ too: {', '.join(held)}." if held else "")
            )


def _raise_if_different(
    plain: _Recorder,
    resumed: _Recorder,
    update: int,
    ignored: set[tuple[str, str]],
    saved_names: dict[str, set[str]],
) -> None:
    differing: list[str] = []
    parts: list[str] = []
    first = 0
    for later in range(update + 1, max(plain.seen) + 1):
        # What a callback clears by itself before its next use has done no harm, so the next update is asked.
        found = [
            key
            for key, digest in plain.seen[later].items()
            if key not in ignored and resumed.seen.get(later, {}).get(key) != digest
        ]
        if found:
            first = later
            differing = [_told_of_attribute(owner, name, saved_names) for owner, name in found if owner]
            parts = [name for owner, name in found if not owner]
            break
    if not first:
        return
    text = f"A run that goes on from update {update} is another one at update {first}:"
    lines = [*differing, *(f"{name} differs" for name in parts)]
    if not differing:
        lines.append("no attribute differs: look at what `on_training_run_start` changes, and at workers")
    raise AssertionError("\n- ".join([text, *lines]))


def _told_of_attribute(owner: str, name: str, saved_names: dict[str, set[str]]) -> str:
    told = f"the attribute `{name}` of {owner} changed and is not"
    if name in saved_names.get(owner, ()):
        return f"{told} put back by its load_state_dict, although its state_dict has {name!r}"
    return f"{told} in its state_dict"
