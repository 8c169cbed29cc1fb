"""What TrainingStatisticsCallback records. On two processes: test_measuring_on_two_processes.py."""

import math
import time
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from accel_callbacks import (
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
    TrainingStatisticsCallback,
    plot_history,
)
from accel_core import ConfigurationError, InMemoryRunHistory, Trainer, TrainerCallback, latest_checkpoint
from tiny import tiny_data, tiny_network, tiny_trainer, weights_of

TIMES = ("samples_per_second", "updates_per_second", "data_wait_share")


def values_by_update(history: Any, name: str) -> dict[int, float]:
    return {record["update"]: record["value"] for record in history.get_records() if record["name"] == name}


class Slow(Dataset[Any]):
    def __init__(self, seconds: float) -> None:
        self.data, self.seconds = tiny_data(24), seconds

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.seconds)
        return self.data[index]


class SlowStep(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        time.sleep(0.02)
        return super().calculate_train_batch_loss(batch)


def test_all_is_recorded_after_the_first_update_and_every_n_across_epochs() -> None:
    trainer = tiny_trainer(callbacks=[TrainingStatisticsCallback(3)])
    history = trainer.train(tiny_data(40), num_epochs=2, per_device_batch_size=8)
    for name in ("learning_rate", "gradient_norm", *TIMES):
        assert list(values_by_update(history, name)) == [1, 3, 6, 9]


def test_the_rate_is_that_with_which_the_update_was_made() -> None:
    trainer = tiny_trainer(lr=1.0, callbacks=[TrainingStatisticsCallback(1)])
    history = trainer.train(
        tiny_data(24),
        num_epochs=1,
        create_scheduler_fn=lambda optimizer: LambdaLR(optimizer, lambda update: 0.5**update),
    )
    assert values_by_update(history, "learning_rate") == {1: 1.0, 2: 0.5, 3: 0.25}


def test_groups_with_rates_of_their_own_are_named() -> None:
    model = tiny_network()
    layers = [model[0].weight, model[0].bias, model[2].weight, model[2].bias]
    groups = [{"params": [layer]} for layer in layers]
    groups[1]["lr"], groups[2] = 0.2, {**groups[2], "lr": 0.3, "name": "head"}  # type: ignore[list-item]
    trainer = tiny_trainer(model=model, callbacks=[TrainingStatisticsCallback(1)])
    trainer.optimizer = torch.optim.SGD(groups, lr=0.1)
    history = trainer.train(tiny_data(8), num_epochs=1)
    rates = {name: history.get_latest_metric(name) for name in history.get_metric_names() if "rate" in name}
    assert rates == {"learning_rate": 0.1, "learning_rate_1": 0.2, "learning_rate_head": 0.3}
    legend = plot_history(history).axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["first group", "1", "head"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_norm_is_that_of_the_whole_update_before_clipping(accumulation: int) -> None:
    model, data = tiny_network(), tiny_data(16)
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    expected = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in model.parameters()))
    trainer = tiny_trainer(callbacks=[TrainingStatisticsCallback(1)])
    history = trainer.train(
        data,
        num_epochs=1,
        per_device_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        gradient_clip_norm=1e-6,
    )
    assert history.get_metric_values("gradient_norm") == [pytest.approx(expected, rel=1e-10)]


def test_the_norm_of_scaled_and_sparse_gradients_is_that_of_the_gradients() -> None:
    def norm(sparse: bool, scale: float | None) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Flatten(), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        accelerator = Accelerator(cpu=True)
        if scale is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        data = torch.utils.data.TensorDataset(torch.tensor([[0, 1], [1, 1], [3, 1]]), torch.tensor([0, 1, 1]))
        trainer = Trainer(
            model,
            nn.functional.cross_entropy,
            optimizer,
            [TrainingStatisticsCallback(1)],
            accelerator=accelerator,
        )
        return trainer.train(data, num_epochs=1, per_device_batch_size=3).get_latest_metric("gradient_norm")

    plain = norm(sparse=False, scale=None)
    assert norm(sparse=True, scale=None) == pytest.approx(plain)
    assert norm(sparse=False, scale=1024.0) == pytest.approx(plain)


