"""Warm-up, stable, decay: values, checkpoints, phases, and continuing for longer."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import get_wsd_schedule

from accel_core import ConfigurationError
from accel_core.run.placeholders import resolve_placeholders
from accel_integrations.schedulers import WSDLrScheduler, estimate_checkpoint_steps
from tiny import optimizer_of_rates, values_of


def step_to(scheduler, num_updates):
    while scheduler.num_updates < num_updates:
        scheduler.optimizer.step()
        scheduler.step()


def curve(scheduler, updates):
    return [scheduler.get_updated_values(n) for n in updates]


@pytest.mark.parametrize("use_inverse_sqrt_decay", [True, False])
def test_equals_the_closed_form(use_inverse_sqrt_decay):
    scheduler = WSDLrScheduler(
        optimizer_of_rates(0.1, 0.02),
        total_steps=200,
        num_warmup_steps=10,
        decay_phase_ratio=0.2,
        lr_min=0.01,
        warmup_starting_lr=0.001,
        use_inverse_sqrt_decay=use_inverse_sqrt_decay,
    )
    for n in range(250):
        for base, value in zip((0.1, 0.02), scheduler.get_updated_values(n), strict=True):
            t = min(1.0, (n - 160) / 40)
            if n < 10:
                expected = 0.001 + (base - 0.001) * n / 10
            elif n <= 160:
                expected = base
            elif use_inverse_sqrt_decay:
                expected = base * (0.01 + 0.99 * (1 - math.sqrt(t)))
            else:
                expected = 1 / (t / (0.01 * base) + (1 - t) / base)
            assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lr_min", [0.0, 0.1])
def test_equals_transformers_with_the_decay_by_the_square_root(lr_min):
    """Its warm-up begins with the same part of the base rate with which the decay ends."""
    ours = WSDLrScheduler(
        optimizer_of_rates(0.2),
        total_steps=100,
        num_warmup_steps=10,
        decay_phase_ratio=0.3,
        lr_min=lr_min,
        warmup_starting_lr=lr_min * 0.2,
    )
    theirs = optimizer_of_rates(0.2)
    transformers_scheduler = get_wsd_schedule(theirs, 10, 30, 100, decay_type="1-sqrt", min_lr_ratio=lr_min)
    for n in range(105):
        step_to(ours, n)
        assert values_of(ours.optimizer) == pytest.approx(values_of(theirs), rel=1e-9, abs=1e-15), n
        theirs.step()
        transformers_scheduler.step()


def test_the_stable_phase_is_the_base_rate_to_the_bit():
    scheduler = WSDLrScheduler(optimizer_of_rates(0.1, 0.3), total_steps=100, num_warmup_steps=10)
    assert all(rates == [0.1, 0.3] for rates in curve(scheduler, range(10, 91)))


def test_each_value_is_used_for_one_update():
    scheduler = WSDLrScheduler(
        optimizer_of_rates(1.0), total_steps=10, num_warmup_steps=4, decay_phase_ratio=0.5, lr_min=0.0
    )
    used = []
    for n in range(10):
        used.append(values_of(scheduler.optimizer)[0])
        step_to(scheduler, n + 1)
    assert used[:6] == [pytest.approx(value, abs=1e-5) for value in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert values_of(scheduler.optimizer) == [0.0]


def test_the_rate_decays_before_each_checkpoint_and_returns_without_a_warmup():
    scheduler = WSDLrScheduler(
        optimizer_of_rates(1.0),
        total_steps=400,
        num_checkpoints=3,
        num_warmup_steps=20,
        decay_phase_ratio=0.1,
        lr_min=0.1,
    )
    assert scheduler.get_checkpoint_steps() == [100, 200, 400]
    assert [(info["pre_decay_step"], info["decay_steps"]) for info in scheduler.get_decay_info()] == [
        (90, 10),
        (190, 10),
        (380, 20),
    ]
    for start, pre_decay, end in ((20, 90, 100), (100, 190, 200), (200, 380, 400)):
        assert set(map(tuple, curve(scheduler, range(start, pre_decay + 1)))) == {(1.0,)}
        decay = [rate for (rate,) in curve(scheduler, range(pre_decay, end))]
        assert decay == sorted(decay, reverse=True)
        assert decay[-1] == pytest.approx(
            0.1 + 0.9 * (1 - math.sqrt((end - 1 - pre_decay) / (end - pre_decay)))
        )
    assert scheduler.get_updated_values(400) == [pytest.approx(0.1)]


def test_a_short_period_may_be_all_decay():
    scheduler = WSDLrScheduler(
        optimizer_of_rates(1.0), total_steps=8, num_checkpoints=2, decay_phase_ratio=1.0, lr_min=0.0
    )
    expected = [1, 1 - math.sqrt(1 / 4), 1 - math.sqrt(2 / 4), 1 - math.sqrt(3 / 4)]
    assert [rate for (rate,) in curve(scheduler, range(9))] == pytest.approx([*expected, *expected, 0.0])


def test_without_decay_the_rate_stays():
    scheduler = WSDLrScheduler(optimizer_of_rates(1.0), total_steps=10, decay_phase_ratio=0.0)
    assert set(map(tuple, curve(scheduler, range(20)))) == {(1.0,)}


@pytest.mark.parametrize(
    ("total", "number", "expected"),
    [
        (200_000, 3, [50_000, 100_000, 200_000]),
        (200_000, 4, [25_000, 50_000, 100_000, 200_000]),
        (100_000, 2, [50_000, 100_000]),
        (77, 1, [77]),
        (103, 3, [25, 51, 103]),
        (4, 3, [1, 2, 4]),
    ],
)
def test_checkpoints_double_and_end_with_the_run(total, number, expected):
    assert estimate_checkpoint_steps(total, number) == expected


def test_phases_are_those_of_the_newest_update():
    scheduler = WSDLrScheduler(
        optimizer_of_rates(1.0), total_steps=40, num_checkpoints=2, num_warmup_steps=3, decay_phase_ratio=0.25
    )
    phases = {n: scheduler.get_phase_info(n) for n in (0, 3, 4, 15, 16, 20, 21, 35, 36, 40, 99)}
    assert {n: info["phase"] for n, info in phases.items()} == {
        0: "warmup",
        3: "warmup",
        4: "stable",
        15: "stable",
        16: "decay",
        20: "decay",
        21: "stable",
        35: "stable",
        36: "decay",
        40: "decay",
        99: "decay",
    }
    assert phases[20] == {
        "period_start": 0,
        "period_end": 20,
        "decay_steps": 5,
        "pre_decay_step": 15,
        "phase": "decay",
    }
    assert phases[21] == {
        "period_start": 20,
        "period_end": 40,
        "decay_steps": 5,
        "pre_decay_step": 35,
        "phase": "stable",
    }


def test_the_current_step_and_phase_follow_the_updates():
    scheduler = WSDLrScheduler(optimizer_of_rates(1.0), total_steps=20)
    step_to(scheduler, 19)
    assert scheduler.get_current_step() == 19
    assert scheduler.get_current_phase_info() == scheduler.get_phase_info(19)


def test_lesson_18_the_state_holds_the_updates_and_resumes_to_the_bit():
    arguments = {"total_steps": 40, "num_checkpoints": 2, "num_warmup_steps": 3, "decay_phase_ratio": 0.25}
    scheduler = WSDLrScheduler(optimizer_of_rates(0.1, 0.7), **arguments)
    step_to(scheduler, 17)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    resumed = WSDLrScheduler(optimizer_of_rates(9.0, 9.0), total_steps=1000)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.get_current_step() == 17
    for n in range(17, 45):
        step_to(scheduler, n)
        step_to(resumed, n)
        assert values_of(resumed.optimizer) == values_of(scheduler.optimizer)
    assert resumed.get_decay_info() == scheduler.get_decay_info()


class TestContinuing:
    def state(self, num_updates=90, **arguments):
        arguments = {
            "total_steps": 100,
            "num_warmup_steps": 10,
            "decay_phase_ratio": 0.1,
            "lr_min": 0.1,
            **arguments,
        }
        scheduler = WSDLrScheduler(optimizer_of_rates(0.5), **arguments)
        step_to(scheduler, num_updates)
        return scheduler.state_dict()

    def continuation(self, state, **arguments):
        arguments = {
            "decay_phase_ratio": 0.1,
            "lr_min": 0.1,
            "is_continuation_from_checkpoint": True,
            **arguments,
        }
        scheduler = WSDLrScheduler(optimizer_of_rates(9.0), **arguments)
        scheduler.load_state_dict(state)
        return scheduler

    @pytest.mark.parametrize("num_updates", [90, 100])
    def test_goes_on_with_the_base_rate_and_decays_at_the_end_of_the_longer_run(self, num_updates):
        scheduler = self.continuation(self.state(num_updates), total_steps=300)
        assert scheduler.get_current_step() == num_updates
        decay_steps = (300 - num_updates) // 10
        assert set(map(tuple, curve(scheduler, range(num_updates, 301 - decay_steps)))) == {(0.5,)}
        assert scheduler.get_updated_values(301 - decay_steps)[0] < 0.5
        assert scheduler.get_updated_values(300) == [pytest.approx(0.05)]
        assert values_of(scheduler.optimizer) == [0.5]

    def test_has_its_own_checkpoints_in_what_is_left(self):
        scheduler = self.continuation(self.state(100), total_steps=500, num_checkpoints=3)
        assert scheduler.get_checkpoint_steps() == [200, 300, 500]
        assert scheduler.get_phase_info(101)["period_start"] == 100
        assert scheduler.get_decay_info()[0]["pre_decay_step"] == 190

    def test_may_itself_be_interrupted_and_resumed(self):
        uninterrupted = self.continuation(self.state(), total_steps=300, num_checkpoints=2)
        step_to(uninterrupted, 180)
        resumed = self.continuation(uninterrupted.state_dict(), total_steps=300, num_checkpoints=2)
        for n in range(180, 310):
            step_to(uninterrupted, n)
            step_to(resumed, n)
            assert values_of(resumed.optimizer) == values_of(uninterrupted.optimizer)
        assert resumed.get_checkpoint_steps() == uninterrupted.get_checkpoint_steps()

    def test_may_be_continued_again(self):
        second = self.continuation(self.state(), total_steps=300)
        step_to(second, 279)
        third = self.continuation(second.state_dict(), total_steps=479)
        assert third.get_decay_info() == [
            {"period_start": 279, "period_end": 479, "decay_steps": 20, "pre_decay_step": 459}
        ]
        assert values_of(third.optimizer) == [0.5]

    def test_has_no_warmup(self):
        optimizer = optimizer_of_rates(0.5)
        scheduler = WSDLrScheduler(
            optimizer,
            total_steps=500,
            num_warmup_steps=50,
            decay_phase_ratio=0.1,
            is_continuation_from_checkpoint=True,
        )
        assert values_of(optimizer) == [0.5]
        assert scheduler.get_decay_info()[0]["pre_decay_step"] == 450
        assert scheduler.get_phase_info(1)["phase"] == "stable"

    def test_that_would_end_before_its_beginning_raises_and_changes_nothing(self):
        state = self.state()
        scheduler = WSDLrScheduler(
            optimizer_of_rates(0.5), total_steps=50, is_continuation_from_checkpoint=True
        )
        with pytest.raises(
            ConfigurationError, match=r"total_steps is 50.* 90 updates.*total_steps=1090.*num_epochs"
        ):
            scheduler.load_state_dict(state)
        assert scheduler.get_current_step() == 0
        assert scheduler.total_steps == 50


class TestWithTheTrainersNumbers:
    def build(self, create_scheduler_fn, per_epoch=200, updates=1000):
        config = SimpleNamespace(num_epochs=5, num_update_steps_per_epoch=per_epoch, num_update_steps=updates)
        return resolve_placeholders(create_scheduler_fn, config)(optimizer_of_rates(1.0))

    def test_nothing_has_to_be_calculated(self):
        scheduler = self.build(WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, num_checkpoints=3))
        assert scheduler.num_warmup_steps == 100
        assert scheduler.get_checkpoint_steps() == [250, 500, 1000]

    def test_a_hundredth_of_the_run_is_warmup_by_default(self):
        assert self.build(WSDLrScheduler.create_scheduler_fn()).num_warmup_steps == 10
        assert self.build(WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0)).num_warmup_steps == 0

    def test_a_run_that_ends_in_mid_epoch_decays_to_its_end(self):
        assert self.build(WSDLrScheduler.create_scheduler_fn(), updates=777).get_checkpoint_steps() == [777]

    def test_data_without_a_length_needs_no_epochs(self):
        assert self.build(WSDLrScheduler.create_scheduler_fn(), per_epoch=None).get_checkpoint_steps() == [
            1000
        ]

    def test_epochs_may_be_given(self):
        create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(total_num_epochs=2)
        assert self.build(create_scheduler_fn).get_checkpoint_steps() == [400]


def test_the_length_may_be_given_in_epochs():
    assert (
        WSDLrScheduler(optimizer_of_rates(1.0), num_epochs=3, num_update_steps_per_epoch=7).total_steps == 21
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"total_steps": None},
            "num_epochs is None.* total_steps None.*length of the run.*total_steps alone",
        ),
        (
            {"num_epochs": 1, "num_update_steps_per_epoch": 9},
            "num_epochs is 1, .* 9 and total_steps 100.*length of the run.*total_steps alone",
        ),
        ({"total_steps": 0}, "total_steps is 0.*at least 1.*fewer checkpoints"),
        (
            {"total_steps": 3, "num_checkpoints": 3},
            "total_steps is 3.*at least 4 .*num_checkpoints=3.*fewer checkpoints",
        ),
        ({"num_checkpoints": 0}, "num_checkpoints is 0.*at least 1"),
        ({"decay_phase_ratio": 1.2}, "decay_phase_ratio is 1.2.*between 0 and 1"),
        ({"lr_min": 2}, "lr_min is 2.*between 0 and 1.*fraction"),
        (
            {"lr_min": 0, "use_inverse_sqrt_decay": False},
            "lr_min is 0.*above 0 .*1e-6.*use_inverse_sqrt_decay=True",
        ),
        ({"num_warmup_steps": 91}, "num_warmup_steps is 91.*between 0 and 90.*fewer updates"),
        (
            {"num_warmup_steps": 5, "warmup_starting_lr": 2},
            "warmup_starting_lr is 2.*between 0 and .* 0.1.*num_warmup_steps=0",
        ),
    ],
)
def test_a_wrong_argument_is_reported_before_the_optimizer_is_touched(arguments, message):
    optimizer = optimizer_of_rates(0.1)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(ConfigurationError, match=message):
        WSDLrScheduler(optimizer, **{"total_steps": 100, **arguments})
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before
