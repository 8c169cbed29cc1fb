"""Callbacks in a list: their order, the checks when they are added, binding, custom events, state."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_core import CallbackList, ConfigurationError, Trainer, TrainerCallback
from accel_core.callbacks.callback_list import EVENTS
from accel_core.foreign_names.tables import FOREIGN_EVENTS, FOREIGN_HOOKS
from tiny import tiny_data, tiny_trainer


class Counter(TrainerCallback):
    """Counts the steps of training."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Listener(TrainerCallback):
    """Writes down who was called, by a name of its own."""

    def __init__(self, name: str, heard: list[Any], order: int | None = None) -> None:
        self.name, self.heard = name, heard
        if order is not None:
            self.order = order  # type: ignore[misc]

    def on_run_close(self, trainer: Any) -> None:
        self.heard.append(self.name)

    def batch_verified(self, trainer: Any, size: int) -> None:
        self.heard.append((self.name, trainer, size))


# ---------------------------------------------------------------------- order


def test_callbacks_are_called_in_the_order_in_which_they_are_listed() -> None:
    heard: list[str] = []
    CallbackList([Listener(name, heard) for name in "bca"], None).on_run_close(None)  # type: ignore[arg-type]
    assert heard == ["b", "c", "a"]


def test_a_higher_order_comes_later_and_equal_ones_stay_as_listed() -> None:
    heard: list[str] = []
    orders = {"save": 100, "first": -1, "b": 0, "a": 0, "also save": 100}
    callbacks = CallbackList([Listener(name, heard, order) for name, order in orders.items()], None)
    callbacks.add_callback(Listener("late", heard, 0))
    callbacks.on_run_close(None)  # type: ignore[arg-type]
    assert heard == ["first", "b", "a", "late", "save", "also save"]


def test_an_order_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Listener\.order is 'last'.*number.*Use 0 "):
        CallbackList([Listener("save", [], "last")], None)  # type: ignore[arg-type]


def test_a_list_can_be_gone_through_added_to_and_cleared() -> None:
    first, second = Counter(), Counter()
    callbacks = CallbackList([first], None)
    callbacks.add_callbacks([second, Counter])
    assert list(callbacks) == callbacks.callback_list
    assert callbacks.callback_list[:2] == [first, second]
    assert isinstance(callbacks.callback_list[2], Counter)
    callbacks.clear_callbacks()
    assert list(callbacks) == []
    assert callbacks.listeners("on_train_step_end") == []


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("on_train_epoch_ends", "Did you mean 'on_train_epoch_end'"),
        ("on_stop_training_error", "Use on_training_run_end.*trainer.stop_reason"),
        ("on_train_batch_end", "Use on_train_step_end"),
        ("on_validation_epoch_end", "Use on_eval_epoch_end"),
        ("on_batch_verified", "must not begin with 'on_'"),
    ],
)
def test_an_event_that_does_not_exist_is_refused_with_the_likely_one(name: str, hint: str) -> None:
    callback = type("Mistaken", (TrainerCallback,), {name: lambda self, trainer: None})
    with pytest.raises(ConfigurationError, match=hint) as caught:
        CallbackList([callback], None)
    assert f"Mistaken.{name} " in str(caught.value)


def test_every_name_of_another_library_leads_to_something_that_exists() -> None:
    for foreign, ours in FOREIGN_EVENTS.items():
        assert foreign not in EVENTS
        assert hasattr(TrainerCallback, ours.partition(",")[0]), ours


@pytest.mark.parametrize("name", sorted(FOREIGN_HOOKS))
def test_a_hook_of_another_library_is_refused_unless_the_callback_hears_an_event(name: str) -> None:
    ours = FOREIGN_HOOKS[name]
    assert ours in EVENTS
    hook = {name: lambda self: None}
    with pytest.raises(ConfigurationError, match=rf"Ported\.{name} .*Override {ours} "):
        CallbackList([type("Ported", (TrainerCallback,), hook)], None)
    heard = hook | {"on_init_end": lambda self, trainer: None}
    assert len(CallbackList([type("Helped", (TrainerCallback,), heard)], None).callback_list) == 1


