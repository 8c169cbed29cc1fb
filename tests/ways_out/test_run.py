"""Each way out that an error of a training run names works: schedules, data, trials.

Loss steps are in `test_run_steps.py`, states in `test_run_states.py`, what needs several processes in `test_run_on_processes.py`.
"""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from accel_callbacks import SaveTrainingStateCallback, find_batch_size
from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues, latest_checkpoint
from accel_integrations.timm_adapter import timm_scheduler_fn
from tiny import Stream, tiny_data, tiny_trainer
from ways_out import (
    DATA,
    PACKAGES,
    Row,
    check_every_error_is_known,
    make_mistake_and_ways_out,
    name_of,
    texts_of_rows,
    train,
    training,
    ways_out_of_checks,
    without,
)

CORE = "accel-core/src/accel_core"
LOSS = nn.functional.cross_entropy
UPDATES = TrainerPlaceholderValues.NUM_UPDATE_STEPS
PER_EPOCH = TrainerPlaceholderValues.NUM_UPDATE_STEPS_PER_EPOCH


# ---------------------------------------------------------------------- schedules


def partial(function: Any, *args: Any, **kwargs: Any) -> Any:
    return functools.partial(function, *args, **kwargs)


def over_another(optimizer: Any) -> Any:
    return StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 1)


def by_epochs(optimizer: Any, num_update_steps_per_epoch: int) -> Any:
    return StepLR(optimizer, num_update_steps_per_epoch)


class ByEpoch:
    """A scheduler that needs the epoch in each step."""

    def __init__(self, optimizer: Any, **kwargs: Any) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None: ...


def one_cycle(total_steps: Any) -> Any:
    return partial(OneCycleLR, max_lr=0.1, total_steps=total_steps)


def stream(**kwargs: Any) -> Trainer:
    return train(data=Stream(DATA), **kwargs)


def half_a_run(total_steps: Any) -> Any:
    """A state in the middle of a run of two epochs, whose schedule has `total_steps`."""
    saver = SaveTrainingStateCallback("checkpoints", save_every_n_updates=4, if_other_run="set_aside")
    train(callbacks=[saver], create_scheduler_fn=one_cycle(total_steps))
    return latest_checkpoint("checkpoints")


def in_a_second_call() -> Trainer:
    trainer = train(create_scheduler_fn=one_cycle(UPDATES), resume_from=half_a_run(4))
    return train(trainer, create_scheduler_fn=one_cycle(UPDATES), reset_run_history=False)


SCHEDULES: tuple[Row, ...] = (
    Row(
        "create_scheduler_fn returned {}, which has no step(). Return a scheduler over the optimizer that",
        lambda: train(create_scheduler_fn=lambda optimizer: optimizer.param_groups),
        (training(create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1)),),
    ),
    Row(
        "over another optimizer than the trainer's, so it would change nothing. Build it over the optimizer",
        lambda: train(create_scheduler_fn=over_another),
        (training(create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1)),),
    ),
    Row(
        "create_scheduler_fn returned a {}, whose step needs the epoch, as those of timm do. Pass",
        lambda: train(create_scheduler_fn=ByEpoch),
        (training(create_scheduler_fn=timm_scheduler_fn("cosine", num_epochs=1)),),
    ),
    Row(
        "The schedule of {} has {} {}, but this run has {}: the step after them would raise {} ({}). {}",
        lambda: train(create_scheduler_fn=one_cycle(2)),
        (training(create_scheduler_fn=one_cycle(UPDATES)),),
    ),
    Row(
        "The schedule of {} has {} {}",
        training(create_scheduler_fn=one_cycle(2), num_epochs=5, scheduler_step_every="epoch"),
        (
            training(
                create_scheduler_fn=one_cycle(TrainerPlaceholderValues.NUM_EPOCHS),
                num_epochs=5,
                scheduler_step_every="epoch",
            ),
        ),
    ),
    Row(
        "The schedule of {} has {} {}",
        lambda: train(num_epochs=2, create_scheduler_fn=one_cycle(UPDATES), resume_from=half_a_run(UPDATES)),
        (in_a_second_call,),
    ),
    Row(
        "{} {} needed{}, but not known in this run, because the data set has no length",
        lambda: stream(create_scheduler_fn=one_cycle(UPDATES)),
        (
            lambda: stream(create_scheduler_fn=one_cycle(4)),
            lambda: stream(create_scheduler_fn=one_cycle(UPDATES), max_num_train_steps=3),
        ),
    ),
    Row(
        "{} {} needed{}",
        lambda: stream(create_scheduler_fn=partial(by_epochs, num_update_steps_per_epoch=PER_EPOCH)),
        (lambda: stream(create_scheduler_fn=partial(by_epochs, num_update_steps_per_epoch=4)),),
    ),
    Row(
        "{} {} needed{}",
        lambda: stream(create_scheduler_fn=partial(StepLR, step_size=PER_EPOCH)),
        (
            lambda: stream(create_scheduler_fn=partial(StepLR, step_size=4)),
            lambda: stream(create_scheduler_fn=partial(StepLR, step_size=UPDATES), max_num_train_steps=3),
        ),
    ),
    Row(
        "{} {} needed{}",
        lambda: train(
            num_epochs=None,
            max_num_train_steps=3,
            data=Stream(DATA),
            create_scheduler_fn=partial(StepLR, step_size=TrainerPlaceholderValues.NUM_EPOCHS),
        ),
        (
            lambda: stream(
                num_epochs=1,
                create_scheduler_fn=partial(StepLR, step_size=TrainerPlaceholderValues.NUM_EPOCHS),
            ),
        ),
    ),
)

