"""Several calls of `train` on many processes: the same order and counts as on one; stages resume to the bit."""

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from accel_callbacks import SaveTrainingStateCallback
from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from case_runner import Outcome, run_as_script, shared_folder
from tiny import ONE_CYCLE, SaveAt, tiny_data, tiny_trainer, weights_of

SIZE = 22
pytestmark = pytest.mark.slow


class Samples(TrainerCallback):
    """Keeps the samples of all processes in each epoch, as a sorted list a step."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        gathered = trainer.gather(torch.tensor(self.own, dtype=torch.float64))
        self.steps.append(sorted(gathered.tolist()))
        self.own = []

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.own: list[float] = []

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.own += batch[0][:, 0].tolist()


def two_stages(batch_size: int, *callbacks: Any, resume_from: Any = None) -> Trainer:
    trainer = tiny_trainer(callbacks=callbacks)
    for keep in (False, True):
        trainer.train(
            tiny_data(SIZE),
            num_epochs=2,
            per_device_batch_size=batch_size,
            create_scheduler_fn=ONE_CYCLE,
            reset_run_history=not keep,
            resume_from=resume_from,
        )
    return trainer


def count_on(batch_size: int) -> Any:
    samples = Samples()
    trainer = two_stages(batch_size, samples)
    records = [(record["epoch"], record["update"]) for record in trainer.run_history.to_records()]
    return samples.steps, records, vars(trainer.run_progress)["order_epoch"]


def resume_in_each_stage(batch_size: int) -> Any:
    """Whether a run that is resumed from either stage ends as the one that saved the states."""
    folder = shared_folder()
    whole = two_stages(batch_size, SaveAt(2, folder / "first"), SaveAt(8, folder / "second"))
    equal = []
    for name in ("first", "second"):
        resumed = two_stages(batch_size, resume_from=folder / name)
        equal.append(
            torch.equal(weights_of(resumed), weights_of(whole))
            and resumed.run_history.to_records() == whole.run_history.to_records()
            and resumed.run_progress == whole.run_progress
        )
    return equal


def refuse_the_folder_of_another_run(batch_size: int) -> Any:
    trainer = tiny_trainer(callbacks=[SaveTrainingStateCallback(shared_folder())])
    trainer.train(tiny_data(SIZE), num_epochs=1, per_device_batch_size=batch_size)
    updates = trainer.run_progress.updates_completed
    with pytest.raises(CheckpointError, match="reset_run_history=False"):
        trainer.train(tiny_data(SIZE), num_epochs=1, per_device_batch_size=batch_size)
    return trainer.run_progress.updates_completed == updates


def refuse_a_schedule_that_is_too_short(batch_size: int) -> Any:
    trainer = tiny_trainer()
    with pytest.raises(ConfigurationError, match="has 2 updates"):
        trainer.train(
            tiny_data(SIZE),
            num_epochs=2,
            per_device_batch_size=batch_size,
            create_scheduler_fn=lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2),
        )
    return trainer.run_progress.updates_completed


CASES = {
    "count_on": count_on,
    "resume_in_each_stage": resume_in_each_stage,
    "refuse_the_folder_of_another_run": refuse_the_folder_of_another_run,
    "refuse_a_schedule_that_is_too_short": refuse_a_schedule_that_is_too_short,
}


def test_order_and_counts_are_those_of_one_process(outcome: Outcome) -> None:
    for result in outcome.of("count_on"):
        assert result == outcome.alone("count_on")


def test_a_run_resumed_from_either_stage_ends_with_the_same_bits(outcome: Outcome) -> None:
    for result in outcome.of("resume_in_each_stage"):
        assert result == [True, True]


def test_the_folder_of_another_run_is_refused_before_the_first_update(outcome: Outcome) -> None:
    assert all(outcome.of("refuse_the_folder_of_another_run"))


def test_a_schedule_that_is_too_short_is_refused_on_all(outcome: Outcome) -> None:
    for updates in outcome.of("refuse_a_schedule_that_is_too_short"):
        assert updates == 0


if __name__ == "__main__":
    run_as_script(CASES)