def test_waiting_for_data_is_distinguished_from_computing() -> None:
    def share(trainer_class: type[Trainer], seconds: float) -> float:
        trainer = tiny_trainer(trainer_class, callbacks=[TrainingStatisticsCallback(3)])
        kwargs = {"num_workers": 0}
        history = trainer.train(
            Slow(seconds), num_epochs=1, per_device_batch_size=8, train_dataloader_kwargs=kwargs
        )
        return history.get_latest_metric("data_wait_share")

    assert share(Trainer, 0.005) > 0.8
    assert share(SlowStep, 0.0) < 0.2


@pytest.mark.seconds
def test_speed_counts_training_alone() -> None:
    """Not the evaluations in between, nor what comes between epochs."""

    class SlowBetween(TrainerCallback):
        def on_eval_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            time.sleep(0.2)

        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            time.sleep(0.2)

    callbacks = [TrainingStatisticsCallback(4), StepBasedEvaluationCallback(1), SlowBetween()]
    trainer = tiny_trainer(SlowStep, callbacks=callbacks)
    trainer.train(tiny_data(16), num_epochs=2, eval_dataset=tiny_data(8), per_device_batch_size=8)
    updates = trainer.run_history.get_latest_metric("updates_per_second")
    assert 10 < updates < 50, "an update takes 0.02 seconds, an evaluation 0.2"
    assert trainer.run_history.get_latest_metric("samples_per_second") == pytest.approx(8 * updates)


def test_training_is_the_same_with_and_without() -> None:
    plain, watched = tiny_trainer(), tiny_trainer(callbacks=[TrainingStatisticsCallback(1)])
    for trainer in (plain, watched):
        trainer.train(tiny_data(), num_epochs=2, per_device_batch_size=4, gradient_clip_norm=0.1)
    assert torch.equal(weights_of(plain), weights_of(watched))


@pytest.mark.parametrize("stop_at", [4, 5, 7])
def test_a_resumed_run_records_at_the_same_updates(tmp_path: Any, stop_at: int) -> None:
    class Stops(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == stop_at:
                trainer.request_stop("enough")

    def train(*callbacks: Any, folder: str, resume: bool = False) -> InMemoryRunHistory:
        saver = SaveTrainingStateCallback(tmp_path / folder, save_every_n_updates=1)
        trainer = tiny_trainer(callbacks=[TrainingStatisticsCallback(3), saver, *callbacks])
        resume_from = latest_checkpoint(tmp_path / folder) if resume else None
        trainer.train(tiny_data(40), num_epochs=2, per_device_batch_size=8, resume_from=resume_from)
        return trainer.run_history  # type: ignore[return-value]

    whole = train(folder="whole")
    train(Stops(), folder="stopped")
    resumed = train(folder="stopped", resume=True)

    def without_times(history: InMemoryRunHistory) -> list[Any]:
        return [
            {**record, "value": 0} if record["name"] in TIMES else record for record in history.to_records()
        ]

    assert without_times(resumed) == without_times(whole)


@pytest.mark.parametrize("period", [0, -1, 1.5, None, True])
def test_a_period_that_is_none_is_refused(period: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^record_every_n_updates is .*at least 1.*Use 1 "):
        TrainingStatisticsCallback(period)


def test_tokens_a_second_are_recorded_where_steps_count_more_items_than_samples():
    from tiny import tiny_data, tiny_trainer

    class CountsTokens(Trainer):
        def calculate_train_batch_loss(self, batch):
            output = super().calculate_train_batch_loss(batch)
            return {**output, "num_items_in_batch": torch.tensor(10 * len(batch[0]))}

    for trainer_class, factor in ((CountsTokens, 10), (Trainer, None)):
        trainer = tiny_trainer(trainer_class, callbacks=[TrainingStatisticsCallback(2)])
        history = trainer.train(tiny_data(), num_epochs=1)
        if factor is None:
            assert "tokens_per_second" not in history.get_metric_names()
        else:
            rates = history.get_metric_values("samples_per_second")
            assert history.get_metric_values("tokens_per_second") == pytest.approx(
                [factor * rate for rate in rates]
            )
