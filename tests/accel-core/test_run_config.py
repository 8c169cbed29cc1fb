"""The numbers of a run, derived once."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.run.run_config import plan_updates
from tiny import Stream, tiny_data, tiny_trainer


def config_of(data: Any = None, **kwargs: Any) -> Any:
    trainer = tiny_trainer()
    trainer.train(tiny_data() if data is None else data, **{"max_num_train_steps": 1, **kwargs})
    return trainer.run_config


def test_the_numbers_of_a_run() -> None:
    config = config_of(
        num_epochs=3,
        max_num_train_steps=None,
        per_device_batch_size=4,
        gradient_accumulation_steps=3,
        gradient_clip_value=0.5,
        gradient_clip_norm=2.0,
        eval_dataset=tiny_data(13),
        eval_per_device_batch_size=5,
        train_dataloader_kwargs={"num_workers": 0},
    )
    assert dataclasses.asdict(config) == {
        "num_epochs": 3,
        "train_per_device_batch_size": 4,
        "train_dl_kwargs": {"num_workers": 0},
        "eval_per_device_batch_size": 5,
        "eval_dl_kwargs": None,
        "gradient_accumulation_steps": 3,
        "gradient_clip_value": 0.5,
        "gradient_clip_norm": 2.0,
        "train_total_batch_size": 12,
        "eval_total_batch_size": 5,
        "num_update_steps_per_epoch": 4,
        "max_num_train_steps": 12,
        "num_update_steps": 12,
        "train_dataloader_len": 10,
        "eval_dataloader_len": 3,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "is_distributed": False,
        "mixed_precision": "no",
        "num_processes": 1,
        "seed": 3,
    }


@pytest.mark.parametrize(
    ("epochs", "updates", "expected"),
    [(3, None, (3, 4, 12)), (None, 9, (3, 4, 9)), (3, 9, (3, 4, 9)), (3, 99, (3, 4, 12)), (9, 1, (1, 4, 1))],
)
def test_the_smaller_limit_wins(epochs: int | None, updates: int | None, expected: tuple[int, ...]) -> None:
    """Ten batches an epoch, three in an update: four updates an epoch, the last of one batch."""
    assert plan_updates(10, 3, epochs, updates) == expected


def test_dropping_the_last_batch_is_counted() -> None:
    config = config_of(per_device_batch_size=8, train_dataloader_kwargs={"drop_last": True})
    assert (config.train_dataloader_len, config.num_update_steps_per_epoch) == (4, 4)


def test_what_the_loader_is_told_wins_over_the_batch_size() -> None:
    config = config_of(train_dataloader_kwargs={"batch_size": 5})
    assert (config.train_per_device_batch_size, config.train_dataloader_len) == (5, 8)
    assert config_of(DataLoader(tiny_data(), batch_size=6)).train_per_device_batch_size == 6


def test_a_stream_has_no_number_of_updates_but_that_of_the_limit() -> None:
    config = config_of(Stream(tiny_data()), max_num_train_steps=2)
    assert (config.train_dataloader_len, config.num_update_steps_per_epoch, config.num_update_steps) == (
        None,
        None,
        2,
    )
    config = config_of(Stream(tiny_data()), num_epochs=2, max_num_train_steps=None)
    assert (config.num_epochs, config.num_update_steps) == (2, None)


def test_data_without_a_single_batch_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"train_dataset .*no batch.*per_device_batch_size.*drop_last"
    ):
        config_of(tiny_data(5), per_device_batch_size=8, train_dataloader_kwargs={"drop_last": True})


def test_the_seed_of_the_run_is_the_users_or_that_of_torch() -> None:
    torch.manual_seed(123)
    trainer = tiny_trainer(seed=None)
    trainer.train(tiny_data(), max_num_train_steps=1)
    assert trainer.run_config.seed == 123


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_of().num_epochs = 5


def test_its_dictionary_is_a_copy_that_json_can_hold() -> None:
    config = config_of(train_dataloader_kwargs={"num_workers": 0})
    values = config.to_dict()
    values["train_dl_kwargs"]["num_workers"] = 9
    assert config.train_dl_kwargs == {"num_workers": 0}
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_its_dictionary_leaves_the_samplers_of_the_run_where_they_are() -> None:
    """Lesson A34: it removed them from the live arguments."""
    sampler = SequentialSampler(tiny_data())
    config = config_of(train_dataloader_kwargs={"sampler": sampler})
    assert config.to_dict()["train_dl_kwargs"]["sampler"] is sampler
    assert config.train_dl_kwargs["sampler"] is sampler


def test_there_is_one_after_an_evaluation_alone() -> None:
    """Lesson A34."""
    trainer = tiny_trainer()
    trainer.evaluate(tiny_data(13), per_device_batch_size=5)
    values = trainer.run_config.to_dict()
    assert (values["eval_per_device_batch_size"], values["eval_dataloader_len"]) == (5, 3)
    assert (values["num_epochs"], values["train_per_device_batch_size"]) == (None, None)


def test_an_evaluation_leaves_that_of_training() -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    config = trainer.run_config
    trainer.evaluate(tiny_data(13))
    assert trainer.run_config is config


def test_it_is_there_when_the_run_starts() -> None:
    seen: list[int | None] = []

    class Planning(TrainerCallback):
        def on_training_run_start(self, trainer: Trainer) -> None:
            seen.append(trainer.run_config.num_update_steps)

    tiny_trainer(callbacks=[Planning]).train(tiny_data(), num_epochs=2)
    assert seen == [10]
