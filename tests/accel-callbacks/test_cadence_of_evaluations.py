"""When a run evaluates, on which sets, and that whoever watches a metric acts on every evaluation."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    EarlyStoppingCallback,
    MetricsCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
from tiny import Drawing, tiny_data, tiny_network, tiny_trainer, weights_of

SETS = {"": tiny_data(13), "shifted": tiny_data(7)}


class KilledError(Exception):
    """Stands for a process that ends in the middle of something."""


class Kill(TrainerCallback):
    """Fails at the n-th end of an evaluation of one set."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KilledError


class SaveBetweenSets(TrainerCallback):
    """Saves whenever one set of an evaluation at the end of an epoch is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def on_eval_epoch_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        if not is_intermediate and "ema" not in metric_prefix:
            self.number += 1
            trainer.save_training_state(self.folder / str(self.number))


class Evaluations(TrainerCallback):
    """Counts the evaluations that are told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        self.told.append((metric_prefix, trainer.run_progress.updates_completed))


def noisy_trainer(*callbacks: Any) -> Trainer:
    """Dropout draws random numbers in training, so anything that an evaluation draws would be seen."""
    model = nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(0.3), tiny_network())
    return tiny_trainer(callbacks=callbacks, model=model)


def run(*callbacks: Any, epochs: int = 4, eval_dataset: Any = SETS, **kwargs: Any) -> Trainer:
    trainer = noisy_trainer(*callbacks)
    # Five updates an epoch.
    trainer.train(tiny_data(20), epochs, eval_dataset, 4, **kwargs)
    return trainer


def places(trainer: Trainer, name: str) -> list[tuple[int, int]]:
    return [(r["epoch"], r["update"]) for r in trainer.run_history.to_records() if r["name"] == name]


def test_each_set_records_every_metric_under_its_name() -> None:
    accuracy = MetricsCallback({"accuracy": MulticlassAccuracy(2).double()})
    trainer = run(accuracy, StepBasedEvaluationCallback(5), ModelEmaCallback(save_path=None), epochs=1)
    kinds = ("", "intermediate_", "ema_model_")
    for start, kind in itertools.product(("", "shifted_"), kinds):
        for name in (f"{start}{kind}eval_loss_epoch", f"{start}{kind}accuracy"):
            assert places(trainer, name) == [(1, 5)], name
    assert "eval_dataset['shifted']: TensorDataset, 7 samples" in trainer.describe()


def test_named_sets_equal_separate_evaluations_and_have_arguments_of_their_own() -> None:
    trainer = run(epochs=1, eval_per_device_batch_size={"shifted": 3})
    sizes = {name: loader.batch_size for name, loader in trainer.eval_dataloaders.items()}
    assert sizes == {"": 4, "shifted": 3}
    together = trainer.evaluate({"far": tiny_data(7), "near": tiny_data(13)}, {"far": 3, "near": 4})
    alone = [trainer.evaluate(tiny_data(7), 3), trainer.evaluate(tiny_data(13), 4)]
    assert list(together) == ["far_evaluation_loss", "near_evaluation_loss"]
    assert list(together.values()) == [each["evaluation_loss"] for each in alone]
    assert list(trainer.evaluate()) == ["evaluation_loss", "shifted_evaluation_loss"]


