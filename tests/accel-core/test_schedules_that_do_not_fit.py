"""Schedules that are shorter or longer than the run, or need a length that is not certain."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset

from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback, TrainerPlaceholderValues
from accel_integrations.schedulers import CosineLrScheduler, WSDLrScheduler
from tiny import Rates, tiny_data, tiny_trainer, weights_of

P = TrainerPlaceholderValues


class Updates(TrainerCallback):
    number = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.number += 1


def table(*rates: float) -> Any:
    """A schedule of the user's own, which has a rate for each update and fails behind the last."""
    return partial(lr_scheduler.LambdaLR, lr_lambda=lambda number: rates[number])


# ---------------------------------------------------------------------- shorter than the run


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=5), 5),
        (table(1.0, 0.5, 0.25, 0.1), 3),
    ],
)
def test_a_schedule_that_would_raise_within_the_run_is_refused_before_it(schedule: Any, steps: int) -> None:
    updates = Updates()
    trainer = tiny_trainer(callbacks=[updates])
    before, rate = weights_of(trainer).clone(), trainer.optimizer.param_groups[0]["lr"]
    with pytest.raises(ConfigurationError, match=rf"has {steps} updates.*has 8.*NUM_UPDATE_STEPS"):
        trainer.train(tiny_data(16), num_epochs=4, create_scheduler_fn=schedule)
    assert updates.number == 0
    assert torch.equal(weights_of(trainer), before)
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    trainer.train(tiny_data(16), max_num_train_steps=steps, create_scheduler_fn=schedule)
    assert updates.number == steps


@settings(max_examples=30, deadline=None)
@given(
    total=st.integers(1, 12),
    epochs=st.integers(1, 5),
    most=st.one_of(st.none(), st.integers(1, 12)),
    each=st.booleans(),
)
def test_a_run_is_refused_just_if_torch_would_raise(
    total: int, epochs: int, most: int | None, each: bool
) -> None:
    schedule = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=total)
    updates = Updates()
    trainer = tiny_trainer(callbacks=[updates])
    arguments: dict[str, Any] = {"num_epochs": epochs, "max_num_train_steps": most}
    num_updates = min(2 * epochs, most or 99)
    steps = num_updates // 2 if each else num_updates

    def run() -> None:
        how = "epoch" if each else "update"
        trainer.train(tiny_data(16), create_scheduler_fn=schedule, scheduler_step_every=how, **arguments)

    if steps > total:
        with pytest.raises(ConfigurationError, match=f"has {total} .*has {steps}"):
            run()
        assert updates.number == 0
    else:
        run()
        assert updates.number == num_updates


def saved_after_two_epochs(folder: Path, schedule: Any) -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), num_epochs=2, create_scheduler_fn=schedule)
    trainer.save_training_state(folder)


def test_resuming_for_more_epochs_than_the_schedule_has_is_refused(tmp_path: Path) -> None:
    schedule = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=P.NUM_UPDATE_STEPS)
    saved_after_two_epochs(tmp_path / "state", schedule)
    updates = Updates()
    trainer = tiny_trainer(callbacks=[updates])
    with pytest.raises(
        ConfigurationError, match=r"has 4 updates.*has 8.*4 updates in all.*reset_run_history=False"
    ):
        trainer.train(tiny_data(16), 4, create_scheduler_fn=schedule, resume_from=tmp_path / "state")
    assert updates.number == 0
    # The way out that the message names.
    trainer = tiny_trainer()
    trainer.train(tiny_data(16), 2, create_scheduler_fn=schedule, resume_from=tmp_path / "state")
    trainer.train(tiny_data(16), 2, create_scheduler_fn=schedule, reset_run_history=False)
    assert trainer.run_progress.updates_completed == 8


# ---------------------------------------------------------------------- climbing again


# torch 2.6 warns about its own SequentialLR.
@pytest.mark.filterwarnings("ignore:The epoch parameter in")
@pytest.mark.parametrize(
    "schedule",
    [
        partial(lr_scheduler.CosineAnnealingLR, T_max=P.NUM_UPDATE_STEPS),
        partial(lr_scheduler.LambdaLR, lr_lambda=lambda number: abs(1 - number / 4) + 0.01),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, total_iters=1), lr_scheduler.CosineAnnealingLR(optimizer, 3)],
            [1],
        ),
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.CosineAnnealingLR(optimizer, 4), lr_scheduler.ConstantLR(optimizer, total_iters=1)],
        ),
    ],
)
def test_resuming_behind_the_plan_of_a_schedule_that_climbs_again_warns(
    schedule: Any, tmp_path: Path
) -> None:
    saved_after_two_epochs(tmp_path / "state", schedule)
    trainer = tiny_trainer()
    with pytest.warns(AccelWarning, match=r"after 4 updates.*has 8.*climb again"):
        trainer.train(tiny_data(16), 4, create_scheduler_fn=schedule, resume_from=tmp_path / "state")
    assert trainer.run_progress.updates_completed == 8


