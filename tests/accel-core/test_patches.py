"""What preparing sets in an accelerator that several trainers share is there while one of them runs, and away after."""

from types import SimpleNamespace

import pytest
from torch import nn

from accel_core.engines.patches import Patches


def create(engine):
    return SimpleNamespace(_models=[], _optimizers=[], _schedulers=[], deepspeed_engine_wrapped=engine)


def prepare(accelerator, name):
    """As Accelerate prepares by DeepSpeed: it keeps the engine that `backward` calls, if there is one."""
    patches = Patches(nn.Linear(1, 1), accelerator)
    accelerator._models.append(name)
    if accelerator.deepspeed_engine_wrapped is None:
        accelerator.deepspeed_engine_wrapped = name
    return patches


@pytest.mark.parametrize("before", [None, "the user's own"])
def test_backward_calls_the_engine_of_the_trainer_that_runs(before):
    accelerator = create(before)
    one = prepare(accelerator, "one")
    assert accelerator.deepspeed_engine_wrapped == "one"
    one.take_off()
    other = prepare(accelerator, "other")
    assert accelerator.deepspeed_engine_wrapped == "other" and accelerator._models == ["other"]
    other.take_off()
    assert accelerator.deepspeed_engine_wrapped == before
    with one.applied():
        assert accelerator.deepspeed_engine_wrapped == "one" and accelerator._models == ["one"]
    assert accelerator.deepspeed_engine_wrapped == before and accelerator._models == []


def test_an_accelerator_without_deepspeed_is_given_nothing():
    accelerator = create(None)
    del accelerator.deepspeed_engine_wrapped
    patches = Patches(nn.Linear(1, 1), accelerator)
    patches.take_off()
    patches.put_on()
    assert not hasattr(accelerator, "deepspeed_engine_wrapped")
