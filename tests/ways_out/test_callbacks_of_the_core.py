"""Each way out that an error about callbacks and names of other libraries gives works."""

import inspect
import logging
import operator
import re
import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedModel

import accel_callbacks
import accel_core
from accel_callbacks import EarlyStoppingCallback, SaveTrainingStateCallback
from accel_core import (
    DEFAULT_CALLBACKS,
    LimitBatchesCallback,
    LogMetricsCallback,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
)
from accel_core.callbacks.limit_batches import LIMIT_BATCHES_ENV_VAR
from accel_core.foreign_names.tables import (
    FOREIGN_ARGUMENTS,
    FOREIGN_ATTRIBUTES,
    FOREIGN_CALLBACKS,
    FOREIGN_EVENTS,
    FOREIGN_HOOKS,
    FOREIGN_METHODS,
    FOREIGN_STEPS,
)
from accel_integrations import timm_adapter, transformers_adapter
from tiny import tiny_data, tiny_network, tiny_trainer
from ways_out import Row, check_every_error_is_known, make_mistake_and_ways_out, name_of, ways_out_of_checks

PLACES = ("accel-core/src/accel_core/callbacks", "accel-core/src/accel_core/foreign_names")
DATA, OTHER = tiny_data(16), tiny_data(7)


def train(trainer: Any = None, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer() if trainer is None else trainer
    trainer.train(DATA, **{"num_epochs": 1, "eval_dataset": OTHER, "per_device_batch_size": 4, **kwargs})
    return trainer


def train_by(*callbacks: Any) -> Trainer:
    return train(tiny_trainer(callbacks=callbacks))


def callback(**members: Any) -> Any:
    """A class of callbacks."""
    return type("Mine", (TrainerCallback,), members)


def own(**members: Any) -> Any:
    """A class of trainers."""
    return type("Own", (Trainer,), members)


class Hears:
    """A method of a callback or a trainer that knows whether it was called. As `state_dict` it has a state."""

    def __init__(self) -> None:
        self.is_called = False

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, int]:
        self.is_called = True
        return {"calls": 1}

    def method(self) -> Any:
        return lambda *args, **kwargs: self(*args, **kwargs)


