"""A value for each parameter group, as a function of the updates completed."""

import io
from functools import partial

import pytest
import torch
from torch import nn

from accel_core import ConfigurationError
from accel_integrations.schedulers import SchedulerBase, StatefulSchedulerBase
from tiny import optimizer_of_rates, values_of

build_optimizer = partial(optimizer_of_rates, optimizer_class=torch.optim.AdamW)


class Halving(StatefulSchedulerBase):
    plan_fields = ("every_n_updates",)

    def __init__(self, optimizer, every_n_updates=2, param_group_field="lr"):
        self.every_n_updates = every_n_updates
        super().__init__(optimizer, param_group_field)

    def get_updated_values(self, num_updates):
        return [base * 0.5 ** (num_updates // self.every_n_updates) for base in self.base_values]


def test_the_first_value_is_set_at_once_and_used_for_one_update_only():
    optimizer = build_optimizer(1.0, 0.5)
    scheduler = Halving(optimizer, every_n_updates=1)
    used = []
    for _ in range(3):
        used.append(values_of(optimizer))
        optimizer.step()
        scheduler.step()
    assert used == [[1.0, 0.5], [0.5, 0.25], [0.25, 0.125]]


def test_after_n_steps_the_groups_hold_the_value_for_n_updates():
    optimizer = build_optimizer(1.0, 0.3)
    scheduler = Halving(optimizer)
    for n in range(1, 8):
        scheduler.step()
        assert scheduler.num_updates == n
        assert values_of(optimizer) == scheduler.get_updated_values(n)


def test_values_do_not_depend_on_what_was_asked_before():
    scheduler = Halving(build_optimizer(1.0))
    expected = [scheduler.get_updated_values(n) for n in range(10)]
    for n in (9, 3, 3, 0, 7):
        scheduler.step_update(n)
        assert scheduler.get_updated_values(n) == expected[n]


def test_weight_decay_is_scheduled_like_the_rate_and_leaves_it_alone():
    optimizer = build_optimizer(1.0, 0.5, weight_decay=0.1)
    scheduler = Halving(optimizer, param_group_field="weight_decay")
    for _ in range(2):
        scheduler.step()
    assert values_of(optimizer, "weight_decay") == [0.05, 0.05]
    assert values_of(optimizer) == [1.0, 0.5]


def test_two_schedulers_share_an_optimizer():
    optimizer = build_optimizer(1.0, weight_decay=0.1)
    schedulers = [Halving(optimizer), Halving(optimizer, every_n_updates=1, param_group_field="weight_decay")]
    for scheduler in schedulers:
        scheduler.step()
        scheduler.step()
    assert values_of(optimizer) == [0.5]
    assert values_of(optimizer, "weight_decay") == [0.025]


def test_a_second_run_begins_at_the_base_of_the_first():
    optimizer = build_optimizer(1.0)
    first = Halving(optimizer)
    for _ in range(6):
        first.step()
    Halving(optimizer)
    assert values_of(optimizer) == [1.0]


def test_a_group_that_is_added_later_is_scheduled_from_its_own_base():
    optimizer = build_optimizer(1.0)
    scheduler = Halving(optimizer)
    scheduler.step()
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters(), "lr": 0.25})
    for _ in range(3):
        scheduler.step()
    assert values_of(optimizer) == [0.25, 0.0625]


def test_a_rate_that_is_a_tensor_stays_the_same_tensor():
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters(), lr=rate)
    scheduler = Halving(optimizer, every_n_updates=1)
    scheduler.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


def test_the_state_resumes_to_the_bit_and_loads_without_pickle():
    optimizer = build_optimizer(0.7, 0.3)
    scheduler = Halving(optimizer, every_n_updates=3)
    for _ in range(4):
        scheduler.step()
    file = io.BytesIO()
    torch.save({"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    resumed_optimizer = build_optimizer(9.0, 9.0)
    resumed = Halving(resumed_optimizer, every_n_updates=100)
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["scheduler"])
    for _ in range(20):
        assert values_of(resumed_optimizer) == values_of(optimizer)
        scheduler.step()
        resumed.step()
    assert resumed.state_dict() == scheduler.state_dict()


def test_the_schedulers_state_alone_restores_the_values_of_the_groups():
    scheduler = Halving(build_optimizer(0.7))
    for _ in range(5):
        scheduler.step()
    optimizer = build_optimizer(9.0)
    Halving(optimizer).load_state_dict(scheduler.state_dict())
    assert values_of(optimizer) == values_of(scheduler.optimizer)


def test_the_stateless_base_changes_nothing_until_it_gets_the_number_of_updates():
    class Thirds(SchedulerBase):
        def get_updated_values(self, num_updates):
            return [base / 3**num_updates for base in self.base_values]

    optimizer = build_optimizer(9.0)
    scheduler = Thirds(optimizer)
    assert values_of(optimizer) == [9.0]
    scheduler.step_update(2)
    assert values_of(optimizer) == [1.0]


def test_a_field_that_is_missing_is_reported_with_those_that_are_there():
    with pytest.raises(
        ConfigurationError, match=r"'momentum'.* group 0 of AdamW.*\['eps', 'lr', 'weight_decay'\]"
    ):
        Halving(build_optimizer(1.0), param_group_field="momentum")


def test_a_field_that_is_no_number_is_reported():
    with pytest.raises(
        ConfigurationError,
        match=r"'betas' is \(0\.9, 0\.999\).* group 0.*number.*\['eps', 'lr', 'weight_decay'\]",
    ):
        Halving(build_optimizer(1.0), param_group_field="betas")


@pytest.mark.parametrize("returned", [None, [0.1], 0.1])
def test_a_wrong_number_of_values_is_reported_before_any_group_changes(returned):
    class Wrong(Halving):
        def get_updated_values(self, num_updates):
            return returned if num_updates else super().get_updated_values(num_updates)

    optimizer = build_optimizer(1.0, 2.0)
    scheduler = Wrong(optimizer)
    with pytest.raises(
        ConfigurationError,
        match=r"Wrong\.get_updated_values\(1\) returned .*list.* 2 parameter groups.*self\.base_values",
    ):
        scheduler.step()
    assert values_of(optimizer) == [1.0, 2.0]


def test_attributes_that_are_set_too_late_are_explained():
    class Late(StatefulSchedulerBase):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.gamma = 0.5

        def get_updated_values(self, num_updates):
            return [base * self.gamma**num_updates for base in self.base_values]

    with pytest.raises(AttributeError, match="gamma") as raised:
        Late(build_optimizer(1.0))
    assert "before calling super().__init__" in raised.value.__notes__[0]


def test_a_state_of_another_class_is_reported_and_changes_nothing():
    torch_optimizer = build_optimizer(1.0)
    state = torch.optim.lr_scheduler.StepLR(torch_optimizer, 1).state_dict()
    optimizer = build_optimizer(1.0)
    scheduler = Halving(optimizer)
    with pytest.raises(
        ConfigurationError,
        match=r"'base_lrs'.*Halving.*\['base_values', 'every_n_updates', 'num_updates'\].*load_scheduler=False",
    ):
        scheduler.load_state_dict(state)
    assert values_of(optimizer) == [1.0]


def test_a_state_of_another_number_of_groups_is_reported():
    state = Halving(build_optimizer(1.0, 2.0)).state_dict()
    with pytest.raises(ConfigurationError, match=r" 2 parameter groups.* 1.*load_scheduler=False"):
        Halving(build_optimizer(1.0)).load_state_dict(state)
