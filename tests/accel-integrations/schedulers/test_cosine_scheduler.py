"""The cosine schedule against its closed form, and against torch, timm and transformers where they mean the same."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler as TimmCosineLRScheduler
from transformers import get_cosine_schedule_with_warmup

from accel_core import ConfigurationError, TrainerPlaceholderValues
from accel_core.run.placeholders import resolve_placeholders
from accel_integrations.schedulers import CosineLrScheduler
from tiny import optimizer_of_rates, values_of


def used_rates(scheduler, num_updates):
    """The rates of each update, and that after the last."""
    rates = [values_of(scheduler.optimizer)]
    for _ in range(num_updates):
        scheduler.optimizer.step()
        scheduler.step()
        rates.append(values_of(scheduler.optimizer))
    return rates


def test_equals_the_closed_form():
    scheduler = CosineLrScheduler(
        optimizer_of_rates(0.1, 0.02),
        total_num_epochs=10,
        num_update_steps_per_epoch=10,
        lr_min=0.001,
        num_warmup_epochs=2,
        warmup_starting_lr=0.0001,
        num_cooldown_epochs=1,
    )
    for n in range(120):
        for base, value in zip((0.1, 0.02), scheduler.get_updated_values(n), strict=True):
            if n < 20:
                expected = 0.0001 + (base - 0.0001) * n / 20
            elif n < 90:
                expected = 0.001 + (base - 0.001) * (1 + math.cos(math.pi * (n - 20) / 70)) / 2
            else:
                expected = 0.001
            assert value == pytest.approx(expected, rel=1e-12)


def test_lesson_5_ends_at_the_minimum_with_the_last_update_and_without_a_cliff():
    scheduler = CosineLrScheduler(
        optimizer_of_rates(1.0), 10, 10, lr_min=0.0, num_warmup_epochs=3, warmup_starting_lr=0.0
    )
    rates = [rate for (rate,) in used_rates(scheduler, 100)]
    assert rates[30] == 1.0
    assert rates[100] == 0.0
    assert rates[99] > 0.0
    largest_step = math.pi / 2 / 70
    assert all(0 < before - after <= largest_step for before, after in itertools.pairwise(rates[30:]))


def test_lesson_5_no_value_is_used_twice():
    scheduler = CosineLrScheduler(optimizer_of_rates(1.0), 2, 10)
    rates = [rate for (rate,) in used_rates(scheduler, 20)]
    assert rates[0] == 1.0
    assert len(set(rates)) == 21


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_lesson_5_a_warmup_ratio_begins_at_that_part_of_each_base_rate_and_never_overshoots(ratio):
    scheduler = CosineLrScheduler(
        optimizer_of_rates(0.3, 0.007),
        10,
        10,
        num_warmup_epochs=2,
        warmup_starting_lr_ratio=ratio,
        lr_min=0.0,
    )
    assert scheduler.get_updated_values(0) == [ratio * 0.3, ratio * 0.007]
    assert scheduler.get_updated_values(20) == [0.3, 0.007]
    for n in range(101):
        assert all(
            value <= base for value, base in zip(scheduler.get_updated_values(n), (0.3, 0.007), strict=True)
        )


def test_a_minimum_ratio_is_of_each_base_rate():
    scheduler = CosineLrScheduler(optimizer_of_rates(0.3, 0.007), 10, 10, min_lr_ratio=0.1)
    assert scheduler.get_updated_values(100) == [pytest.approx(0.03), pytest.approx(0.0007)]


def test_a_group_below_the_minimum_keeps_its_rate():
    scheduler = CosineLrScheduler(optimizer_of_rates(0.1, 1e-8, 0.0), 10, 10, num_warmup_epochs=1)
    for n in range(101):
        assert scheduler.get_updated_values(n)[1:] == [1e-8, 0.0]


def test_k_decay_bends_the_curve():
    scheduler = CosineLrScheduler(optimizer_of_rates(1.0), 10, 10, k_decay=2.0, lr_min=0.0)
    assert scheduler.get_updated_values(50) == [pytest.approx((1 + math.cos(math.pi * 0.25)) / 2)]


@pytest.mark.parametrize(("warmup", "expected"), [(0.5, 5), (0.29, 3), (2.5, 25)])
def test_warmup_may_be_a_fraction_of_an_epoch(warmup, expected):
    scheduler = CosineLrScheduler(optimizer_of_rates(1.0), 10, 10, num_warmup_epochs=warmup)
    assert scheduler.num_warmup_updates == expected
    assert scheduler.get_updated_values(expected) == [1.0]
    assert scheduler.get_updated_values(expected - 1)[0] < 1.0


def test_equals_torch_without_warmup():
    ours = CosineLrScheduler(optimizer_of_rates(0.1, 0.02), 7, 13, lr_min=0.001)
    theirs = optimizer_of_rates(0.1, 0.02)
    torch_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=7 * 13, eta_min=0.001)
    for rates in used_rates(ours, 7 * 13):
        assert rates == pytest.approx(values_of(theirs), rel=1e-9)
        theirs.step()
        torch_scheduler.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # Of SequentialLR itself, before torch 2.7.
def test_equals_torch_with_a_linear_warmup_before():
    ours = CosineLrScheduler(
        optimizer_of_rates(0.1), 10, 9, lr_min=0.001, num_warmup_epochs=2, warmup_starting_lr=0.01
    )
    theirs = optimizer_of_rates(0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(theirs, start_factor=0.1, total_iters=18)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=72, eta_min=0.001)
    torch_scheduler = torch.optim.lr_scheduler.SequentialLR(theirs, [warmup, annealing], milestones=[18])
    for rates in used_rates(ours, 90):
        assert rates == pytest.approx(values_of(theirs), rel=1e-9)
        theirs.step()
        torch_scheduler.step()


@pytest.mark.parametrize("k_decay", [1.0, 1.5])
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_equals_timm_with_warmup_as_a_prefix(warmup_epochs, k_decay):
    ours = CosineLrScheduler(
        optimizer_of_rates(0.1, 0.02),
        10,
        9,
        lr_min=0.001,
        num_warmup_epochs=warmup_epochs,
        warmup_starting_lr=1e-4,
        k_decay=k_decay,
    )
    theirs = optimizer_of_rates(0.1, 0.02)
    timm_scheduler = TimmCosineLRScheduler(
        theirs,
        t_initial=(10 - warmup_epochs) * 9,
        lr_min=0.001,
        warmup_t=warmup_epochs * 9,
        warmup_lr_init=1e-4,
        warmup_prefix=True,
        t_in_epochs=False,
        k_decay=k_decay,
    )
    for n, rates in enumerate(used_rates(ours, 95)):
        timm_scheduler.step_update(n)
        assert rates == pytest.approx(values_of(theirs), rel=1e-9)


def test_equals_transformers_with_warmup_from_zero():
    ours = CosineLrScheduler(
        optimizer_of_rates(0.1, 0.02), 10, 9, lr_min=0.0, num_warmup_epochs=2, warmup_starting_lr=0.0
    )
    theirs = optimizer_of_rates(0.1, 0.02)
    transformers_scheduler = get_cosine_schedule_with_warmup(
        theirs, num_warmup_steps=18, num_training_steps=90
    )
    for rates in used_rates(ours, 90):
        assert rates == pytest.approx(values_of(theirs), rel=1e-9, abs=1e-15)
        theirs.step()
        transformers_scheduler.step()


def test_the_saved_plan_goes_before_a_new_one():
    first = CosineLrScheduler(optimizer_of_rates(0.1), 10, 10, num_warmup_epochs=1, min_lr_ratio=0.2)
    for _ in range(37):
        first.step()
    optimizer = optimizer_of_rates(0.5)
    resumed = CosineLrScheduler(optimizer, 99, 10)
    resumed.load_state_dict(first.state_dict())
    for _ in range(70):
        assert values_of(optimizer) == values_of(first.optimizer)
        first.step()
        resumed.step()


class TestWithTheTrainersNumbers:
    def build(self, create_scheduler_fn, epochs=5, per_epoch=20, updates=None):
        config = SimpleNamespace(
            num_epochs=epochs,
            num_update_steps_per_epoch=per_epoch,
            num_update_steps=updates or epochs * per_epoch,
        )
        return resolve_placeholders(create_scheduler_fn, config)(optimizer_of_rates(1.0))

    def test_nothing_has_to_be_calculated(self):
        scheduler = self.build(
            CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, num_cooldown_epochs=1, lr_min=0.0)
        )
        assert (scheduler.total_updates, scheduler.num_warmup_updates, scheduler.num_cooldown_updates) == (
            100,
            10,
            20,
        )

    def test_a_run_that_ends_in_mid_epoch_ends_at_the_minimum(self):
        scheduler = self.build(
            CosineLrScheduler.create_scheduler_fn(lr_min=0.0), epochs=3, per_epoch=7, updates=17
        )
        assert scheduler.get_updated_values(17) == [0.0]
        assert scheduler.get_updated_values(16)[0] > 0.0

    @pytest.mark.parametrize("per_epoch", range(1, 60))
    def test_the_number_of_updates_is_exact(self, per_epoch):
        for updates in range(max(1, per_epoch // 2), 200, 7):
            scheduler = self.build(
                CosineLrScheduler.create_scheduler_fn(), per_epoch=per_epoch, updates=updates
            )
            assert scheduler.total_updates == updates

    def test_data_without_a_length_needs_the_length_of_an_epoch_only(self):
        create_scheduler_fn = CosineLrScheduler.create_scheduler_fn(
            num_update_steps_per_epoch=10, num_warmup_epochs=2
        )
        scheduler = self.build(create_scheduler_fn, epochs=None, per_epoch=None, updates=500)
        assert (scheduler.total_updates, scheduler.num_warmup_updates) == (500, 20)

    def test_epochs_may_be_given_as_placeholders(self):
        create_scheduler_fn = CosineLrScheduler.create_scheduler_fn(
            total_num_epochs=TrainerPlaceholderValues.NUM_EPOCHS + 1
        )
        assert self.build(create_scheduler_fn).total_updates == 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_num_epochs": 0}, "total_num_epochs is 0.*longer than warm-up and cooldown.*Shorten them"),
        (
            {"num_update_steps_per_epoch": 0},
            "num_update_steps_per_epoch is 0.*at least 1.*create_scheduler_fn",
        ),
        ({"num_warmup_epochs": -1}, "num_warmup_epochs is -1.*at least 0.*Fractions"),
        ({"num_cooldown_epochs": float("nan")}, "num_cooldown_epochs is nan.*at least 0.*Fractions"),
        (
            {"num_warmup_epochs": 6, "num_cooldown_epochs": 4},
            "total_num_epochs is 10.* 100 updates.* 60 .*warm-up.* 40 .*cooldown.*Shorten them",
        ),
        ({"k_decay": 0}, "k_decay is 0.*positive.* 1 "),
        ({"lr_min": -1e-6}, "lr_min is -1e-06.*between 0 and .*optimizer, 0.1"),
        ({"lr_min": 0.2}, r"lr_min is 0.2.*Pass a smaller lr_min.*min_lr_ratio"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio is 1.5.*between 0 and 1.*fraction"),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr": 1.0},
            "warmup_starting_lr is 1.0.*between 0 and .* 0.1.*warmup_starting_lr_ratio",
        ),
        (
            {"num_warmup_epochs": 1, "warmup_starting_lr_ratio": -1},
            "warmup_starting_lr_ratio is -1.*between 0 and 1.*fraction",
        ),
    ],
)
def test_a_wrong_argument_is_reported_before_the_optimizer_is_touched(arguments, message):
    optimizer = optimizer_of_rates(0.1)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(ConfigurationError, match=message):
        CosineLrScheduler(
            optimizer, **{"total_num_epochs": 10, "num_update_steps_per_epoch": 10, **arguments}
        )
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before
