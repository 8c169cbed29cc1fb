"""Numbers of numpy and torch, as tables and searches of hyper-parameters give them, become Python's where they enter."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_callbacks
from accel_core import LimitBatchesCallback, Trainer, TrainerPlaceholderValues
from accel_integrations.schedulers import CosineLrScheduler, WSDLrScheduler
from tiny import largest_difference, optimizer_of_rates, tiny_data, tiny_trainer, values_of

PLAIN = {
    "num_epochs": 2,
    "per_device_batch_size": 4,
    "max_num_train_steps": 5,
    "gradient_accumulation_steps": 2,
    "gradient_clip_value": 0.5,
    "gradient_clip_norm": 0.25,
    "eval_per_device_batch_size": 3,
    "reset_run_history": True,
    "seed_each_sample": False,
}
WHOLE = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, np.array, torch.tensor]
REAL = [np.float16, np.float32, np.float64, np.array, torch.tensor]


def kinds_of(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [np.bool_]
    return WHOLE if isinstance(value, int) else REAL


def train(arguments: dict[str, Any], **kwargs: Any) -> Trainer:
    trainer = tiny_trainer()
    trainer.train(tiny_data(), eval_dataset=tiny_data(9), **{**arguments, **kwargs})
    return trainer


@pytest.mark.parametrize("name", PLAIN)
def test_a_run_of_other_numbers_is_that_of_pythons_and_saves(name: str, tmp_path: Path) -> None:
    plain = train(PLAIN)
    for number, kind in enumerate(kinds_of(PLAIN[name])):
        trainer = train({**PLAIN, name: kind(PLAIN[name])})
        assert largest_difference(plain, trainer) == 0
        assert trainer.run_config == plain.run_config
        assert type(trainer.run_config.to_dict().get(name, 1)) in (int, float, bool, type(None))
        trainer.save_training_state(tmp_path / str(number))
        json.dumps(trainer.run_config.to_dict())
        resumed = train({**PLAIN, name: kind(PLAIN[name])}, resume_from=tmp_path / str(number))
        assert largest_difference(plain, resumed) == 0


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_mixture_of_numbers_trains(data: st.DataObject) -> None:
    given_values = {
        name: data.draw(st.sampled_from([type(value), *kinds_of(value)]))(value)
        for name, value in PLAIN.items()
    }
    assert largest_difference(train(PLAIN), train(given_values)) == 0


def test_loaders_evaluations_predictions_and_seeds_take_them() -> None:
    loader = {"batch_size": np.int64(4), "num_workers": np.int64(0), "drop_last": np.bool_(False)}
    plain = train(
        {"num_epochs": 1}, train_dataloader_kwargs={"batch_size": 4, "num_workers": 0, "drop_last": False}
    )
    other = train({"num_epochs": 1}, train_dataloader_kwargs=loader, eval_dataloader_kwargs=loader)
    assert largest_difference(plain, other) == 0
    by_four = plain.evaluate(tiny_data(9), 4)
    assert other.evaluate(tiny_data(9), np.int64(4)) == by_four  # type: ignore[arg-type]
    assert other.evaluate(tiny_data(9), dataloader_kwargs=loader) == by_four
    assert len(other.predict(tiny_data(9), np.uint8(4), loader)) == 9  # type: ignore[arg-type]
    trainer = tiny_trainer(seed=np.int64(3))  # type: ignore[arg-type]
    assert type(trainer.seed) is int


class Settings:
    """What a callback or a scheduler keeps of its arguments."""

    def __init__(self, build: Any, **expected: Any) -> None:
        self.build = build
        self.expected = expected


CALLBACKS = {
    "early": Settings(
        lambda: accel_callbacks.EarlyStoppingCallback(np.int64(3), np.float32(0.5)),
        early_stopping_patience=3,
        early_stopping_threshold=0.5,
    ),
    "saver": Settings(
        lambda: accel_callbacks.SaveTrainingStateCallback(
            save_every_n_updates=np.int64(3), keep_last=np.int64(2), keep_best=np.int8(1)
        ),
        keep_last=2,
        keep_best=1,
    ),
    "ema": Settings(lambda: accel_callbacks.ModelEmaCallback(decay=np.float64(0.5)), decay=0.5),
    "time": Settings(lambda: accel_callbacks.MaxTimeCallback(np.float32(0.5)), minutes=0.5),
    "statistics": Settings(
        lambda: accel_callbacks.TrainingStatisticsCallback(np.int64(7)), record_every_n_updates=7
    ),
    "limit": Settings(lambda: LimitBatchesCallback(np.int64(7)), num_batches=7),
    "periods": Settings(
        lambda: accel_callbacks.StepBasedEvaluationCallback(np.int64(7)).periodic,
        epochs=None,
        updates=7,
        minutes=None,
    ),
    "tracker": Settings(
        lambda: accel_callbacks.TrackerCallback("tensorboard", "p", log_every_n_updates=np.int64(7)),
        log_every_n_updates=7,
    ),
    "cosine": Settings(
        lambda: CosineLrScheduler(
            optimizer_of_rates(0.1),
            np.int64(3),
            np.int64(10),
            lr_min=np.float64(0.0),
            num_warmup_epochs=np.float64(0.5),
        ),
        total_updates=30,
        num_warmup_updates=5,
        lr_min=0.0,
    ),
    "stable": Settings(
        lambda: WSDLrScheduler(
            optimizer_of_rates(0.1),
            total_steps=np.int64(30),
            num_warmup_steps=np.float64(2.0),
            num_checkpoints=np.int64(2),
        ),
        total_steps=30,
        num_warmup_steps=2,
        num_checkpoints=2,
    ),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_and_schedulers_keep_numbers_of_python(name: str) -> None:
    built = CALLBACKS[name].build()
    for attribute, value in CALLBACKS[name].expected.items():
        found = getattr(built, attribute)
        assert found == value
        assert type(found) is type(value), attribute
    for value in getattr(built, "state_dict", dict)().values():
        assert not isinstance(value, np.generic)


def test_an_unfreezing_schedule_takes_them() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2)).double()
    callback = accel_callbacks.UnfreezeCallback({np.int64(2): {np.int64(-2): np.float32(0.25)}})
    trainer = tiny_trainer(model=model, callbacks=[callback])
    trainer.train(tiny_data(), num_epochs=2)
    assert values_of(trainer.optimizer) == [0.1, 0.25]
    assert all(type(rate) is float for rate in values_of(trainer.optimizer))


def test_schedulers_of_torch_get_numbers_of_python() -> None:
    """`OneCycleLR` refuses any other."""
    scheduler_fn = partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=np.float64(0.3),
        total_steps=np.int64(20),
        base_momentum=0.5,
    )
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=2, create_scheduler_fn=scheduler_fn)
    assert type(trainer.scheduler.total_steps) is int


def test_placeholders_reckon_with_them_on_either_side() -> None:
    epochs = TrainerPlaceholderValues.NUM_EPOCHS
    for expression in (
        np.float64(0.5) * epochs,
        epochs * np.int64(2),
        np.int64(2) + epochs,
        epochs // np.int32(2),
    ):
        assert type(expression) is type(epochs)
        assert "np." not in repr(expression)
