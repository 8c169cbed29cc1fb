"""Whether two runs are equal, and where they part: from their states, by bisection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks.values import check_path
from ..errors import CheckpointError
from .cards import differences_of_cards
from .checkpoint import NoState, TrainerState, examine, is_sharded
from .digests import digest_of_file
from .folder import complete_checkpoints
from .read_shards import is_in_shards
from .trained_values import ENGINE_FILES, FILES_OF_TRAINED, read_trained_values

_ROUNDING = 1000
"""Multiples of the precision of a type up to which a difference may be rounding."""

Replay = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class RunComparison:
    """Holds where two runs diverge. Its text is "equal" if they do not."""

    first_difference: int | None
    """The update that differs first; without replays that of the first state that differs. None if equal."""
    last_equal: int | None
    """The newest update after which both have the same weights, as far as is known."""
    differing: list[str]
    """Names of what differs there: parameters, buffers, values of optimizers and of modules beside the model;
    with replays "batch", "loss" and layers too."""
    is_rounding: bool = False
    """All that differs is equal up to rounding."""
    num_replays: int = 0
    """Pairs of replays that were made."""
    cards: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """What the run cards say differently, such as `versions.torch`: the values of both runs."""

    def __str__(self) -> str:
        if self.first_difference is None:
            return "equal"
        last = "no common state" if self.last_equal is None else f"update {self.last_equal}"
        rounding = ", up to rounding" if self.is_rounding else ""
        text = (
            f"equal up to {last}, differ from update {self.first_difference} on{rounding}: {self.differing}"
        )
        causes = [f"{name} is {ours!r} and {theirs!r}" for name, (ours, theirs) in self.cards.items()]
        return "; ".join([text, *(["by their run cards " + ", ".join(causes)] if causes else [])])


def compare_runs(a: str | Path, b: str | Path, replay: tuple[Replay, Replay] | None = None) -> RunComparison:
    """Return where two runs diverge, by the weights and optimizers in their states.

    States of the same update are compared, by bisection: runs that differ once are taken to differ from
    then on. A state that only one of them has is left out. `cards` has the differences of the run cards.

    Args:
        a: a training state, or the folder of a run.
        b: the same of the other run.
        replay: two functions from an update to what `Trainer.replay` returns, of each run. With them the very
            update is found, in at most log2 of the updates between two states, and one more to look at it.

    Raises:
        CheckpointError: there are no states of the same update.
    """
    ours, theirs = _states_of("a", a), _states_of("b", b)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise CheckpointError(
            f"'{a}' has states after the updates {sorted(ours)}, '{b}' after {sorted(theirs)}: none in "
            "common, so nothing can be compared. Save both runs after the same updates."
        )
    cards = differences_of_cards(Path(a), Path(b))
    low, high = 0, len(common)
    while low < high:
        middle = (low + high) // 2
        if _are_equal(ours[common[middle]], theirs[common[middle]]):
            low = middle + 1
        else:
            high = middle
    last_equal = common[low - 1] if low else None
    if low == len(common):
        return RunComparison(None, last_equal, [], cards=cards)
    first = common[low]
    differing, is_rounding = _differing_values(ours[first], theirs[first])
    if replay is None:
        return RunComparison(first, last_equal, differing, is_rounding, cards=cards)
    found = _search(replay, last_equal, first, differing, is_rounding)
    return dataclasses.replace(found, cards=cards)


def _states_of(name: str, path: Any) -> dict[int, tuple[Path, TrainerState]]:
    folder = check_path(name, path, "Pass a training state, or the folder of a run.")
    state = examine(Path(folder))
    states = complete_checkpoints(folder) if isinstance(state, NoState) else {Path(folder): state}
    if not states:
        raise CheckpointError(
            f"{name} is '{path}', which holds no complete training state. Pass a training state, or the "
            "folder in which SaveTrainingStateCallback has saved."
        )
    return {each["run_progress"]["updates_completed"]: (found, each) for found, each in states.items()}


def _are_equal(one: tuple[Path, TrainerState], other: tuple[Path, TrainerState]) -> bool:
    """Whether weights and optimizers are bit-identical.

    A file of weights names its run, so that those of two runs have other digests, and are read.
    """
    if _digests_of(*one) == _digests_of(*other):
        return True
    if any(is_sharded(state) and not is_in_shards(folder) for folder, state in (one, other)):
        # What an engine has pickled is not read here.
        return False
    return not _differing_values(one, other)[0]


def _digests_of(folder: Path, state: TrainerState) -> dict[str, str]:
    known = state.get("digests", {})
    names = [name for name in state["files"] if name.startswith((*FILES_OF_TRAINED, ENGINE_FILES))]
    return {name: known.get(name) or digest_of_file(folder / name) for name in names}


def _differing_values(
    one: tuple[Path, TrainerState], other: tuple[Path, TrainerState]
) -> tuple[list[str], bool]:
    """Return what differs in two states. What only one of them keeps of an optimizer does not count.

    A newer torch may keep further settings in the groups of an optimizer.
    """
    ours, theirs = read_trained_values(*one), read_trained_values(*other)
    common = ours.beside.keys() & theirs.beside.keys()
    names = [name for name in ours.beside if name in common]
    return differing_names(
        {**ours.weights, **{name: ours.beside[name] for name in names}},
        {**theirs.weights, **{name: theirs.beside[name] for name in names}},
    )


def differing_names(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the names of the tensors that differ, and whether all of them are equal up to rounding."""
    names = [name for name in {**one, **other} if not _is_same(one.get(name), other.get(name))]
    return names, bool(names) and all(_is_close(one.get(name), other.get(name)) for name in names)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        # NaN is equal to itself here.
        return bool(torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_close(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_is_same(*pair) or _is_close(*pair) for pair in pairs)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and _is_close([*one.values()], [other[key] for key in one])
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return False
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return False
    largest = one.abs().max().clamp(min=torch.finfo(one.dtype).tiny)
    return bool((one - other).abs().max() <= _ROUNDING * torch.finfo(one.dtype).eps * largest)


def _search(
    replay: tuple[Replay, Replay], last_equal: int | None, first: int, differing: list[str], is_rounding: bool
) -> RunComparison:
    """Find the update between two states, by replays."""
    low, high, number = (last_equal or 0) + 1, first, 0
    looked_at: dict[int, tuple[list[str], bool]] = {}
    while low < high:
        middle = (low + high + 1) // 2
        one, other = (function(middle) for function in replay)
        number += 1
        names, is_close = differing_names(one.weights, other.weights)
        if names:
            # Some update before has made them so.
            high, differing, is_rounding = middle - 1, names, is_close
            continue
        looked_at[middle] = _differences_in_hand(one, other)
        low = middle
        if looked_at[middle][0]:
            high = middle
    if low not in looked_at:
        one, other = (function(low) for function in replay)
        number += 1
        looked_at[low] = _differences_in_hand(one, other)
    names, is_close = looked_at[low]
    # With the same in hand, the step of the optimizer has made the weights differ.
    names, is_close = (names, is_close) if names else (differing, is_rounding)
    return RunComparison(low, low - 1, names, is_close, number)


def _differences_in_hand(one: Any, other: Any) -> tuple[list[str], bool]:
    """Return what differs of two results of a replay, in the order in which an update makes it.

    And whether all of that is equal up to rounding, which a batch and a learning rate never are.
    """
    read, _ = differing_names(*({"indices": each.indices, "batch": each.batch} for each in (one, other)))
    rates = [] if one.learning_rates == other.learning_rates else ["learning_rates"]
    computed = [
        differing_names(one.layers, other.layers),
        differing_names(*({"loss": torch.tensor(each.loss)} for each in (one, other))),
        differing_names(one.gradients, other.gradients),
    ]
    names = [*read, *(name for found, _ in computed for name in found), *rates]
    is_close = not read and not rates and all(are_close for found, are_close in computed if found)
    return list(dict.fromkeys(names)), is_close
