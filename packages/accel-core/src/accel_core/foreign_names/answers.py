"""Answers names of other libraries: attributes, arguments, and methods of classes that users bring along."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..errors import AccelWarning, ConfigurationError
from ..text import did_you_mean, preview
from .tables import (
    FOREIGN_ARGUMENTS,
    FOREIGN_ATTRIBUTES,
    FOREIGN_EVENTS,
    FOREIGN_HOOKS,
    FOREIGN_METHODS,
    FOREIGN_OPTIMIZERS,
    FOREIGN_STEPS,
)

_Class = TypeVar("_Class", bound=type)
_ENTRIES = ("__init__", "train", "evaluate", "predict", "iterate_predictions", "replay")
_MORE = "docs/coming_from_other_libraries.md has more names."


class ForeignName:
    """Raises `AttributeError` with a sentence on what to use here.

    A class that defines the name itself, or an object that is given it, hides this. `hasattr` is False.
    """

    def __init__(self, way_out: str) -> None:
        self.way_out = way_out

    def __set_name__(self, owner: type, name: str) -> None:
        self.holder = owner
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        # `super()` of a method goes on to the bases after the trainer.
        after = owner.__mro__[owner.__mro__.index(self.holder) + 1 :]
        value = _defined_in(after, self.name)
        if value is not None:
            return value.__get__(instance, owner) if hasattr(value, "__get__") else value
        raise AttributeError(
            f"{owner.__name__!r} object has no attribute {self.name!r}. {self.way_out}",
            name=self.name,
            obj=instance,
        )


def answer_foreign_names(trainer_class: _Class) -> _Class:
    """Let a class of trainers answer attributes and arguments of other libraries with accel's word.

    The names are class attributes, and not `__getattr__`, which would hide errors inside properties and tell
    type checkers that every name exists.
    """
    for name, way_out in FOREIGN_ATTRIBUTES.items():
        if inspect.getattr_static(trainer_class, name, None) is None:
            answer = ForeignName(way_out)
            answer.__set_name__(trainer_class, name)
            setattr(trainer_class, name, answer)
    trainer_class.__dir__ = _names_to_offer  # type: ignore[method-assign,assignment]
    trainer_class.__init_subclass__ = _leaving_names_to_others(trainer_class)  # type: ignore[method-assign]
    known = {name: list(inspect.signature(getattr(trainer_class, name)).parameters) for name in _ENTRIES}
    # It passes on what it does not know.
    known["replay"] += known["train"][1:]
    for name in _ENTRIES:
        # One that takes any argument passes it on to a class that answers.
        takes_any = "kwargs" in known[name]
        if name in vars(trainer_class) and not takes_any:
            setattr(trainer_class, name, _checking_names(vars(trainer_class)[name], known))
    return trainer_class


def _defined_in(classes: Iterable[type], name: str) -> Any:
    """Return what the first of the classes that has `name` itself holds under it; None if none has."""
    values = (vars(cls).get(name) for cls in classes)
    return next((value for value in values if value is not None and not isinstance(value, ForeignName)), None)


def _leaving_names_to_others(trainer_class: Any) -> Any:
    """Return an `__init_subclass__` that gives a subclass the names of its further bases.

    In `class Own(Trainer, Mixin)` an answer would else hide what the mixin defines.
    """

    def init_subclass(cls: type, /, **kwargs: Any) -> None:
        super(trainer_class, cls).__init_subclass__(**kwargs)
        for name in FOREIGN_ATTRIBUTES:
            if not isinstance(inspect.getattr_static(cls, name, None), ForeignName):
                continue
            value = _defined_in(cls.__mro__, name)
            if value is not None:
                setattr(cls, name, value)

    return classmethod(init_subclass)


def _names_to_offer(trainer: Any) -> Iterable[str]:
    """Return what `dir` lists: completion in a notebook offers no names of other libraries."""
    for name in object.__dir__(trainer):
        if not isinstance(inspect.getattr_static(trainer, name, None), ForeignName):
            yield name


def _checking_names(method: Callable[..., Any], known: dict[str, list[str]]) -> Callable[..., Any]:
    """Return `method`, which raises `ConfigurationError` for an argument that it does not have."""
    own, signature = known[method.__name__], inspect.signature(method)

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in kwargs.items():
            if name not in own:
                raise ConfigurationError(_unknown_argument(type(self), method.__name__, name, value, known))
        try:
            signature.bind(self, *args, **kwargs)
        except TypeError as error:
            called = _called(type(self), method.__name__)
            raise ConfigurationError(
                f"{called} was called wrongly: {error}. Its arguments are {own[1:]}, in this order."
            ) from None
        try:
            return method(self, *args, **kwargs)
        except KeyboardInterrupt as error:
            # Else the traceback of Ctrl-C would end here, and not at the caller's line.
            error.__traceback__ = None
            raise

    return checked


def _called(trainer_class: type, method: str) -> str:
    return trainer_class.__name__ if method == "__init__" else f"{trainer_class.__name__}.{method}"


def _unknown_argument(
    trainer_class: type, method: str, name: str, value: Any, known: dict[str, list[str]]
) -> str:
    elsewhere = [other for other, names in known.items() if name in names]
    if elsewhere:
        where = "Trainer" if elsewhere[0] == "__init__" else elsewhere[0]
        way_out = f" Pass it to {where}."
    elif name in FOREIGN_ARGUMENTS:
        way_out = f" {FOREIGN_ARGUMENTS[name]}"
    else:
        way_out = did_you_mean(name, known[method][1:]) or f" It has {known[method][1:]}."
    called = _called(trainer_class, method)
    return f"{called} was given {name}={preview(value)}, but has no such argument.{way_out}"


def check_callback_class(callback_class: type, base: type) -> None:
    """Raise if a callback has a hook of another library and no event of accel, so nothing is called."""
    own = {name for parent in callback_class.__mro__ if not issubclass(base, parent) for name in vars(parent)}
    if any(name.startswith("on_") for name in own):
        return
    for name, here in FOREIGN_HOOKS.items():
        if name in own:
            raise ConfigurationError(
                f"{callback_class.__name__}.{name} is a hook of another library, which accel never calls. "
                f"Override {here} instead, or give it another name if you call it yourself; {_MORE}"
            )


def check_trainer_class(trainer_class: type, optimizer: Any, callback_class: type) -> None:
    """Raise if a subclass of `Trainer` has a method that another library calls and this one does not.

    Warn if it is a method that makes an optimizer though `optimizer` was given: it may be a helper.

    Args:
        callback_class: `TrainerCallback`, whose events a trainer is not told of.
    """
    for name, here in FOREIGN_METHODS.items():
        # Not only in the class itself: a mixin may bring the method.
        if hasattr(trainer_class, name):
            # An argument stands in the place of one of them.
            verb = "Override" if hasattr(trainer_class, re.split(r"\W", here)[0]) else "Use"
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is a method that pytorch-accelerated calls, but accel "
                f"never does. {verb} {here} instead; docs/migration.md has all names."
            )
    users = [cls for cls in trainer_class.__mro__ if not cls.__module__.startswith("accel_")]
    for name, here in FOREIGN_STEPS.items():
        # If the user overrides accel's method too, or another method names it, it may be a helper.
        is_helper = any(here in vars(cls) or _is_named(name, cls) for cls in users)
        if callable(getattr(trainer_class, name, None)) and not is_helper:
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is a method that another library calls, but accel never "
                f"does. Override {here} instead; {_MORE}"
            )
    for name in FOREIGN_OPTIMIZERS:
        if hasattr(trainer_class, name):
            method = f"{trainer_class.__name__}.{name} is a method that another library calls"
            if optimizer is None:
                raise ConfigurationError(
                    f"{method}, but accel never does. Pass the optimizer to Trainer, and "
                    "create_scheduler_fn to train; give the method another name if you call it yourself."
                )
            warnings.warn(
                f"{method}, but accel never does: the optimizer is the one that was passed to Trainer. Pass "
                "create_scheduler_fn to train for a scheduler, and remove the method, or give it another "
                "name if you call it yourself.",
                AccelWarning,
                stacklevel=4,  # The line that makes the trainer.
            )
    _check_kinds(trainer_class, users)
    _check_events(users, callback_class)


def _is_named(name: str, user_class: type) -> bool:
    """Whether a method that accel or the user calls names the attribute `name`."""
    values = [value for other, value in vars(user_class).items() if other not in FOREIGN_STEPS]
    # Class methods and properties hold a function, and decorated ones another.
    functions = [getattr(value, "__func__", getattr(value, "fget", value)) for value in values]
    functions = [inspect.unwrap(function) for function in functions if callable(function)]
    codes = [function.__code__ for function in functions if hasattr(function, "__code__")]
    while codes:
        code = codes.pop()
        if name in code.co_names:
            return True
        # Functions inside it, and comprehensions.
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return False


def _check_kinds(trainer_class: type, users: list[type]) -> None:
    """Raise if a class of the user's has a plain value in place of a property or a method of accel's."""
    bases = [cls for cls in trainer_class.__mro__ if cls not in users]
    for name, value in ((name, value) for cls in users for name, value in vars(cls).items()):
        inherited = None if name.startswith("__") else _defined_in(bases, name)
        is_property = isinstance(inherited, property)
        is_hidden = inspect.getattr_static(trainer_class, name) is not value
        if is_hidden or not (is_property or inspect.isfunction(inherited)):
            continue
        # A property, a cached property or a descriptor of the user's own gives what it wants.
        gives = hasattr(value, "__get__")
        fits = gives and not inspect.isfunction(value) if is_property else gives or callable(value)
        if not fits:
            kind = "property" if is_property else "method"
            raise ConfigurationError(
                f"{trainer_class.__name__}.{name} is {preview(value)}, but {name} is a {kind} of Trainer, "
                f"which accel needs. Give the attribute another name, or define a {kind} {name}."
            )


def _check_events(users: list[type], callback_class: type) -> None:
    """Raise if a class of the user's has an event, which only callbacks are told of."""
    if any(issubclass(cls, callback_class) for cls in users):
        return
    for cls in users:
        for name in vars(cls):
            if name.startswith("on_") and (hasattr(callback_class, name) or name in FOREIGN_EVENTS):
                here = FOREIGN_EVENTS.get(name, name)
                raise ConfigurationError(
                    f"{cls.__name__}.{name} is an event, which accel calls on callbacks alone. Move it to a "
                    f"TrainerCallback as {here}, or override a method such as train_epoch_end."
                )


def take_old_name(method: str, name: str, value: Any, old_name: str, old_value: Any) -> Any:
    """Return `value`, or `old_value` with a warning if the argument was given by its name of before."""
    if old_value is None:
        return value
    warnings.warn(
        f"{method} was called with {old_name}, which is called {name} now. Pass {name}=... instead.",
        AccelWarning,
        stacklevel=3,
    )
    return old_value
