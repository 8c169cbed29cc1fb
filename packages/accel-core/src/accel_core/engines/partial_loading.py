"""Loads of a state what fits a model that has changed since, and says what was left."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..state.weight_names import plain_name, with_names_of
from .engine import CreateState, LoadState
from .trained import Trained

Held = list[list[tuple[str, list[int]]]]
"""Name and shape of each parameter of an optimizer, by group, in the order of its state."""


def parameters_held(trained: Trained | None, optimizer: Any) -> Held:
    """Return the names and shapes of what `optimizer` holds.

    A parameter that is not known has no name, as has one of several that are called alike: `head.weight` of
    the model, and that of the module `trainer.head`.
    """
    named = [] if trained is None else list(trained.named_parameters())
    numbers = Counter(plain_name(name) for name, _ in named)
    known = {id(held): plain_name(name) for name, held in named if numbers[plain_name(name)] == 1}
    return [
        [(known.get(id(held), ""), list(held.shape)) for held in group["params"]]
        for group in optimizer.param_groups
    ]


class PartialLoad:
    """Stands in for a trainer's `load_model_state`: loads what fits by name and shape, and keeps the rest.

    Args:
        load: the trainer's own, which gets a state that is complete.
        create_state: the trainer's own, which says what a complete state has.
        source: the state or the export, for messages.
        tell: prints on the main process.
    """

    def __init__(
        self, load: LoadState, create_state: CreateState, source: Path, tell: Callable[[str], None]
    ) -> None:
        self.load = load
        self.create_state = create_state
        self.source = source
        self.tell = tell
        self.has_other_groups = False
        """The optimizer has another number of groups than the saved one, so a scheduler does not fit."""
        self._own: set[str] = set()
        self._missing: list[str] = []
        self._reshaped: list[str] = []
        self._left_out: list[str] = []

    def __call__(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load what `fitting` returned, and print what it left."""
        self.load(model, state)
        lists = {
            "names of the state that were left out": self._left_out,
            "names of the model that were not found": self._missing,
            "names of the model with another shape": self._reshaped,
        }
        found = "; ".join(f"{what}: {names}" for what, names in lists.items() if names)
        if found:
            self.tell(
                f"'{self.source}' was loaded in part, and the rest of the model stays as it is. "
                f"{found[0].upper()}{found[1:]}."
            )

    def fitting(self, model: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a complete state of the model: what fits of `state`, and its own values for the rest.

        Raises:
            CheckpointError: nothing fits, so this cannot be what was meant.
        """
        own = self.create_state(model)
        state = with_names_of(own, state)
        self._own = {plain_name(name) for name in own}
        self._left_out = sorted(name for name in state if name not in own)
        self._missing = [name for name in own if name not in state]
        self._reshaped = [name for name in own if name in state and not _fits(own[name], state[name])]
        kept = {*self._missing, *self._reshaped}
        if own and kept >= set(own):
            raise CheckpointError(
                f"'{self.source}' holds the state of another model than {type(model).__name__}: no name "
                f"fits. It has {list(state)[:5]}, and the model {list(own)[:5]}. Load a state of this model."
            )
        merged = OrderedDict((name, own[name] if name in kept else state[name]) for name in own)
        # Here torch keeps the versions of the modules, which say how to read what is in the state.
        versions = {**getattr(own, "_metadata", {}), **getattr(state, "_metadata", {})}
        merged._metadata = versions  # type: ignore[attr-defined]
        return merged

    def optimizer_state(self, optimizer: Any, held: Held, saved: Any, saved_held: Held | None) -> Any:
        """Return a state for `optimizer`: what is saved of the parameters that fit, its own for others.

        Args:
            held: what the optimizer holds now.
            saved_held: what it held when it was saved; None in exports and in states of older versions.
        """
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            return saved
        groups = saved["param_groups"]
        self.has_other_groups = len(groups) != len(held)
        if saved_held is None:
            saved_held = self._by_position(held, groups)
        if saved_held == held:
            return saved
        places = {
            (name, *shape): (place, group)
            for names, group in zip(saved_held or [], groups, strict=False)
            for (name, shape), place in zip(names, group["params"], strict=False)
            if name
        }
        # All that LBFGS has is over all parameters together.
        if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
            places = {}
        self._tell_of_optimizer(held, places, is_known=saved_held is not None)
        return _merged(optimizer.state_dict(), saved, held, places)

    def _by_position(self, held: Held, groups: list[dict[str, Any]]) -> Held | None:
        """Return what the saved optimizer held if the numbers of parameters say it, else None."""
        if [len(names) for names in held] != [len(group["params"]) for group in groups]:
            return None
        # With another name in its place, the order of the others may have changed too.
        missing = set(map(plain_name, self._missing))
        if any(name in missing for names in held for name, _ in names):
            return None
        reshaped = set(map(plain_name, self._reshaped))
        return [[("" if name in reshaped else name, shape) for name, shape in names] for names in held]

    def _tell_of_optimizer(self, held: Held, places: Mapping[Any, Any], is_known: bool) -> None:
        anew = [name for names in held for name, shape in names if (name, *shape) not in places]
        if not is_known:
            self.tell(
                f"'{self.source}' does not name the parameters of its optimizer, which are others than those "
                "of this run: the optimizer begins anew."
            )
        elif not places:
            self.tell("The optimizer begins anew.")
        elif anew:
            self.tell(f"The optimizer begins anew for {anew}.")
        if self.has_other_groups:
            self.tell(
                "The optimizer has another number of groups than that of the state: a scheduler begins anew."
            )


def _fits(own: Any, value: Any) -> bool:
    """Whether `value` can take the place of `own`; what is no tensor, as an extra state, fits by its name."""
    are_tensors = isinstance(own, torch.Tensor), isinstance(value, torch.Tensor)
    return own.shape == value.shape if all(are_tensors) else not any(are_tensors)


def _merged(own: dict[str, Any], saved: dict[str, Any], held: Held, places: Mapping[Any, Any]) -> Any:
    """Return `own`, the state of an optimizer, with what `places` knows of `saved`."""
    state = dict(own["state"])
    groups = []
    for index, (names, group) in enumerate(zip(held, own["param_groups"], strict=True)):
        found = {
            place: places[name, *shape]
            for (name, shape), place in zip(names, group["params"], strict=True)
            if (name, *shape) in places
        }
        for place, (saved_place, _) in found.items():
            state.pop(place, None)
            if saved_place in saved["state"]:
                state[place] = saved["state"][saved_place]
        # Learning rates go on where the saved group had them, which schedulers count on.
        options = next((saved_group for _, saved_group in found.values()), None)
        if options is None:
            has_same_groups = len(saved["param_groups"]) == len(held)
            options = saved["param_groups"][index] if has_same_groups else group
        names_of_torch = {key: group[key] for key in ("params", "param_names") if key in group}
        groups.append({**{key: options[key] for key in options if key != "param_names"}, **names_of_torch})
    return {**own, "state": state, "param_groups": groups}