@pytest.mark.parametrize(
    ("dataset", "parts"),
    [
        ([tiny_data(5), tiny_data(3)], ("eval_dataset is a list of 2", "dictionary", "ConcatDataset")),
        ({}, ("eval_dataset is empty", "{'': main")),
        ({1: tiny_data(3)}, ("the name 1", "strings")),
        ({"x": torch.ones(3, 5)}, ("eval_dataset['x'] is a Tensor", "TensorDataset")),
        ({"far": tiny_data(3), "near": 5}, ("eval_dataset['near'] is 5",)),
        *(
            ({name: tiny_data(3)}, (f"the name {name!r}", f"{name}_set"))
            for name in ("train", "eval", "intermediate", "ema_model", "evaluation", "far_intermediate")
        ),
    ],
)
def test_sets_that_cannot_be_told_apart_are_refused_before_the_run(dataset: Any, parts: Any) -> None:
    trainer = noisy_trainer()
    with pytest.raises(ConfigurationError) as raised:
        trainer.train(tiny_data(20), 1, dataset)
    assert all(part in str(raised.value) for part in parts), raised.value
    assert trainer.run_progress.updates_completed == 0


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"eval_per_device_batch_size": {"shifte": 3}}, ("'shifte'", "['', 'shifted']", "Did you mean")),
        ({"eval_per_device_batch_size": {"shifted": 0}}, ("eval_per_device_batch_size['shifted'] is 0",)),
        ({"eval_dataloader_kwargs": {"other": {"num_workers": 0}}}, ("'other'", "['', 'shifted']")),
        ({"eval_every_n_epochs": 0}, ("eval_every_n_epochs is 0", "Use 1")),
        ({"eval_at_start": 1}, ("eval_at_start is 1",)),
        ({"eval_at_start": True, "eval_dataset": None}, ("eval_at_start is True", "eval_dataset")),
        (
            {
                "scheduler_step_every": "evaluation",
                "eval_dataset": None,
                "create_scheduler_fn": functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1),
            },
            ("scheduler_step_every is 'evaluation'", "eval_dataset"),
        ),
        (
            {"eval_dataset": {"far": tiny_data(3)}, "create_scheduler_fn": ReduceLROnPlateau},
            ("scheduler_metric is 'eval_loss_epoch'", "far_eval_loss_epoch"),
        ),
    ],
)
def test_arguments_of_evaluations_are_checked(kwargs: dict[str, Any], parts: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        run(epochs=1, **kwargs)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_without_a_main_set_a_watched_plain_loss_is_refused_with_its_name(tmp_path: Path) -> None:
    best = SaveBestModelCallback(tmp_path / "best.pt")
    with pytest.raises(ConfigurationError, match="watch_metric='far_eval_loss_epoch'"):
        run(best, eval_dataset={"far": tiny_data(3)})


def test_two_sets_and_metrics_of_one_name_are_refused() -> None:
    metrics = {"accuracy": MulticlassAccuracy(2), "shifted_accuracy": MulticlassAccuracy(2)}
    with pytest.raises(ConfigurationError, match="'shifted_accuracy'"):
        run(MetricsCallback(metrics))


def test_every_nth_epoch_and_the_last_are_evaluated_and_the_start_if_wanted() -> None:
    told = Evaluations()
    trainer = run(told, epochs=5, eval_every_n_epochs=2, eval_at_start=True)
    expected = [(0, 0), (2, 10), (4, 20), (5, 25)]
    assert places(trainer, "eval_loss_epoch") == places(trainer, "shifted_eval_loss_epoch") == expected
    assert told.told == [("eval", update) for _, update in expected]
    cut = noisy_trainer()
    cut.train(tiny_data(20), None, SETS, 4, 7, eval_every_n_epochs=5)
    assert places(cut, "eval_loss_epoch") == [(2, 7)]


def test_a_later_stage_evaluates_its_start_under_what_is_completed() -> None:
    trainer = run(epochs=1, eval_at_start=True)
    trainer.train(tiny_data(20), 1, SETS, 4, reset_run_history=False, eval_at_start=True)
    assert places(trainer, "eval_loss_epoch") == [(0, 0), (1, 5), (1, 5), (2, 10)]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"eval_every_n_epochs": 3},
        {"eval_at_start": True},
        {"eval_dataset": None},
        {"eval_dataset": Drawing(13)},
    ],
)
def test_training_is_the_same_to_the_bit_however_often_is_evaluated(kwargs: dict[str, Any]) -> None:
    plain, other = (
        run(),
        run(StepBasedEvaluationCallback(2, Drawing(5)), **{"eval_dataset": SETS, **kwargs})
        if (kwargs.get("eval_dataset", SETS) is not None)
        else run(**kwargs),
    )
    assert torch.equal(weights_of(plain), weights_of(other))
    losses = [trainer.run_history.get_metric_values("train_loss_epoch") for trainer in (plain, other)]
    assert losses[0] == losses[1]


def test_a_set_of_its_own_is_evaluated_in_mid_epoch() -> None:
    trainer = run(StepBasedEvaluationCallback(2, {"far": tiny_data(9)}), eval_dataset=None, epochs=1)
    assert places(trainer, "far_intermediate_eval_loss_epoch") == [(1, 2), (1, 4)]
    with pytest.raises(ConfigurationError, match="eval_dataset is a list of 2"):
        StepBasedEvaluationCallback(2, [tiny_data(3), tiny_data(3)])


