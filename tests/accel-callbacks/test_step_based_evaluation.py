"""Evaluations in mid-epoch: when, under which names, and that training does not notice them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback, SaveTrainingStateCallback, StepBasedEvaluationCallback
from accel_core import ConfigurationError, LimitBatchesCallback, Trainer, TrainerCallback
from case_runner import run_as_script
from tiny import Drawing, tiny_data, tiny_network, tiny_trainer


def accuracy() -> MetricsCallback:
    return MetricsCallback({"accuracy": MulticlassAccuracy(2, average="micro").double()}, on="both")


def train(*callbacks: Any, dataset: Any = None, epochs: int = 2, **kwargs: Any) -> Trainer:
    """Ten updates an epoch on one process, with dropout, batch norm and a schedule."""
    model = nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(0.3), tiny_network())
    trainer = tiny_trainer(callbacks=[accuracy(), *callbacks], model=model)

    def create_scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    kwargs = {
        "eval_dataset": tiny_data(13),
        "per_device_batch_size": 4,
        "create_scheduler_fn": create_scheduler,
        **kwargs,
    }
    trainer.train(tiny_data(40) if dataset is None else dataset, num_epochs=epochs, **kwargs)
    return trainer


def intermediate(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        record for record in trainer.run_history.to_records() if record["name"].startswith("intermediate_")
    ]


def others(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        record
        for record in trainer.run_history.to_records()
        if not record["name"].startswith("intermediate_")
    ]


def test_every_n_updates_of_the_run_it_records_under_names_of_its_own() -> None:
    trainer = train(StepBasedEvaluationCallback(4))
    found = [(record["name"], record["epoch"], record["update"]) for record in intermediate(trainer)]
    expected = [(1, 4), (1, 8), (2, 12), (2, 16), (2, 20)]
    names = ("intermediate_eval_loss_epoch", "intermediate_accuracy")
    assert found == [(name, epoch, update) for epoch, update in expected for name in names]
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2


def test_it_evaluates_the_weights_of_the_update() -> None:
    expected = []

    class ByHand(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            other = Trainer(copy.deepcopy(trainer.model), nn.functional.cross_entropy, None, [])
            expected.append(other.evaluate(tiny_data(13), per_device_batch_size=4)["evaluation_loss"])

    trainer = train(StepBasedEvaluationCallback(3), ByHand(), epochs=1)
    assert trainer.run_history.get_metric_values("intermediate_eval_loss_epoch") == expected[2::3]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_lesson_2_training_is_not_changed_by_one_bit(num_workers: int, accumulation: int) -> None:
    """A model left in eval mode would have no dropout; an evaluation within an update would change what it accumulates."""
    outcomes = []
    for callbacks in ((), (StepBasedEvaluationCallback(1),)):
        trainer = train(
            *callbacks,
            dataset=Drawing(40),
            eval_dataset=Drawing(13),
            gradient_accumulation_steps=accumulation,
            train_dataloader_kwargs={"num_workers": num_workers},
            eval_dataloader_kwargs={"num_workers": 0},
        )
        outcomes.append((trainer, torch.get_rng_state()))
    (plain, plain_random), (evaluating, random) = outcomes
    assert len(intermediate(evaluating)) == 2 * 2 * (10 if accumulation == 1 else 4)
    assert others(evaluating) == others(plain)
    assert torch.equal(random, plain_random)
    assert evaluating.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, evaluating.model.state_dict()[name]), name


def test_lesson_3_a_limit_of_evaluations_in_mid_epoch_has_an_effect() -> None:
    batches = {"intermediate_eval": 0, "eval": 0}

    class Counting(TrainerCallback):
        def on_eval_epoch_start(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
            self.prefix = metric_prefix

        def on_eval_step_end(self, trainer: Trainer, batch: Any, batch_output: Any) -> None:
            batches[self.prefix] += 1

    train(
        StepBasedEvaluationCallback(5), LimitBatchesCallback(1, intermediate_only=True), Counting(), epochs=1
    )
    assert batches == {"intermediate_eval": 2, "eval": 4}


@pytest.mark.parametrize("update", [3, 8, 13])
def test_a_resumed_run_goes_on_in_the_same_rhythm(tmp_path: Path, update: int) -> None:
    """The saver is listed before: were it also called before, the state of update 8 would lack the evaluation at 8."""

    class Stopping(TrainerCallback):
        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == update - 1:
                trainer.request_stop("enough")

    def callbacks() -> tuple[Any, ...]:
        return SaveTrainingStateCallback(tmp_path), StepBasedEvaluationCallback(4)

    whole = train(StepBasedEvaluationCallback(4), epochs=3)
    stopped = train(*callbacks(), Stopping(), epochs=3)
    assert stopped.run_progress.updates_completed == update
    resumed = train(*callbacks(), epochs=3, resume_from=tmp_path / f"update_{update:08d}")
    assert resumed.run_history.to_records() == whole.run_history.to_records()


def test_without_data_to_evaluate_on_it_raises_before_training() -> None:
    with pytest.raises(
        ConfigurationError, match=r"StepBasedEvaluationCallback.*Pass an eval_dataset.*leave the callback out"
    ):
        train(StepBasedEvaluationCallback(1), eval_dataset=None)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (0, "is 0.*at least 1.*Use None"),
        (2.5, "is 2.5.*whole number.*Use None"),
        (None, "is None.*whole number.*Leave the callback out"),
    ],
)
def test_a_period_that_is_none_is_reported(every: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"eval_every_n_updates {message}"):
        StepBasedEvaluationCallback(every)


# ---------------------------------------------------------------------- processes


def with_and_without(batch_size: int) -> list[Any]:
    outcomes = []
    for callbacks in ((), (StepBasedEvaluationCallback(2),)):
        trainer = train(*callbacks, dataset=Drawing(40), per_device_batch_size=batch_size)
        outcomes.append((others(trainer), dict(trainer.model.state_dict()), torch.get_rng_state()))
    return outcomes


def records(batch_size: int) -> list[Any]:
    trainer = tiny_trainer(callbacks=[accuracy(), StepBasedEvaluationCallback(2)])
    trainer.train(tiny_data(40), num_epochs=2, eval_dataset=tiny_data(13), per_device_batch_size=batch_size)
    return [(record["name"], record["update"], record["value"]) for record in intermediate(trainer)]


CASES = {"with_and_without": with_and_without, "records": records}


@pytest.mark.slow
def test_training_on_two_processes_is_not_changed_by_one_bit(outcome: Any) -> None:
    for plain, evaluating in outcome.of("with_and_without"):
        assert evaluating[0] == plain[0]
        assert all(torch.equal(value, evaluating[1][name]) for name, value in plain[1].items())
        assert torch.equal(evaluating[2], plain[2])


@pytest.mark.slow
def test_two_processes_record_what_one_does(outcome: Any) -> None:
    alone = outcome.alone("records")
    for found in outcome.of("records"):
        assert [record[:2] for record in found] == [record[:2] for record in alone]
        assert [record[2] for record in found] == pytest.approx([record[2] for record in alone], rel=1e-12)


if __name__ == "__main__":
    run_as_script(CASES)
