"""Events: their order, the checks when callbacks are added, custom events, state."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import CallbackList, ConfigurationError, Trainer, TrainerCallback
from accel_core.callback_list import EVENTS


class StoryTeller(TrainerCallback):
    """Writes down each event."""


STORY: list[str] = []
for _event in EVENTS:

    def _tell(self: Any, trainer: Any, _name: str = _event, **kwargs: Any) -> None:
        STORY.append(_name.removeprefix("on_"))

    setattr(StoryTeller, _event, _tell)


class TellingTrainer(Trainer):
    """Writes down the methods that one may override."""


for _method in (
    "train_epoch_start",
    "backward_step",
    "clip_gradients",
    "optimizer_step",
    "scheduler_step",
    "optimizer_zero_grad",
):

    def _act(self: Any, *args: Any, _name: str = _method) -> None:
        STORY.append(_name.upper())
        getattr(Trainer, _name)(self, *args)

    setattr(TellingTrainer, _method, _act)


def train(callbacks: Any, trainer_class: type[Trainer] = Trainer, **kwargs: Any) -> Trainer:
    model = nn.Linear(2, 1)
    data = TensorDataset(torch.ones(5, 2), torch.ones(5, 1))
    trainer = trainer_class(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=callbacks)
    trainer.train(data, **{"num_epochs": 1, "eval_dataset": data, "per_device_batch_size": 2, **kwargs})
    return trainer


def test_methods_and_events_fire_in_the_documented_order() -> None:
    STORY.clear()
    trainer = train([StoryTeller()], TellingTrainer, gradient_accumulation_steps=2)
    step = ["train_step_start", "BACKWARD_STEP", "train_step_end"]
    update = ["optimizer_step_start", "CLIP_GRADIENTS", "OPTIMIZER_STEP", "SCHEDULER_STEP", "OPTIMIZER_ZERO_GRAD"]
    evaluation = ["eval_epoch_start", *["eval_step_start", "eval_step_end"] * 3, "eval_epoch_end"]
    assert [
        "init_end",
        "prepare_start",
        "training_run_start",
        "TRAIN_EPOCH_START",
        "train_epoch_start",
        *step,
        *step,
        *update,
        "optimizer_step_end",
        *step,
        *update,
        "optimizer_step_end",
        "train_epoch_end",
        *evaluation,
        "training_run_epoch_end",
        "training_run_end",
        "run_close",
    ] == STORY
    STORY.clear()
    trainer.evaluate(per_device_batch_size=2)
    assert ["evaluation_run_start", *evaluation, "evaluation_run_end", "run_close"] == STORY


def test_an_agreed_stop_ends_the_story_without_evaluation() -> None:
    class Stop(TrainerCallback):
        def on_train_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
            trainer.request_stop("seen enough")

    STORY.clear()
    trainer = train([Stop(), StoryTeller()])
    assert STORY[-4:] == ["optimizer_step_end", "train_epoch_end", "training_run_end", "run_close"]
    assert trainer.stop_reason == "seen enough"


def test_what_fails_in_a_callback_is_heard() -> None:
    """Lesson A24: a typo is no event that is not there."""

    class Typo(TrainerCallback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            trainer.no_such_thing  # type: ignore[attr-defined]  # noqa: B018

    with pytest.raises(AttributeError, match="no_such_thing"):
        train([Typo()])


def test_callbacks_can_be_copied_and_pickled() -> None:
    """Lesson A24."""
    teller = pickle.loads(pickle.dumps(copy.deepcopy(StoryTeller())))
    assert not hasattr(teller, "no_such_thing")


class Counter(TrainerCallback):
    def __init__(self, start: int = 0) -> None:
        self.count = start

    def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_several_instances_of_a_class_have_states_of_their_own() -> None:
    """Lesson A25."""
    callbacks = CallbackList([Counter(1), Counter(2), TrainerCallback], None)
    assert callbacks.state_dict() == {"Counter": {"count": 1}, "Counter#2": {"count": 2}}
    again = CallbackList([Counter(), Counter()], None)
    again.load_state_dict(callbacks.state_dict())
    assert [callback.count for callback in again] == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("on_train_epoch_ends", "Did you mean 'on_train_epoch_end'"),
        ("on_stop_training_error", "on_training_run_end"),
        ("on_train_batch_end", "Use on_train_step_end"),
        ("on_validation_epoch_end", "Use on_eval_epoch_end"),
    ],
)
def test_events_that_do_not_exist_are_refused_with_the_likely_one(name: str, hint: str) -> None:
    callback = type("Mistaken", (TrainerCallback,), {name: lambda self, trainer: None})
    with pytest.raises(ConfigurationError, match=hint):
        CallbackList([callback], None)


def test_an_event_that_cannot_take_its_arguments_is_refused() -> None:
    class Narrow(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, batch: Any) -> None:  # type: ignore[override]
            pass

    with pytest.raises(ConfigurationError, match=r"def on_train_step_end\(self, trainer, batch, batch_output, step\)"):
        CallbackList([Narrow], None)


def test_savers_come_last_whatever_the_order_in_the_list() -> None:
    class Saver(TrainerCallback):
        order = 100

    callbacks = CallbackList([Saver, Counter, StoryTeller], None)
    assert [type(callback).__name__ for callback in callbacks] == ["Counter", "StoryTeller", "Saver"]


def test_an_event_that_nobody_hears_stays_the_inherited_no_op_and_one_listener_is_called_directly() -> None:
    callbacks = CallbackList([Counter()], None)
    assert callbacks.on_train_epoch_end.__func__ is TrainerCallback.on_train_epoch_end
    assert callbacks.on_train_step_end.__self__ is callbacks.callback_list[0]


def test_custom_events_reach_those_that_have_them_with_the_trainer_first() -> None:
    heard: list[Any] = []

    class Listener(TrainerCallback):
        def batch_verified(self, trainer: Any, size: int) -> None:
            heard.append((trainer, size))

    callbacks = CallbackList([Counter(), Listener()], "the trainer")
    callbacks.call_event("batch_verified", size=3)
    callbacks.call_event("nobody_has_this")
    assert heard == [("the trainer", 3)]
    with pytest.raises(ConfigurationError, match="nobody_has_this"):
        callbacks.call_event("nobody_has_this", required=True)
    with pytest.raises(ConfigurationError, match="begin with 'on_'"):
        callbacks.call_event("on_train_step_end")