def test_the_best_model_and_early_stopping_follow_evaluations_in_mid_epoch(tmp_path: Path) -> None:
    name = "intermediate_eval_loss_epoch"
    best = SaveBestModelCallback(tmp_path / "best.pt", name, load_saved_checkpoint=False)
    trainer = tiny_trainer(callbacks=[StepBasedEvaluationCallback(1), best], lr=3.0)
    history = trainer.train(tiny_data(40), 1, tiny_data(13), 4)
    values = history.get_metric_values(name)
    assert min(values) != values[-1]
    assert best.best_metric == min(values)
    assert best.exported[0]["update"] == 1 + values.index(min(values))

    stop = EarlyStoppingCallback(2, 0.0, name, greater_is_better=True)
    trainer = tiny_trainer(callbacks=[StepBasedEvaluationCallback(1), stop])
    trainer.train(tiny_data(40), 1, tiny_data(13), 4)
    assert "2 evaluations" in str(trainer.stop_reason)
    assert trainer.run_progress.updates_completed < 10


def test_the_start_counts_for_watchers() -> None:
    stop = EarlyStoppingCallback(1, 0.0, greater_is_better=True)
    trainer = run(stop, eval_at_start=True)
    assert trainer.run_progress.epochs_completed == 1
    assert stop.best_metric == trainer.run_history.get_metric_values("eval_loss_epoch")[0]


def test_no_run_stops_early_before_min_epochs_are_completed() -> None:
    stop = EarlyStoppingCallback(1, 0.0, greater_is_better=True, min_epochs=3)
    trainer = run(stop, epochs=6)
    assert trainer.run_progress.epochs_completed == 3
    with pytest.raises(ConfigurationError, match="min_epochs is -1"):
        EarlyStoppingCallback(min_epochs=-1)


