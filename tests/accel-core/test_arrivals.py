"""Values of a device are read at a fixed distance, and not before."""

from typing import Any

import pytest
import torch

from accel_core import TerminateOnNaNCallback
from accel_core.processes.arrivals import Arrivals
from tiny import tiny_trainer


class OnDevice:
    """Stands for a tensor of an accelerator, and notes when it is waited for."""

    is_cpu = False
    device = "a device"

    def __init__(self, value: float) -> None:
        self.value = value

    def detach(self) -> "OnDevice":
        return self

    def item(self) -> float:
        raise AssertionError("reading a tensor of a device waits for its latest work")

    tolist = item


class Copy:
    def copy_(self, source: OnDevice, non_blocking: bool) -> None:
        assert non_blocking
        self.value = torch.tensor(source.value)

    def item(self) -> float:
        return self.value.item()


class Event:
    waited = 0

    def __init__(self, device: str) -> None:
        assert device == OnDevice.device

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited += 1


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty_like(value: OnDevice, device: str, pin_memory: bool) -> Copy:
        assert (device, pin_memory) == ("cpu", True)
        return Copy()

    monkeypatch.setattr("accel_core.processes.arrivals.torch.empty_like", empty_like)
    monkeypatch.setattr("accel_core.processes.arrivals.torch.Event", Event)
    Event.waited = 0


def test_a_value_is_given_so_many_additions_later_and_waited_for_only_then() -> None:
    arrivals = Arrivals(distance=2)
    given = []
    for number in range(5):
        given.append(arrivals.add(OnDevice(number), f"update {number}"))  # type: ignore[arg-type]
        assert Event.waited == max(number - 1, 0)
    assert [label for _, label in filter(None, given)] == ["update 0", "update 1", "update 2"]
    assert [value.item() for value, _ in arrivals.drain()] == [3.0, 4.0]
    assert arrivals.drain() == []


def test_a_value_of_the_cpu_is_given_at_once() -> None:
    value = torch.tensor(3.0)
    assert Arrivals(distance=2).add(value, "now") == (value, "now")


def test_the_guard_against_nan_never_reads_the_loss_of_the_latest_steps() -> None:
    callback, trainer = TerminateOnNaNCallback(), tiny_trainer()
    asked: list[str] = []
    trainer.request_stop = lambda reason, signal_number=0: asked.append(reason)  # type: ignore[method-assign]
    callback.on_training_run_start(trainer)
    losses: list[Any] = [OnDevice(1.0), OnDevice(float("nan")), OnDevice(1.0), OnDevice(float("inf"))]
    for step, loss in enumerate(losses):
        callback.on_train_step_end(trainer, None, {"loss": loss}, step)
        assert len(asked) == (step == 3)
    callback.on_train_epoch_end(trainer)
    assert [reason[:15] for reason in asked] == ["the loss is nan", "the loss is inf"]
