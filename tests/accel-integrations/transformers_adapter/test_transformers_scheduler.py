"""Schedules of transformers, planned by the trainer, equal those built by hand."""

from typing import Any

import pytest
import torch
import transformers

from accel_core import ConfigurationError, Trainer, TrainerCallback, TrainerPlaceholderValues
from accel_integrations.transformers_adapter import transformers_scheduler_fn
from tiny import Rates, Stream, tiny_data, tiny_trainer, weights_of

NEEDS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
STEPPING = [
    kind.value for kind in transformers.SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")
]
NUM_UPDATES = 20


def train(create_scheduler_fn: Any, **kwargs: Any) -> list[float]:
    """Two epochs of ten updates."""
    rates = Rates()
    tiny_trainer(callbacks=[rates]).train(
        tiny_data(39), 2, tiny_data(8), 4, create_scheduler_fn=create_scheduler_fn, **kwargs
    )
    return rates.of_first_group


@pytest.mark.parametrize("name", STEPPING)
def test_rates_equal_those_of_a_schedule_that_was_planned_by_hand(name: str) -> None:
    kwargs = NEEDS.get(name, {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = transformers.get_scheduler(
        name, optimizer, 3, NUM_UPDATES, scheduler_specific_kwargs=dict(kwargs)
    )
    expected = []
    for _ in range(NUM_UPDATES):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert train(transformers_scheduler_fn(name, num_warmup_steps=3, **kwargs)) == expected
    assert name == "constant" or len(set(expected)) > 3


@pytest.mark.parametrize("warmup", [0.11, 2.2, TrainerPlaceholderValues.NUM_UPDATE_STEPS * 0.11, 3])
def test_a_share_of_the_run_is_rounded_up_to_whole_updates(warmup: Any) -> None:
    assert train(transformers_scheduler_fn("linear", warmup)) == train(transformers_scheduler_fn("linear", 3))


def test_a_share_that_is_a_whole_number_of_updates_is_not_rounded_up() -> None:
    rates = Rates()
    trainer = tiny_trainer(callbacks=[rates])
    trainer.train(
        tiny_data(70), 1, None, 1, create_scheduler_fn=transformers_scheduler_fn("constant_with_warmup", 0.1)
    )
    assert rates.of_first_group.index(0.1) == 7


def test_placeholders_may_be_arguments_of_the_schedule() -> None:
    decay = TrainerPlaceholderValues.NUM_UPDATE_STEPS // 5
    by_hand = transformers_scheduler_fn("warmup_stable_decay", 3, num_decay_steps=4)
    assert train(transformers_scheduler_fn("warmup_stable_decay", 3, num_decay_steps=decay)) == train(by_hand)


def test_accumulation_does_not_make_it_faster() -> None:
    rates = train(transformers_scheduler_fn("linear"), gradient_accumulation_steps=2)
    assert len(rates) == 10
    assert rates == pytest.approx([0.1 * (10 - n) / 10 for n in range(10)])


def test_a_schedule_without_an_end_needs_no_length_of_the_data() -> None:
    rates = Rates()
    create = transformers_scheduler_fn("constant_with_warmup", 2)
    tiny_trainer(callbacks=[rates]).train(Stream(tiny_data(12)), 1, None, 4, create_scheduler_fn=create)
    assert rates.of_first_group == pytest.approx([0.0, 0.05, 0.1])


def test_reducing_on_a_plateau_is_given_the_metric_of_each_epoch() -> None:
    """The loss of an evaluation that falls by less than the threshold is a plateau."""
    create = transformers_scheduler_fn(
        "reduce_lr_on_plateau", patience=0, threshold=10.0, threshold_mode="abs", factor=0.5
    )
    rates = Rates()
    trainer: Trainer = tiny_trainer(callbacks=[rates])
    trainer.train(tiny_data(4), 4, tiny_data(8), 4, create_scheduler_fn=create)
    assert rates.of_first_group == [0.1, 0.1, 0.05, 0.025]


def test_the_greedy_schedule_is_given_the_metric_of_each_epoch() -> None:
    trainer = tiny_trainer()
    create = transformers_scheduler_fn("greedy", patience=0)
    trainer.train(tiny_data(12), 4, None, 4, create_scheduler_fn=create, scheduler_metric="train_loss_epoch")
    assert trainer.scheduler.best == min(trainer.run_history.get_metric_values("train_loss_epoch"))


def test_it_resumes_in_mid_epoch(tmp_path: Any) -> None:
    class Saving(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Any) -> None:
            if trainer.run_progress.updates_completed == 13:
                trainer.save_training_state(tmp_path / "state")

    create = transformers_scheduler_fn("cosine", num_warmup_steps=0.2)
    straight, resumed = tiny_trainer(callbacks=[Saving()]), tiny_trainer()
    straight.train(tiny_data(39), 2, None, 4, create_scheduler_fn=create)
    resumed.train(tiny_data(39), 2, None, 4, create_scheduler_fn=create, resume_from=tmp_path / "state")
    assert torch.equal(weights_of(straight), weights_of(resumed))


def test_what_cannot_be_built_is_reported() -> None:
    with pytest.raises(ConfigurationError, match=r"name is 'cosin'.*Did you mean 'cosine'"):
        transformers_scheduler_fn("cosin")
    with pytest.raises(ConfigurationError, match=r"num_warmup_steps is -1.*at least 0.*Use 0.1 "):
        transformers_scheduler_fn("linear", num_warmup_steps=-1)
    with pytest.raises(ConfigurationError, match=r"num_training_steps is 0.*at least 1.*Leave it out"):
        transformers_scheduler_fn("linear", num_training_steps=0)
    with pytest.raises(TypeError, match=r"argument 'cycles'\ncreate_scheduler_fn .*Pass "):
        train(transformers_scheduler_fn("cosine", cycles=3))