def test_a_new_run_that_is_longer_than_its_cosine_warns_and_names_the_epochs() -> None:
    with pytest.warns(AccelWarning, match=r"after 4 updates.*has 8.*scheduler_step_every='epoch'"):
        tiny_trainer().train(
            tiny_data(16), 4, create_scheduler_fn=partial(lr_scheduler.CosineAnnealingLR, T_max=P.NUM_EPOCHS)
        )


FITTING = {
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=P.NUM_UPDATE_STEPS),
    "warm restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=1, cycle_momentum=False),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=P.NUM_UPDATE_STEPS),
    "steps": partial(lr_scheduler.StepLR, step_size=1),
    "warm-up": partial(lr_scheduler.LinearLR, total_iters=3),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=2),
    "waves": partial(lr_scheduler.LambdaLR, lr_lambda=lambda number: 1 + number % 2),
    "accel's cosine": CosineLrScheduler.create_scheduler_fn(),
    "accel's warm-up, stable, decay": WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_schedule_that_fits_is_left_alone(name: str) -> None:
    """Warnings are errors in tests; trying the schedule beforehand changes no rate."""
    rates = Rates()
    trainer = tiny_trainer(callbacks=[rates])
    trainer.train(tiny_data(16), num_epochs=4, create_scheduler_fn=FITTING[name])

    by_hand = tiny_trainer()
    config = trainer.run_config
    schedule = FITTING[name]
    given = {
        key: part.calculate(config) if hasattr(part, "calculate") else part
        for key, part in schedule.keywords.items()
    }
    scheduler, expected = schedule.func(by_hand.optimizer, **given), []
    for _ in range(8):
        expected.append(by_hand.optimizer.param_groups[0]["lr"])
        by_hand.optimizer.step()
        scheduler.step()
    assert rates.of_first_group == expected


def test_a_step_of_the_users_own_is_not_tried_beforehand() -> None:
    class Loud(lr_scheduler.StepLR):
        steps = 0

        def step(self, *args: Any) -> None:
            Loud.steps += 1
            super().step(*args)

    tiny_trainer().train(tiny_data(16), num_epochs=4, create_scheduler_fn=partial(Loud, step_size=1))
    assert Loud.steps == 8 + 1  # PyTorch's constructor steps once, by `_initial_step` or by `step`.


# ---------------------------------------------------------------------- longer than the run


@pytest.mark.parametrize(
    "schedule",
    [
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30),
        partial(lr_scheduler.CosineAnnealingLR, T_max=30),
    ],
)
def test_a_schedule_that_is_longer_than_the_run_is_logged(schedule: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "accel_core"):
        tiny_trainer().train(tiny_data(16), num_epochs=4, create_scheduler_fn=schedule)
    assert "planned for 30 updates, but the run ends after 8" in caplog.text


# ---------------------------------------------------------------------- lengths that are not certain


class Sharded(IterableDataset[Any]):
    """Ten samples, which the workers divide among themselves."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (tiny_data(10)[index] for index in range(first, 10, step))


ONE_CYCLE_BY_EPOCHS = partial(
    lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=P.NUM_EPOCHS * P.NUM_UPDATE_STEPS_PER_EPOCH
)


def test_a_placeholder_refuses_the_length_of_a_stream_that_workers_divide() -> None:
    trainer = tiny_trainer()
    for schedule in (ONE_CYCLE_BY_EPOCHS, partial(lr_scheduler.StepLR, P.TRAIN_DATALOADER_LEN)):
        with pytest.raises(ConfigurationError, match=r"several workers.*rite the number"):
            trainer.train(
                Sharded(),
                num_epochs=2,
                per_device_batch_size=4,
                train_dataloader_kwargs={"num_workers": 2},
                create_scheduler_fn=schedule,
            )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_of_one_reader_has_the_length_that_it_tells(num_workers: int) -> None:
    trainer = tiny_trainer()
    trainer.train(
        Sharded(),
        num_epochs=2,
        per_device_batch_size=4,
        train_dataloader_kwargs={"num_workers": num_workers},
        create_scheduler_fn=ONE_CYCLE_BY_EPOCHS,
    )
    assert trainer.scheduler.last_epoch == trainer.run_progress.updates_completed == 6


def test_the_error_names_the_call_the_arguments_and_what_to_give() -> None:
    trainer = tiny_trainer()
    arguments: dict[str, Any] = {"per_device_batch_size": 4, "train_dataloader_kwargs": {"num_workers": 2}}
    schedule = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5)
    wanted = (
        r"NUM_UPDATE_STEPS and NUM_UPDATE_STEPS_PER_EPOCH are needed for total_num_epochs, "
        r"num_update_steps_per_epoch of CosineLrScheduler.*give num_update_steps_per_epoch to create_scheduler_fn "
        r"and max_num_train_steps to train"
    )
    with pytest.raises(ConfigurationError, match=wanted):
        trainer.train(Sharded(), num_epochs=2, create_scheduler_fn=schedule, **arguments)
    schedule = CosineLrScheduler.create_scheduler_fn(num_update_steps_per_epoch=4, num_warmup_epochs=0.5)
    trainer.train(Sharded(), max_num_train_steps=8, create_scheduler_fn=schedule, **arguments)
    assert trainer.scheduler.num_updates == trainer.scheduler.total_updates == 8
