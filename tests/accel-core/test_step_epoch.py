"""A scheduler that has `step_epoch` besides `step` is stepped after every update, and at the end of every epoch."""

from pathlib import Path
from typing import Any

import pytest

from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer

UPDATES_PER_EPOCH = 3  # of 24 samples in batches of 8


class Noting:
    """Writes down how it is stepped."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.steps: list[Any] = []

    def step(self) -> None:
        self.steps.append("update")

    def step_epoch(self) -> None:
        self.steps.append("epoch")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


class NotingMetric(Noting):
    def step_epoch(self, metric: float) -> None:  # type: ignore[override]
        self.steps.append(metric)


def train(create_scheduler_fn: Any, callbacks: Any = (), **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=callbacks)
    trainer.train(tiny_data(24), 2, create_scheduler_fn=create_scheduler_fn, **kwargs)
    return trainer


@pytest.mark.parametrize("scheduler_step_every", ["update", "epoch"])
@pytest.mark.parametrize("eval_dataset", [None, tiny_data(5)])
def test_it_is_stepped_after_every_update_and_every_epoch(
    scheduler_step_every: str, eval_dataset: Any
) -> None:
    trainer = train(Noting, scheduler_step_every=scheduler_step_every, eval_dataset=eval_dataset)
    assert trainer.scheduler.steps == [*["update"] * UPDATES_PER_EPOCH, "epoch"] * 2


def test_one_whose_step_epoch_needs_a_metric_gets_that_of_the_epoch() -> None:
    trainer = train(NotingMetric, eval_dataset=tiny_data(5))
    losses = trainer.run_history.get_metric_values("eval_loss_epoch")
    updates = ["update"] * UPDATES_PER_EPOCH
    assert trainer.scheduler.steps == [*updates, losses[0], *updates, losses[1]]


def test_a_metric_that_will_not_be_there_is_refused_before_training() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"scheduler_metric is 'eval_loss_epoch'.*NotingMetric.*eval_dataset is None.*scheduler_metric='train_loss_epoch'",
    ):
        train(NotingMetric)


def test_an_epoch_that_is_resumed_before_its_end_is_stepped_once(tmp_path: Path) -> None:
    class SaveAtEachEvent(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == UPDATES_PER_EPOCH:
                trainer.save_training_state(tmp_path / "after the last update")

        def on_eval_epoch_end(self, trainer: Trainer, **_: Any) -> None:
            if trainer.run_progress.epochs_completed == 0:
                trainer.save_training_state(tmp_path / "after the evaluation")

        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.epochs_completed == 1:
                trainer.save_training_state(tmp_path / "after the epoch")

    whole = train(Noting, [SaveAtEachEvent()], eval_dataset=tiny_data(5))
    for name in ("after the last update", "after the evaluation", "after the epoch"):
        resumed = train(Noting, eval_dataset=tiny_data(5), resume_from=tmp_path / name)
        assert resumed.scheduler.steps == whole.scheduler.steps


def test_what_a_factory_says_about_its_arguments_is_passed_on() -> None:
    def refuse(optimizer: Any) -> Any:
        raise ConfigurationError("warmup_t is -1, but must be at least 0. Use 0 for none.")

    with pytest.raises(
        ConfigurationError, match=r"^warmup_t is -1, but must be at least 0. Use 0 for none.$"
    ):
        train(refuse)
