"""Orders and checks the callbacks of a trainer, binds their events, and collects their state."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import ConfigurationError
from ..foreign_names.answers import check_callback_class
from ..foreign_names.tables import FOREIGN_CALLBACKS, FOREIGN_EVENTS
from ..text import did_you_mean
from .callback import TrainerCallback
from .limit_batches import limits_of_environment

EVENTS: dict[str, tuple[str, ...]] = {
    # Without `self` and `trainer`.
    name: tuple(inspect.signature(method).parameters)[2:]
    for name, method in vars(TrainerCallback).items()
    if name.startswith("on_")
}
"""Each event with its arguments after the trainer.

Read from `TrainerCallback`, so that there is one list only.
"""


# A callback that fails in one of these must not keep the others from closing their files.
_CLOSING_EVENTS = ("on_exception", "on_run_close")


class CallbackList(TrainerCallback):
    """Holds callbacks in the order of their calls, and passes each event on to them.

    Events are bound once: one that nobody overrides stays the inherited no-op, a single listener is called
    directly. Iterating gives the callbacks.
    """

    def __init__(self, callbacks: Iterable[Any], trainer: Any) -> None:
        self.callback_list: list[TrainerCallback] = []
        """The callbacks, in the order in which they are called."""
        self._trainer = trainer
        self.add_callbacks(callbacks)
        self.add_callbacks(limits_of_environment())

    def __repr__(self) -> str:
        return f"CallbackList({self.callback_list!r})"

    def __iter__(self) -> Iterator[TrainerCallback]:
        return iter(self.callback_list)

    def add_callbacks(self, callbacks: Iterable[Any]) -> None:
        """Add `callbacks`, or none of them if one cannot be used.

        Raises:
            ConfigurationError: they are no sequence, or one of them is no callback.
        """
        # A single callback, or its class, is the likeliest mistake.
        if isinstance(callbacks, (TrainerCallback, type)) or not isinstance(callbacks, Iterable):
            example = "MyCallback()" if callbacks is None else _name(callbacks)
            raise ConfigurationError(
                f"callbacks is {callbacks!r}, but must be a sequence of callbacks. Pass "
                f"callbacks=({example}, *DEFAULT_CALLBACKS), or callbacks=() for none."
            )
        # All are checked before any is added, so an error leaves the list as it was.
        ready = [_create_callback(callback) for callback in callbacks]
        # Sorting is stable: callbacks of the same `order` stay as they are listed.
        self.callback_list = sorted([*self.callback_list, *ready], key=lambda callback: callback.order)
        self._bind()

    def add_callback(self, callback: Any) -> None:
        """Add a callback, or an instance of a class that needs no arguments.

        Raises:
            ConfigurationError: it is no callback, or has an `on_…` method that is no event or cannot take its
                arguments.
        """
        self.add_callbacks([callback])

    def clear_callbacks(self) -> None:
        """Remove all callbacks."""
        self.callback_list = []
        self._bind()

    def listeners(self, event: str) -> list[TrainerCallback]:
        """Return those that override `event`, in the order in which they are called."""
        default = getattr(TrainerCallback, event)
        return [
            callback
            for callback in self
            if getattr(getattr(callback, event), "__func__", None) is not default
        ]

    def call_event(self, event: str, *, required: bool = False, **kwargs: Any) -> None:
        """Call the method `event` of every callback that has it, with the trainer first.

        For your own events; their names do not begin with `on_`.

        Args:
            required: raise `ConfigurationError` if no callback has the method.
            kwargs: arguments of the method after the trainer.
        """
        if event.startswith("on_"):
            hint = (
                f"Call trainer.callbacks.{event}(trainer, ...)" if event in EVENTS else "Choose another name"
            )
            raise ConfigurationError(
                f"call_event got {event!r}, but names that begin with 'on_' are the trainer's own events. "
                f"{hint}."
            )
        # Found before the first call, so an AttributeError inside a method is not mistaken for a missing one.
        methods = [getattr(callback, event) for callback in self if hasattr(callback, event)]
        if required and not methods:
            raise ConfigurationError(
                f"No callback has a method {event!r}, though call_event was told that one is required. Add a "
                f"callback that has it to {[_name(callback) for callback in self]}."
            )
        for method in methods:
            method(self._trainer, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each callback that has any, by its name.

        The name is that of the class, numbered from the second instance on.
        """
        states = {name: callback.state_dict() for name, callback in self.named()}
        # A resumed run would report every name here that it does not know.
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand each callback its state; those without one stay as they are."""
        for name, callback in self.named():
            if name in state:
                callback.load_state_dict(state[name])

    def named(self) -> list[tuple[str, TrainerCallback]]:
        """Return callbacks with names that are unique here and the same in every run of the same script."""
        count: Counter[str] = Counter()
        names = []
        for callback in self:
            name = type(callback).__name__
            count[name] += 1
            names.append(name if count[name] == 1 else f"{name}#{count[name]}")
        return list(zip(names, self, strict=True))

    def _bind(self) -> None:
        for event in EVENTS:
            # What was bound before would hide the inherited no-op.
            self.__dict__.pop(event, None)
            methods = [getattr(callback, event) for callback in self.listeners(event)]
            if event in _CLOSING_EVENTS:
                setattr(self, event, functools.partial(_call_every, methods))
            # No function in between: events of steps fire thousands of times.
            elif len(methods) == 1:
                setattr(self, event, methods[0])
            elif methods:
                setattr(self, event, functools.partial(_call_in_order, methods))


def _call_in_order(methods: list[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    for method in methods:
        method(*args, **kwargs)


def _call_every(methods: list[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    """Call all methods, also after one has failed, and then raise the first error."""
    errors = []
    for method in methods:
        try:
            method(*args, **kwargs)
        # Ctrl-C is not held back: it ends the closing at once.
        except Exception as error:
            errors.append(error)
    if errors:
        for another in errors[1:]:
            errors[0].add_note(f"Another callback failed while closing: {another!r}")
        raise errors[0]


def _create_callback(callback: Any) -> TrainerCallback:
    if isinstance(callback, type) and issubclass(callback, TrainerCallback):
        try:
            # Not by a call, whose own TypeError would look the same.
            inspect.signature(callback).bind()
        except TypeError as error:
            raise ConfigurationError(
                f"The callback class {callback.__name__} needs arguments ({error}). Pass an instance: "
                f"{callback.__name__}(...)."
            ) from None
        callback = callback()
    if not isinstance(callback, TrainerCallback):
        raise ConfigurationError(
            f"callbacks has {callback!r}, which is no callback. {_instead_of(callback)}."
        )
    if not isinstance(callback.order, (int, float)):
        raise ConfigurationError(
            f"{_name(callback)}.order is {callback.order!r}, but must be a number. Use 0 for the place in "
            "the list, or more to be called later: those that save have 900 and above."
        )
    check_callback_class(type(callback), TrainerCallback)
    # A misspelt event would otherwise never fire, and nobody would notice.
    for name in dir(type(callback)):
        if name.startswith("on_") and callable(getattr(callback, name)):
            _check_event(callback, name)
    return callback


def _instead_of(no_callback: Any) -> str:
    """Return what to pass in place of something that is no callback."""
    if isinstance(no_callback, (tuple, list)):
        return "Put a star before it, as in *DEFAULT_CALLBACKS"
    if _name(no_callback) in FOREIGN_CALLBACKS:
        return f"Use {FOREIGN_CALLBACKS[_name(no_callback)]}"
    return "Derive its class from accel_core.TrainerCallback"


def _check_event(callback: TrainerCallback, name: str) -> None:
    if name not in EVENTS:
        known = FOREIGN_EVENTS.get(name)
        hint = f" Use {known}." if known else did_you_mean(name, EVENTS)
        raise ConfigurationError(
            f"{_name(callback)}.{name} is no event of accel, so it would never be called.{hint} Events of "
            "your own must not begin with 'on_'."
        )
    # By keyword, as they arrive when the event fires.
    arguments = dict.fromkeys(EVENTS[name])
    try:
        inspect.signature(getattr(callback, name)).bind(None, **arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"{_name(callback)}.{name} cannot take the arguments of its event ({error}). Write it as "
            f"def {name}({', '.join(['self', 'trainer', *arguments])}), or with **kwargs."
        ) from None


def _name(callback: Any) -> str:
    return callback.__name__ if isinstance(callback, type) else type(callback).__name__