# ---------------------------------------------------------------------- the run and its data


class Computed(nn.Module):
    """A layer with an attribute that is computed from its parameter, which torch cannot copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2, dtype=torch.float64)
        self.doubled = self.linear.weight * 2

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(5, 2, dtype=torch.float64))


def trial(model: nn.Module, **kwargs: Any) -> int:
    return find_batch_size(tiny_trainer(model=model), DATA, 4, **kwargs)


def epoch_in(name: str) -> Trainer:
    """The trainer's own method of this name trains an epoch, before it does what it has always done."""

    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.run_train_epoch()
        return getattr(Trainer, name)(self, *args, **kwargs)

    return train(tiny_trainer(type("OwnTrainer", (Trainer,), {name: method})))


def create_scheduler_in(event: str) -> Trainer:
    def act(self: Any, trainer: Trainer) -> None:
        assert isinstance(trainer.create_scheduler(), StepLR)

    callback = type("Creates", (TrainerCallback,), {event: act})
    return train(callbacks=[callback()], create_scheduler_fn=partial(StepLR, step_size=1))


def save_in(event: str) -> Trainer:
    def act(self: Any, trainer: Trainer) -> None:
        trainer.save_training_state(f"state of {trainer.run_id}")

    return train(callbacks=[type("Saves", (TrainerCallback,), {event: act})()])


def sets(**by_name: Any) -> Trainer:
    return train(eval_dataset=by_name.get("sets", {"": DATA, "shifted": DATA}))


RUNS: tuple[Row, ...] = (
    Row(
        "run_card was called before train, which makes a run. Call train first.",
        lambda: tiny_trainer().run_card(),
        (lambda: train().run_card(),),
    ),
    Row(
        "The run has no training data yet. Call run_train_epoch in run_training, which train calls",
        lambda: epoch_in("create_train_dataloader"),
        (lambda: epoch_in("run_training"),),
    ),
    Row(
        "The run has not prepared its model and optimizer yet. Do this in an event after on_prepare_start, such as",
        lambda: create_scheduler_in("on_prepare_start"),
        (lambda: create_scheduler_in("on_training_run_start"),),
    ),
    Row(
        "The run has not prepared its model and optimizer yet. Do this in an event after on_prepare_start, such as",
        lambda: save_in("on_prepare_start"),
        (lambda: save_in("on_training_run_start"),),
    ),
    Row(
        "train_dataset gives no batch: it is empty, or smaller than one batch of all processes with "
        "drop_last=True. Pass more data, a smaller per_device_batch_size, or leave out drop_last.",
        lambda: train(per_device_batch_size=32, train_dataloader_kwargs={"drop_last": True}),
        (
            training(
                data=tiny_data(32), per_device_batch_size=32, train_dataloader_kwargs={"drop_last": True}
            ),
            training(per_device_batch_size=16, train_dataloader_kwargs={"drop_last": True}),
            training(per_device_batch_size=32),
        ),
    ),
    Row(
        "to_dataframe needs the package 'pandas', which is not installed. Install it with: pip install",
        without("pandas", lambda: train().run_history.to_dataframe()),
        (
            lambda: train().run_history.to_dataframe(),
            lambda: train().run_history.to_records(),
            lambda: train().run_history.to_csv("history.csv"),
        ),
    ),
    Row("{} is empty, but must have at least one data set. {}", lambda: sets(sets={}), (sets,)),
    Row("{} has the name {}, but names must be strings. {}", lambda: sets(sets={1: DATA}), (sets,)),
    Row(
        "cannot be copied, but a trial needs a copy: {} Make copy.deepcopy of it work: use parametrizations",
        lambda: trial(Computed()),
        (lambda: trial(parametrized()),),
    ),
)

ROWS = SCHEDULES + RUNS

FACTS = {
    "The optimizer {} exchanges the weights by its train() and eval()": "made with DeepSpeed in test_engines.py",
    "Use the version of accel that wrote it.": "no test has a version that is still to come",
    "the history is at the epoch {}, which is no number": "becomes a CheckpointError about a damaged file",
    "The training state was not saved to '{}' in the background. {}": "the reason, which follows, has the way out",
}
"""Messages that name no way out themselves, and why."""


def test_every_error_of_a_run_has_a_row() -> None:
    beside = [path.relative_to(PACKAGES).as_posix() for path in (PACKAGES / CORE).glob("*.py")]
    parts = [f"{CORE}/run", f"{CORE}/checks", *beside]
    names = (
        "test_checks.py",
        "test_run.py",
        "test_run_steps.py",
        "test_run_states.py",
        "test_run_on_processes.py",
    )
    given = set(ways_out_of_checks(*parts))
    rows = [text for text in texts_of_rows(*names) if text not in given]
    check_every_error_is_known(*parts, rows=rows, facts=FACTS)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_an_error_of_a_run_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