def test_an_event_that_cannot_take_its_arguments_is_refused() -> None:
    class Narrow(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, batch: Any) -> None:  # type: ignore[override]
            pass

    with pytest.raises(
        ConfigurationError,
        match=r"^Narrow\.on_train_step_end .*def on_train_step_end\(self, trainer, batch, batch_output, step\)",
    ):
        CallbackList([Narrow], None)


def test_events_may_name_the_arguments_that_they_use_and_take_the_rest_as_kwargs() -> None:
    heard: list[Any] = []

    class Some(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any) -> None:
            heard.append((set(batch_output), set(kwargs)))

        def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            heard.append(set(kwargs))

        def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            heard.append(len(args))

    tiny_trainer(callbacks=[Some]).train(tiny_data(4), num_epochs=1, eval_dataset=tiny_data(4))
    assert heard == [
        ({"loss", "model_outputs", "batch_size"}, {"batch", "step"}),
        1,
        {"is_intermediate", "metric_prefix"},
    ]


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([object()], r"callbacks has <object object .*no callback.*accel_core\.TrainerCallback"),
        ([object], r"callbacks has <class 'object'>.*no callback.*accel_core\.TrainerCallback"),
        ([()], r"callbacks has \(\).*star.*\*DEFAULT_CALLBACKS"),
        (Counter(), r"callbacks is Counter\(\).*sequence.*callbacks=\(Counter, "),
        (Counter, r"callbacks is <class .*Counter'>.*sequence.*callbacks=\(Counter, "),
        ([Listener], r"Listener needs arguments.*'name'.*Listener\(\.\.\.\)"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CallbackList(callbacks, None)


def test_of_several_none_is_added_where_one_is_refused() -> None:
    callbacks = CallbackList([Counter()], None)
    with pytest.raises(ConfigurationError):
        callbacks.add_callbacks([Counter(), object()])
    assert len(callbacks.callback_list) == 1


def test_an_error_in_a_constructor_is_heard_as_it_is() -> None:
    class Broken(TrainerCallback):
        def __init__(self) -> None:
            raise TypeError("broken inside")

    with pytest.raises(TypeError, match="broken inside"):
        CallbackList([Broken], None)


# ---------------------------------------------------------------------- binding


def test_an_event_that_nobody_hears_stays_the_inherited_no_op_and_one_listener_is_called_directly() -> None:
    callbacks = CallbackList([Counter(), TrainerCallback()], None)
    assert callbacks.on_train_epoch_end.__func__ is TrainerCallback.on_train_epoch_end  # type: ignore[attr-defined]
    assert callbacks.on_train_step_end.__self__ is callbacks.callback_list[0]  # type: ignore[attr-defined]
    callbacks.clear_callbacks()
    assert callbacks.on_train_step_end.__func__ is TrainerCallback.on_train_step_end  # type: ignore[attr-defined]


def test_a_callback_that_is_added_in_mid_run_is_heard_from_then_on() -> None:
    counter = Counter()

    class Adding(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 2:
                trainer.callbacks.add_callback(counter)

    tiny_trainer(callbacks=[Adding]).train(tiny_data(), num_epochs=1, per_device_batch_size=8)
    assert counter.count == 3


def test_a_failing_listener_of_another_event_keeps_the_later_ones_from_being_called() -> None:
    """What fails is heard at once; only closing goes on."""

    class Failing(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            raise ValueError("broken")

    counter = Counter()
    with pytest.raises(ValueError, match="broken"):
        tiny_trainer(callbacks=[Failing, counter]).train(tiny_data(), num_epochs=1)
    assert counter.count == 0


def test_closing_reaches_every_callback_and_raises_the_first_error_with_the_others_as_notes() -> None:
    heard: list[str] = []

    class Broken(Listener):
        def on_run_close(self, trainer: Any) -> None:
            super().on_run_close(trainer)
            raise ValueError(self.name)

    callbacks = CallbackList([Broken("one", heard), Listener("two", heard), Broken("three", heard)], None)
    with pytest.raises(ValueError, match="one") as caught:
        callbacks.on_run_close(None)  # type: ignore[arg-type]
    assert heard == ["one", "two", "three"]
    assert "ValueError('three')" in caught.value.__notes__[0]


# ---------------------------------------------------------------------- custom events


def test_custom_events_reach_those_that_have_them_with_the_trainer_first() -> None:
    heard: list[Any] = []
    callbacks = CallbackList([Listener("b", heard, 1), Counter(), Listener("a", heard)], "the trainer")
    callbacks.call_event("batch_verified", size=3)
    assert heard == [("a", "the trainer", 3), ("b", "the trainer", 3)]


def test_a_custom_event_that_nobody_hears_is_an_error_only_where_it_is_required() -> None:
    callbacks = CallbackList([Counter()], None)
    callbacks.call_event("batch_verified", size=3)
    with pytest.raises(
        ConfigurationError, match=r"'batch_verified'.*required.*Add a callback.*\['Counter'\]"
    ):
        callbacks.call_event("batch_verified", required=True, size=3)


@pytest.mark.parametrize("event", ["on_train_step_end", "on_batch_verified"])
def test_custom_events_have_names_that_the_trainer_does_not_use(event: str) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"'{event}'.*begin with 'on_'.*(trainer\.callbacks\.{event}\(|another name)",
    ):
        CallbackList([], None).call_event(event)


def test_what_fails_in_a_custom_event_is_heard() -> None:
    class Typo(TrainerCallback):
        def batch_verified(self, trainer: Any) -> None:
            self.no_such_thing  # type: ignore[attr-defined]  # noqa: B018

    with pytest.raises(AttributeError, match="no_such_thing"):
        CallbackList([Typo], None).call_event("batch_verified")


# ---------------------------------------------------------------------- state


def test_several_instances_of_a_class_have_states_of_their_own() -> None:
    callbacks = CallbackList([Counter(1), Counter(2), TrainerCallback], None)
    assert callbacks.state_dict() == {"Counter": {"count": 1}, "Counter#2": {"count": 2}}
    again = CallbackList([Counter(), Counter()], None)
    again.load_state_dict(callbacks.state_dict())
    assert [callback.count for callback in again] == [1, 2]  # type: ignore[attr-defined]


def test_the_name_of_a_state_does_not_depend_on_callbacks_of_other_classes() -> None:
    saved = CallbackList([Counter(1), Counter(2)], None).state_dict()
    heard: list[Any] = []
    again = CallbackList(
        [Listener("new", heard), first := Counter(), Listener("newer", heard, -5), second := Counter()], None
    )
    again.load_state_dict(saved)
    assert (first.count, second.count) == (1, 2)


def test_a_callback_without_a_saved_state_stays_as_it_is() -> None:
    counter = Counter(7)
    CallbackList([counter], None).load_state_dict({})
    assert counter.count == 7


class Accumulated(TrainerCallback):
    """Holds tensors and what users like to hold."""

    def __init__(self) -> None:
        self.values = [torch.ones(2)]
        self.path = Path("metrics")

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.values.append(kwargs["batch_output"]["loss"].detach())


def test_callbacks_can_be_copied_and_pickled_before_and_after_a_run() -> None:
    callback = Accumulated()
    trainer = tiny_trainer(callbacks=[callback])
    for _ in range(2):
        for copied in (copy.copy(callback), copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert all(map(torch.equal, copied.values, callback.values))
            assert copied.path == callback.path
            assert not hasattr(copied, "no_such_thing")
        trainer.train(tiny_data(), num_epochs=1)
    assert len(callback.values) > 2


def test_a_copy_of_a_list_calls_the_copies() -> None:
    callbacks = CallbackList([Counter(), Counter(5)], None)
    copied = copy.deepcopy(callbacks)
    copied.on_train_step_end(None, batch=None, batch_output={}, step=0)  # type: ignore[arg-type]
    assert [callback.count for callback in copied] == [1, 6]  # type: ignore[attr-defined]
    assert [callback.count for callback in callbacks] == [0, 5]  # type: ignore[attr-defined]