class Told(ReduceLROnPlateau):
    """Keeps the values by which it has stepped."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, patience=0, factor=0.5)
        self.values: list[float] = []

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.values.append(metrics)
        super().step(metrics)


@pytest.mark.parametrize(
    ("step_every", "metric"),
    [
        ("evaluation", "eval_loss_epoch"),
        ("evaluation", "intermediate_eval_loss_epoch"),
        ("evaluation", "ema_model_eval_loss_epoch"),
        ("evaluation", "shifted_eval_loss_epoch"),
        ("epoch", "ema_model_eval_loss_epoch"),
        ("epoch", "eval_loss_epoch"),
    ],
)
def test_a_plateau_schedule_steps_once_by_every_value(step_every: str, metric: str) -> None:
    callbacks = [StepBasedEvaluationCallback(5), ModelEmaCallback(save_path=None)]
    trainer = run(
        *callbacks,
        eval_every_n_epochs=2,
        create_scheduler_fn=Told,
        scheduler_step_every=step_every,
        scheduler_metric=metric,
    )
    # The last mid-epoch evaluation and that of the epoch stand at the same update.
    assert trainer.scheduler.values == trainer.run_history.get_metric_values(metric)
    assert len(trainer.scheduler.values) == (4 if "intermediate" in metric else 2)


def table_run(folder: Path, name: str, *more: Any, **kwargs: Any) -> Trainer:
    """All that watches, on both sets, at a cadence of its own."""
    watched = "shifted_intermediate_eval_loss_epoch"
    callbacks = [
        StepBasedEvaluationCallback(2),
        ModelEmaCallback(save_path=None),
        SaveBestModelCallback(folder / f"{name}.pt", watched, load_saved_checkpoint=False),
        EarlyStoppingCallback(50, 0.0, watched),
        SaveTrainingStateCallback(folder / name, save_every_n_epochs=None, save_every_n_updates=1),
    ]
    return run(
        *callbacks,
        *more,
        epochs=3,
        eval_every_n_epochs=2,
        eval_at_start=True,
        create_scheduler_fn=Told,
        scheduler_step_every="evaluation",
        scheduler_metric="intermediate_eval_loss_epoch",
        **kwargs,
    )


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4, 5, 7, 9, 11, 13, 15, 19])
def test_a_run_killed_within_an_evaluation_has_the_history_of_the_undisturbed_one(
    at: int, tmp_path: Path
) -> None:
    whole = table_run(tmp_path, "whole")
    with pytest.raises(KilledError):
        table_run(tmp_path, "killed", Kill(at))
    resumed = table_run(tmp_path, "killed", resume_from=latest_checkpoint(tmp_path / "killed"))
    assert resumed.run_history.to_records() == whole.run_history.to_records()
    assert torch.equal(weights_of(resumed), weights_of(whole))
    for one, other in zip(whole.callbacks, resumed.callbacks, strict=False):
        if isinstance(one, (SaveBestModelCallback, EarlyStoppingCallback)):
            # Each run has an identity of its own, which stands in what it exports.
            assert one.watched.state_dict() == other.watched.state_dict()
            assert one.best_metric == other.best_metric


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_a_state_from_between_two_sets_goes_on_with_the_second(number: int, tmp_path: Path) -> None:
    whole = run(SaveBetweenSets(tmp_path), epochs=3, eval_at_start=False)
    resumed = run(epochs=3, resume_from=tmp_path / str(number))
    assert resumed.run_history.to_records() == whole.run_history.to_records()


class SaveAtEnds(TrainerCallback):
    """Saves when all callbacks before it know of the end of an evaluation."""

    order = 2000

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def on_evaluation_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self.number += 1
        trainer.save_training_state(self.folder / str(self.number))


@pytest.mark.parametrize("metric", ["eval_loss_epoch", "ema_model_intermediate_eval_loss_epoch"])
def test_a_state_from_the_end_of_an_evaluation_goes_on_behind_it(metric: str, tmp_path: Path) -> None:
    """Its metrics were recorded, by averages too; a scheduler that follows it has not stepped yet."""

    def table(*more: Any, **kwargs: Any) -> Trainer:
        average = ModelEmaCallback(save_path=None, evaluate_in_mid_epoch=True)
        schedule = {
            "create_scheduler_fn": Told,
            "scheduler_step_every": "evaluation",
            "scheduler_metric": metric,
        }
        callbacks = (StepBasedEvaluationCallback(2), average, EarlyStoppingCallback(50, 0.0), *more)
        return run(*callbacks, epochs=2, eval_at_start=True, **schedule, **kwargs)

    whole = table(saver := SaveAtEnds(tmp_path))
    assert saver.number == 8
    for number in range(1, 9):
        resumed = table(resume_from=tmp_path / str(number))
        assert resumed.run_history.to_records() == whole.run_history.to_records(), number
        assert resumed.scheduler.state_dict() | {"values": 0} == whole.scheduler.state_dict() | {"values": 0}
        assert torch.equal(weights_of(resumed), weights_of(whole)), number
        best = [
            each.best_metric for each in (*whole.callbacks, *resumed.callbacks) if hasattr(each, "min_epochs")
        ]
        assert best[0] == best[1]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_state_from_between_two_sets_of_the_start_goes_on_with_the_second(
    number: int, tmp_path: Path
) -> None:
    def stopping() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(50, 0.0, greater_is_better=True)

    whole = run(first := stopping(), SaveBetweenSets(tmp_path), epochs=1, eval_at_start=True)
    resumed = run(second := stopping(), epochs=1, eval_at_start=True, resume_from=tmp_path / str(number))
    assert resumed.run_history.to_records() == whole.run_history.to_records()
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("number_of_sets", [1, 2])
def test_no_state_is_saved_in_an_evaluation_of_another_model(number_of_sets: int, tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_eval_epoch_end(self, trainer: Trainer, metric_prefix: str, **kwargs: Any) -> None:
            if "ema_model" in metric_prefix:
                trainer.save_training_state(tmp_path / "state")

    sets = dict(list(SETS.items())[:number_of_sets])
    with pytest.raises(ConfigurationError, match=r"evaluation of another model.*on_evaluation_end"):
        run(ModelEmaCallback(save_path=None), Save(), eval_dataset=sets)
    # What the error advises.
    run(ModelEmaCallback(save_path=None), SaveAtEnds(tmp_path), eval_dataset=sets, epochs=1)


def test_no_state_is_saved_between_two_sets_in_mid_epoch(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
            trainer.save_training_state(tmp_path / "state")

    with pytest.raises(ConfigurationError, match=r"between two sets.*on_evaluation_end"):
        run(StepBasedEvaluationCallback(2), Save())


def test_what_an_error_about_evaluate_in_a_run_advises_works() -> None:
    other = tiny_data(9)

    class Evaluate(TrainerCallback):
        message = ""

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            try:
                trainer.evaluate(other)
            except ConfigurationError as error:
                self.message = str(error)
            trainer.run_eval_epoch(other, metric_prefix="other", is_intermediate=True)

    callback = Evaluate()
    trainer = run(callback, epochs=1)
    assert "run_eval_epoch(dataset, metric_prefix='other', is_intermediate=True)" in callback.message
    assert places(trainer, "other_loss_epoch") == [(1, update) for update in range(1, 6)]
    last = trainer.run_history.get_latest_metric("other_loss_epoch")
    assert last == trainer.evaluate(other, 4)["evaluation_loss"]
