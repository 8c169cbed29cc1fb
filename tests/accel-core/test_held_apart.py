"""What an optimizer holds beside a model: taken out while an engine looks at it, and back in its place."""

import copy

import pytest
import torch
from torch import nn

from accel_core import CheckpointError
from accel_core.engines.apart import held_apart
from accel_core.engines.weights import load_into


def create(num_beside=2):
    torch.manual_seed(0)
    model, beside = nn.Linear(2, 1), nn.Linear(1, num_beside)
    groups = [{"params": [beside.bias, *model.parameters()]}, {"params": [beside.weight], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    beside(model(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    return model, beside, optimizer


def test_within_the_optimizer_holds_the_model_alone_and_afterwards_everything_in_its_order():
    model, _, optimizer = create()
    before = copy.deepcopy(optimizer.state_dict())
    order = [list(group["params"]) for group in optimizer.param_groups]
    with held_apart(optimizer, model).taken_out():
        (group,) = optimizer.param_groups
        assert {*group["params"]} == {*model.parameters()} == {*optimizer.state}
        # As engines do that load: new groups, and parameters exchanged for others.
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        exchanged = nn.Parameter(model.bias.detach().clone())
        optimizer.state[exchanged] = optimizer.state.pop(model.bias)
        group = optimizer.param_groups[0]
        group["params"] = [exchanged if each is model.bias else each for each in group["params"]]
    order[0][2] = exchanged
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [
        list(map(id, held)) for held in order
    ]
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)


def test_its_state_has_moments_and_the_settings_of_groups_of_its_own():
    model, beside, optimizer = create()
    state = copy.deepcopy(held_apart(optimizer, model).state_dict())
    other_model, other_beside, other = create()
    other.state.clear()
    other.param_groups[1]["lr"] = 0.0
    load_into(held_apart(other, other_model), "state", state)
    assert other.param_groups[1]["lr"] == 0.5 and other.param_groups[0]["lr"] == 0.1
    assert {*other.state} == {*other_beside.parameters()}
    for name in ("exp_avg", "step"):
        assert torch.equal(other.state[other_beside.bias][name], optimizer.state[beside.bias][name])


def test_the_state_of_other_parameters_is_refused():
    model, _, optimizer = create()
    state = held_apart(optimizer, model).state_dict()
    other_model, _, other = create(num_beside=3)
    with pytest.raises(CheckpointError, match=r"\[\[3\], \[3, 1\]\].*\[\[2\], \[2, 1\]\].*Create it as"):
        load_into(held_apart(other, other_model), "state", state)


def test_an_optimizer_of_the_model_alone_has_nothing_apart():
    model, _, _ = create()
    assert held_apart(torch.optim.SGD(model.parameters(), lr=0.1), model) is None
    assert held_apart(None, model) is None