def heard(*names: str) -> None:
    """Each of these methods of a callback is called by a run that is saved, resumed, evaluated and interrupted."""
    methods = {name: Hears() for name in names}
    trainer = train_by(callback(**{name: each.method() for name, each in methods.items()})())
    trainer.save_training_state("state")
    train(trainer, num_epochs=2, resume_from="state")
    trainer.evaluate(OTHER, 4)
    with pytest.raises(ZeroDivisionError):
        train(trainer, collate_fn=lambda samples: 1 // 0)
    assert [name for name, each in methods.items() if not each.is_called] == []


def calls_own(name: str) -> None:
    """A method of this name of a callback is called by `call_event`."""
    hears = Hears()
    tiny_trainer(callbacks=[callback(**{name: hears.method()})()]).callbacks.call_event(name, required=True)
    assert hears.is_called


def fires(event: str) -> None:
    hears = Hears()
    trainer = tiny_trainer(callbacks=[callback(**{event: hears.method()})()])
    getattr(trainer.callbacks, event)(trainer)
    assert hears.is_called


def limited(number: str | None, updates: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(LIMIT_BATCHES_ENV_VAR, raising=False)
        if number is not None:
            patch.setenv(LIMIT_BATCHES_ENV_VAR, number)
        assert train().run_progress.updates_completed == updates


def overrides(name: str, *others: str) -> None:
    """A trainer's own method of each of these names is called, and may call accel's."""
    for each in (name, *others):
        hears = Hears()

        def method(self: Any, *args: Any, hears: Any = hears, each: str = each, **kwargs: Any) -> Any:
            hears()
            return getattr(Trainer, each)(self, *args, **kwargs)

        trainer = tiny_trainer(own(**{each: method}))
        train(trainer, gradient_clip_norm=1.0)
        trainer.evaluate(OTHER, 4)
        trainer.predict(OTHER, 4)
        assert hears.is_called, each


def not_called(self: Any) -> None:
    raise AssertionError("nobody calls this")


def step(self: Any, batch: Any) -> Any:
    return Trainer.calculate_train_batch_loss(self, batch)


def with_arguments(**kwargs: Any) -> Trainer:
    return Trainer(tiny_network(), nn.functional.cross_entropy, None, callbacks=(), **kwargs)


ROWS: tuple[Row, ...] = (
    Row(
        "callbacks has {}, which is no callback. {}.",
        lambda: train_by(DEFAULT_CALLBACKS),
        (lambda: train_by(*DEFAULT_CALLBACKS),),
        says="Put a star before it, as in *DEFAULT_CALLBACKS.",
    ),
    Row(
        "callbacks has {}, which is no callback. {}.",
        lambda: train_by(type("EarlyStopping", (), {})()),
        (lambda: train_by(EarlyStoppingCallback()),),
        says="Use EarlyStoppingCallback of accel_callbacks.",
    ),
    Row(
        "callbacks has {}, which is no callback. {}.",
        lambda: train_by(object()),
        (lambda: train_by(callback()()),),
        says="Derive its class from accel_core.TrainerCallback.",
    ),
    Row(
        ".order is {}, but must be a number. Use 0 for the place in the list, or more to be called later: those",
        lambda: train_by(callback(order="last")()),
        (
            lambda: train_by(callback(order=0)()),
            lambda: train_by(callback(order=SaveTrainingStateCallback.order - 1)()),
        ),
    ),
    Row(
        " is no event of accel, so it would never be called.{} Events of",
        lambda: train_by(callback(on_train_epoch_ends=not_called)()),
        (lambda: heard("on_train_epoch_end"),),
        says="Did you mean 'on_train_epoch_end'?",
    ),
    Row(
        " is no event of accel, so it would never be called.{} Events of",
        lambda: train_by(callback(on_fit_start=not_called)()),
        (lambda: heard("on_training_run_start"),),
        says="Use on_training_run_start.",
    ),
    Row(
        " Events of your own must not begin with 'on_'.",
        lambda: train_by(callback(on_zzz=not_called)()),
        (lambda: calls_own("zzz"),),
    ),
    Row(
        "but must be a sequence of callbacks. Pass callbacks=({}, *DEFAULT_CALLBACKS), or callbacks=() for none.",
        lambda: train(tiny_trainer(callbacks=callback())),
        (
            lambda: train(tiny_trainer(callbacks=(callback(), *DEFAULT_CALLBACKS))),
            lambda: train(tiny_trainer(callbacks=())),
        ),
        says="callbacks=(Mine, *DEFAULT_CALLBACKS)",
    ),
    Row(
        "are the trainer's own events. {}.",
        lambda: tiny_trainer().callbacks.call_event("on_train_epoch_end"),
        (lambda: fires("on_train_epoch_end"),),
        says="Call trainer.callbacks.on_train_epoch_end(trainer, ...).",
    ),
    Row(
        "are the trainer's own events. {}.",
        lambda: tiny_trainer().callbacks.call_event("on_zzz"),
        (lambda: calls_own("zzz"),),
        says="Choose another name.",
    ),
    Row(
        "No callback has a method {}, though call_event was told that one is required. Add a callback that has it",
        lambda: tiny_trainer(callbacks=[callback()]).callbacks.call_event("zzz", required=True),
        (lambda: calls_own("zzz"),),
    ),
    Row(
        "). Write it as def {}({}), or with **kwargs.",
        lambda: train_by(callback(on_train_step_start=lambda self, trainer: None)()),
        (
            lambda: train_by(callback(on_train_step_start=lambda self, trainer, batch: None)()),
            lambda: train_by(callback(on_train_step_start=lambda self, trainer, **kwargs: None)()),
        ),
        says="def on_train_step_start(self, trainer, batch), or",
    ),
    Row(
        "The callback class {} needs arguments ({}). Pass an instance: {}(...).",
        lambda: train_by(LimitBatchesCallback),
        (lambda: train_by(LimitBatchesCallback(2)),),
        says="LimitBatchesCallback(...).",
    ),
    Row(
        "but must be a whole number of at least 1. Set it to 3, to 3:overfit to repeat the same batches, or unset it.",
        lambda: limited("zero", 0),
        (lambda: limited("3", 3), lambda: limited("3:overfit", 3), lambda: limited(None, 4)),
    ),
    Row(
        "but must be a logger. Pass logging.getLogger('train').",
        lambda: LogMetricsCallback("train"),  # type: ignore[arg-type]
        (lambda: train_by(LogMetricsCallback(logging.getLogger("train"))),),
    ),
    Row(
        "Use 1 for a single batch an epoch.",
        lambda: LimitBatchesCallback(0),
        (lambda: train_by(LimitBatchesCallback(1)),),
    ),
)

OF_OTHER_LIBRARIES: tuple[Row, ...] = (
    Row(
        " of Trainer, which accel needs. Give the attribute another name, or define a {} {}.",
        lambda: own(is_main_process=True)(tiny_network(), None, None),
        (
            lambda: train(tiny_trainer(own(is_main=True))),
            lambda: train(tiny_trainer(own(is_main_process=property(lambda self: True)))),
        ),
        says="define a property is_main_process",
    ),
    Row(
        " of Trainer, which accel needs. Give the attribute another name, or define a {} {}.",
        lambda: own(run_train_epoch=3)(tiny_network(), None, None),
        (lambda: train(tiny_trainer(own(my_epoch=3))), lambda: overrides("run_train_epoch")),
        says="define a method run_train_epoch",
    ),
    Row(
        "{} object has no attribute {}. {}",
        lambda: train().global_step,  # type: ignore[attr-defined]
        (lambda: train().run_progress.updates_completed,),
        says="Use trainer.run_progress.updates_completed.",
    ),
    Row(
        " is a hook of another library, which accel never calls. Override {} instead, or give it another name",
        lambda: train_by(callback(before_fit=not_called)()),
        (lambda: heard("on_training_run_start"), lambda: train_by(callback(helper=not_called)())),
        says="Override on_training_run_start",
    ),
    Row(
        " is a method that pytorch-accelerated calls, but accel never does. {} {} instead;",
        lambda: own(_create_run_config=not_called)(tiny_network(), None, None),
        (lambda: overrides("create_run_config"),),
        says="Override create_run_config",
    ),
    Row(
        " is a method that pytorch-accelerated calls, but accel never does. {} {} instead;",
        lambda: own(_create_callback_handler=not_called)(tiny_network(), None, None),
        (lambda: list(train_by(callback()).callbacks),),
        says="Use the argument callbacks, and trainer.callbacks instead",
    ),
    Row(
        " is a method that another library calls, but accel never does. Override {} instead",
        lambda: own(training_step=step)(tiny_network(), None, None),
        (lambda: overrides("calculate_train_batch_loss"),),
        says="Override calculate_train_batch_loss",
    ),
    Row(
        "{} was given {}={}, but has no such argument.{}",
        lambda: train(max_epochs=3),
        (lambda: train(num_epochs=3),),
        says="Pass num_epochs to train.",
    ),
    Row(
        "{} was given {}={}, but has no such argument.{}",
        lambda: with_arguments(num_epochs=3),
        (lambda: train(num_epochs=3),),
        says="Pass it to train.",
    ),
    Row(
        "{} was given {}={}, but has no such argument.{}",
        lambda: train(seed=3),
        (lambda: with_arguments(seed=3),),
        says="Pass it to Trainer.",
    ),
    Row(
        "{} was given {}={}, but has no such argument.{}",
        lambda: train(num_epoch=3),
        (lambda: train(num_epochs=3),),
        says="Did you mean 'num_epochs'?",
    ),
    Row(
        " was called wrongly: {}. Its arguments are {}, in this order.",
        lambda: tiny_trainer().train(num_epochs=1),  # type: ignore[call-arg]
        (lambda: tiny_trainer().train(DATA, 1),),
        says="['train_dataset', 'num_epochs', ",
    ),
    Row(
        "Pass the optimizer to Trainer, and create_scheduler_fn to train; give the method another name if you call it",
        lambda: own(configure_optimizers=not_called)(tiny_network(), None, None),
        (
            lambda: train(create_scheduler_fn=lambda given: torch.optim.lr_scheduler.StepLR(given, 1)),
            lambda: train(tiny_trainer(own(make_optimizer=not_called))),
        ),
    ),
    Row(
        "Move it to a TrainerCallback as {}, or override a method such as train_epoch_end.",
        lambda: own(on_train_epoch_end=not_called)(tiny_network(), None, None),
        (lambda: heard("on_train_epoch_end"), lambda: overrides("train_epoch_end")),
        says="as on_train_epoch_end, or",
    ),
)


def test_every_error_about_callbacks_is_known() -> None:
    rows = {row.text for row in (*ROWS, *OF_OTHER_LIBRARIES)}
    checks = set(ways_out_of_checks(*PLACES))
    assert checks <= rows
    check_every_error_is_known(*PLACES, rows=rows - checks)


@pytest.mark.parametrize("row", [*ROWS, *OF_OTHER_LIBRARIES], ids=name_of)
def test_what_an_error_about_callbacks_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


def arguments_of(*functions: Any) -> set[str]:
    return {name for function in functions for name in inspect.signature(function).parameters}


def names_in(sentence: str) -> list[str]:
    """The words that look like names of Python, and those after "Use"; without texts in quotes."""
    words = re.findall(r"(Use )?\b([A-Za-z]\w*)", re.sub(r"'.*?'", "", sentence))
    return [word for use, word in words if "_" in word or re.search("[a-z][A-Z]", word) or use]


NAMES_NO_ATTRIBUTE = {
    "Pass the loss and the optimizer to Trainer, and torch.compile(model) as its model.",
    "Return 'log': {name: value} from a step.",
}


@pytest.mark.parametrize("sentence", sorted({*FOREIGN_ATTRIBUTES.values()} - NAMES_NO_ATTRIBUTE))
def test_what_is_named_in_place_of_an_attribute_is_there(sentence: str) -> None:
    trainer = train()
    for expression in re.findall(r"trainer\.[\w.]+\w", sentence):
        operator.attrgetter(expression.removeprefix("trainer."))(trainer)
    classes = (TrainerPlaceholderValues, transformers_adapter.TransformersTrainer, PreTrainedModel)
    places = (trainer, accel_core, accel_callbacks, transformers_adapter, torch.optim.lr_scheduler, *classes)
    arguments = arguments_of(Trainer, Trainer.train, Accelerator, OneCycleLR)
    rest = re.sub(r"trainer\.[\w.]+\w| of accel_callbacks", "", sentence)
    names = names_in(rest.replace("Use the argument ", "Use "))
    assert "trainer." in sentence or names
    for name in names:
        assert name in arguments or any(hasattr(place, name) for place in places), name


def test_what_is_named_in_place_of_an_event_or_a_method_is_called() -> None:
    events = {name.partition(",")[0] for name in (*FOREIGN_EVENTS.values(), *FOREIGN_HOOKS.values())}
    heard(*sorted(events))
    for name in sorted({*FOREIGN_STEPS.values(), *FOREIGN_METHODS.values()}):
        for method in re.split(r" or |, and .*", name):
            if hasattr(Trainer, method):
                overrides(method)


NAMES_NO_ARGUMENT = {
    "Give it to the optimizer: AdamW(model.parameters(), lr=...).",
    "Leave it out: the main process writes, once for the job.",
    "Tokenize in the data set or in collate_fn.",
}


@pytest.mark.parametrize("sentence", sorted({*FOREIGN_ARGUMENTS.values()} - NAMES_NO_ARGUMENT))
def test_what_is_named_in_place_of_an_argument_takes_it(sentence: str) -> None:
    """Such as "Pass num_epochs to train."."""
    callbacks = re.findall(r"\b(\w+Callback)\b", sentence)
    passed = re.findall(r"[Pp]ass (?:an )?(\w+)\b.*? to ((?:\w+(?:, | or )?)+)", sentence)
    assert callbacks or passed
    for name, methods in passed:
        entries = re.findall(r"train|evaluate|predict|Trainer", methods)
        assert entries
        for method in entries:
            entry = Trainer.__init__ if method == "Trainer" else getattr(Trainer, method)
            # The sentence may begin with whose data it speaks of.
            assert name in {*arguments_of(entry), "its", "what"}
    for name in callbacks:
        assert any(hasattr(package, name) for package in (accel_core, accel_callbacks))


@pytest.mark.parametrize(
    "sentence", sorted(each for each in {*FOREIGN_CALLBACKS.values()} if not each.startswith("nothing: "))
)
def test_what_is_named_in_place_of_a_callback_is_there(sentence: str) -> None:
    """Such as "EarlyStoppingCallback of accel_callbacks", or an argument of a trainer."""
    names, place = re.fullmatch(r"(.*?) of (\w+)(?:,.*)?", sentence).groups()  # type: ignore[union-attr]
    if place == "train":
        assert names in arguments_of(Trainer.train)
    elif place == "accel_integrations":
        name, argument = re.findall(r"\w+", names)
        assert argument in arguments_of(getattr(timm_adapter, name))
    else:
        for name in names.split(" or "):
            assert issubclass(getattr(sys.modules[place], name), TrainerCallback)
