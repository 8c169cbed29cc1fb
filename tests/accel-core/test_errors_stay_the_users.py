"""What the user's code raises, and what torch raises, is what arrives: the object, its type, its context; advice is a note."""

import traceback
from typing import Any

import pytest
import torch
from torch import nn

from accel_core import Trainer, TrainerCallback
from tiny import tiny_data, tiny_network, tiny_trainer


class OwnError(Exception):
    pass


def fail_with(error: BaseException) -> Any:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.OutOfMemoryError("out of memory"),
        ValueError("no such class"),
        TypeError("three arguments"),
        IndexError("target 7 is out of bounds"),
        OwnError("my own"),
        KeyError("mask"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["loss_func", "model", "callback", "scheduler", "training step"])
def test_the_object_that_was_raised_is_the_one_that_is_caught(error: BaseException, place: str) -> None:
    class Fails(TrainerCallback):
        on_train_step_end = fail_with(error)

    class Failing(Trainer):
        calculate_train_batch_loss = fail_with(error)

    trainer = tiny_trainer(
        Failing if place == "training step" else Trainer, callbacks=[Fails] if place == "callback" else []
    )
    if place == "loss_func":
        trainer.loss_func = fail_with(error)
    if place == "model":
        trainer.model.forward = fail_with(error)
    arguments = {"create_scheduler_fn": fail_with(error)} if place == "scheduler" else {}
    with pytest.raises(type(error)) as caught:
        trainer.train(tiny_data(), num_epochs=1, **arguments)
    assert caught.value is error
    assert caught.value.__cause__ is None


def test_the_context_of_an_error_is_not_hidden() -> None:
    def loss_func(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        try:
            raise OwnError("what really happened")
        except OwnError:
            raise ValueError("what came of it")  # noqa: B904

    with pytest.raises(ValueError, match="what came of it") as caught:
        tiny_trainer(loss_func=loss_func).train(tiny_data(), num_epochs=1)
    text = "".join(traceback.format_exception(caught.value))
    assert "what really happened" in text
    assert "During handling of the above exception" in text


def test_a_loss_function_that_refuses_its_arguments_gets_them_noted() -> None:
    with pytest.raises(RuntimeError) as caught:
        tiny_trainer(loss_func=lambda outputs, targets: outputs @ targets).train(tiny_data(), num_epochs=1)
    (note,) = caught.value.__notes__
    assert "loss_func" in note
    assert "override calculate_train_batch_loss" in note


def test_memory_that_ran_out_gets_no_advice_about_shapes() -> None:
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        tiny_trainer(loss_func=fail_with(error)).train(tiny_data(), num_epochs=1)
    assert not hasattr(caught.value, "__notes__")


def test_an_evaluation_copies_neither_history_nor_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(tiny_network(), nn.BatchNorm1d(2, dtype=torch.float64))
    trainer = tiny_trainer(model=model)
    copied: list[str] = []
    monkeypatch.setattr(trainer.run_history, "state_dict", lambda: copied.append("history"))
    clone = torch.Tensor.clone
    buffers = {id(buffer) for buffer in model.buffers()}
    monkeypatch.setattr(
        torch.Tensor,
        "clone",
        lambda self, **kw: (copied.append("b") if id(self) in buffers else 0, clone(self))[1],
    )
    trainer.evaluate(tiny_data())
    trainer.predict(tiny_data())
    assert copied == []
