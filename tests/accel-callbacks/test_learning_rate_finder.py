"""The range test: rates, losses, the suggestion and the picture. What it leaves as it is: test_trial.py."""

import math
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from accel_callbacks import LearningRateRange, find_learning_rate
from accel_core import ConfigurationError
from tiny import tiny_data, tiny_network, tiny_trainer, weights_of


def range_of(losses: list[float]) -> LearningRateRange:
    """A finished test with rates from 1e-5 on, ten times as high at each update."""
    rates = [10.0 ** (place - 5) for place in range(len(losses))]
    records = [
        {"learning_rate": r, "loss": x, "smoothed_loss": x} for r, x in zip(rates, losses, strict=True)
    ]
    return LearningRateRange(records)  # type: ignore[arg-type]


def test_rates_rise_by_the_same_factor_from_the_first_to_the_last_update() -> None:
    records = find_learning_rate(tiny_trainer(), tiny_data(), min_lr=1e-4, max_lr=1e-1, num_updates=7).records
    rates = [record["learning_rate"] for record in records]
    assert rates == pytest.approx([1e-4 * 10 ** (place / 2) for place in range(7)])


def test_each_update_is_made_with_its_own_rate_and_its_loss_is_that_before_it() -> None:
    """Against plain PyTorch, with one batch that holds all the data."""
    data, model = tiny_data(16), tiny_network()
    inputs, targets = data.tensors
    expected = []
    for rate in (0.01, 0.1, 1.0):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    records = find_learning_rate(tiny_trainer(), data, 16, min_lr=0.01, max_lr=1.0, num_updates=3).records
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-12)


def test_the_smoothed_loss_is_corrected_for_its_beginning() -> None:
    records = find_learning_rate(tiny_trainer(), tiny_data(), num_updates=3).records
    losses = [record["loss"] for record in records]
    assert records[0]["smoothed_loss"] == pytest.approx(losses[0])
    second = (0.9 * 0.1 * losses[0] + 0.1 * losses[1]) / (1 - 0.9**2)
    assert records[1]["smoothed_loss"] == pytest.approx(second)


def test_groups_of_parameters_keep_the_ratio_of_their_rates() -> None:
    model, seen = tiny_network(), []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append([float(group["lr"]) for group in self.param_groups])
            return super().step(closure)

    groups = [
        {"params": model[0].parameters(), "lr": 0.001},
        {"params": model[2].parameters(), "lr": torch.tensor(0.1)},
    ]
    trainer = tiny_trainer(model=model)
    trainer.optimizer = Noting(groups, lr=0.1)
    records = find_learning_rate(trainer, tiny_data(), min_lr=1e-3, max_lr=1e-1, num_updates=3).records
    assert seen == [
        pytest.approx([record["learning_rate"] / 100, record["learning_rate"]]) for record in records
    ]
    assert [float(group["lr"]) for group in trainer.optimizer.param_groups] == pytest.approx([0.001, 0.1])


def test_accumulation_makes_one_record_an_update() -> None:
    whole = find_learning_rate(tiny_trainer(), tiny_data(32), 16, num_updates=4, max_lr=0.1)
    parts = find_learning_rate(
        tiny_trainer(), tiny_data(32), 4, num_updates=4, max_lr=0.1, gradient_accumulation_steps=4
    )
    assert [r["loss"] for r in parts.records] == pytest.approx([r["loss"] for r in whole.records])


@pytest.mark.parametrize("max_lr", [1e4, 1e200])
def test_the_test_ends_when_training_fails(max_lr: float) -> None:
    records = find_learning_rate(
        tiny_trainer(), tiny_data(), min_lr=1e-3, max_lr=max_lr, num_updates=60
    ).records
    assert 2 < len(records) < 60
    assert all(math.isfinite(record["loss"]) for record in records)


def test_the_suggestion_is_where_the_loss_falls_the_fastest() -> None:
    assert range_of([1.0, 0.95, 0.8, 0.4, 0.35, 5.0]).suggestion == 1e-3
    assert range_of([1.0, 1.0, 0.9, 0.85, 0.5, 9.0, 1.0]).suggestion == 1e-2


def test_a_single_noisy_batch_is_not_taken_for_the_fastest_fall() -> None:
    found = range_of([1.4, 1.0, *[1.0] * 18, *[1.0 - 0.04 * number for number in range(20)], 5.0])
    places = [record["learning_rate"] for record in found.records]
    assert 20 < places.index(found.suggestion) < 40


def test_training_with_the_suggestion_learns() -> None:
    trainer = tiny_trainer(lr=1e-9)
    found = find_learning_rate(trainer, tiny_data(), min_lr=1e-4)
    for group in trainer.optimizer.param_groups:
        group["lr"] = found.suggestion
    losses = trainer.train(tiny_data(), num_epochs=5).get_metric_values("train_loss_epoch")
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("losses", [[1.0, 1.1, 1.2, 5.0], [1.0, 1.0, 1.0], [1.0]])
def test_without_a_fall_there_is_no_suggestion_but_a_picture(losses: list[float]) -> None:
    found = range_of(losses)
    with pytest.raises(
        ConfigurationError, match=r"loss did not fall.* 1e-05 to .*plot\(path\).*another min_lr"
    ):
        _ = found.suggestion
    assert found.plot().axes[0].get_title(loc="left") == "The loss did not fall"


def test_the_picture_has_a_logarithmic_axis_and_the_suggestion(tmp_path: Any) -> None:
    found = range_of([1.0, 0.95, 0.8, 0.4, 0.35, 500.0])
    figure = found.plot(tmp_path / "report" / "rates.png")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["loss of each update", "smoothed loss", "suggestion: 0.001, where it falls fastest"]
    assert axes.get_ylim()[1] < 2, "the last losses do not press the rest to a line"
    assert imread(tmp_path / "report" / "rates.png").std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_lr": 0}, "min_lr is 0.*above 0.*Use 1e-7"),
        ({"min_lr": 1.0, "max_lr": 0.1}, r"min_lr is 1\.0, max_lr 0\.1.*min_lr .*below max_lr.*defaults"),
        ({"num_updates": 2}, "num_updates 2.*num_updates at least 3.*Leave them out"),
        ({"stop_factor": 1}, "stop_factor 1 .*stop_factor above 1.*Leave them out"),
        ({"per_device_batch_size": 0}, "per_device_batch_size is 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments: dict[str, Any], match: str) -> None:
    trainer = tiny_trainer()
    before = weights_of(trainer)
    with pytest.raises(ConfigurationError, match=match):
        find_learning_rate(trainer, tiny_data(), **arguments)
    assert torch.equal(weights_of(trainer), before)
