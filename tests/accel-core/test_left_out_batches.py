"""A collate function that returns None leaves a batch out: it keeps its place and weighs nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, default_collate

from accel_core import ConfigurationError, Trainer
from tiny import SaveAt, Seen, Stream, largest_difference, tiny_data, tiny_network, tiny_trainer, weights_of

SAMPLES = list(tiny_data(24))
IN_ORDER = {"shuffle": False, "num_workers": 0}
KINDS = ["map", "stream", "ready batches"]


def readable(samples: list[Any]) -> Any:
    kept = [sample for sample in samples if sample is not None]
    return default_collate(kept) if kept else None


def without(bad: set[int]) -> list[Any]:
    return [None if index in bad else sample for index, sample in enumerate(SAMPLES)]


class OwnLoader:
    """Ready batches, some of which are None."""

    batch_size = 4

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return (readable(self.samples[first : first + 4]) for first in range(0, len(self.samples), 4))


def arguments_of(kind: str, bad: set[int]) -> dict[str, Any]:
    """What `train` is given to read `SAMPLES` in their order, without those that are bad."""
    if kind == "ready batches":
        return {"train_dataset": OwnLoader(without(bad))}
    data = without(bad) if kind == "map" else Stream(without(bad))
    loader = IN_ORDER if kind == "map" else {"num_workers": 0}
    return {
        "train_dataset": data,
        "collate_fn": readable,
        "train_dataloader_kwargs": loader,
        "per_device_batch_size": 4,
    }


def by_hand(bad: set[int], steps: int, num_epochs: int = 2) -> tuple[torch.Tensor, list[float], int]:
    """Weights, losses and updates without any sample of a loop in which None is passed over."""
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, skipped = [], 0
    for _ in range(num_epochs):
        total = count = 0.0
        for first in range(0, len(SAMPLES), 4 * steps):
            kept = [sample for sample in without(bad)[first : first + 4 * steps] if sample is not None]
            if not kept:
                skipped += 1
                continue
            inputs, targets = default_collate(kept)
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(kept)
            count += len(kept)
        losses.append(total / count if count else float("nan"))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses, skipped


def train(kind: str, bad: set[int], steps: int, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=kwargs.pop("callbacks", ()))
    trainer.train(num_epochs=2, gradient_accumulation_steps=steps, **{**arguments_of(kind, bad), **kwargs})
    return trainer


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(batches=st.sets(st.integers(0, 5)), single=st.sets(st.integers(0, 23)), steps=st.integers(1, 4))
def test_any_batches_may_be_none(kind: str, batches: set[int], single: set[int], steps: int) -> None:
    bad = {index for index in range(24) if index // 4 in batches} | single
    weights, losses, skipped = by_hand(bad, steps)
    trainer = train(kind, bad, steps)
    assert float((weights_of(trainer) - weights).abs().max()) < 1e-14
    assert trainer.run_history.get_metric_values("train_loss_epoch") == pytest.approx(
        losses, rel=1e-12, nan_ok=True
    )
    progress = trainer.run_progress
    assert (progress.updates_completed, progress.updates_skipped) == (2 * -(-6 // steps), skipped)


BAD = {4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 22, 23}
"""The second batch, the last two, and a sample of the third."""


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_and_predict_go_on_after_none(kind: str) -> None:
    arguments = arguments_of(kind, BAD)
    data = arguments["train_dataset"]
    kwargs = {} if kind == "ready batches" else {"per_device_batch_size": 4, "collate_fn": readable}
    inputs, targets = default_collate([sample for sample in without(BAD) if sample is not None])
    model = tiny_network()
    found = tiny_trainer().evaluate(data, **kwargs)
    assert found["evaluation_loss"] == pytest.approx(
        F.cross_entropy(model(inputs), targets).item(), rel=1e-12
    )
    predicted = tiny_trainer().predict(data, **kwargs)
    assert torch.allclose(predicted, model(inputs), rtol=0, atol=1e-15)


def test_predicting_nothing_but_none_is_an_error_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match=r"All 6 batches .*None.*nothing to predict.*collate"):
        tiny_trainer().predict(without(set(range(24))), 4, collate_fn=readable)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_left_out_is_printed_for_each_epoch_and_evaluation(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {} if kind == "ready batches" else {"eval_dataset": without({0, 1, 2, 3})}
    train(kind, BAD, 1, **kwargs)
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if "3 batches" in line and "None" in line]) == 2
    in_evaluation = [line for line in printed if "1 batch" in line and "None" in line]
    assert len(in_evaluation) == (0 if kind == "ready batches" else 2)
    train(kind, set(), 1)
    assert "None" not in capsys.readouterr().out


def test_callbacks_hear_nothing_of_a_batch_that_is_left_out() -> None:
    seen = Seen()
    train("map", BAD, 1, callbacks=[seen])
    kept = [float(sample[0][0]) for sample in without(BAD) if sample is not None]
    assert seen.samples == kept * 2


@pytest.mark.parametrize("kind", ["map", "stream"])
@pytest.mark.parametrize("update", [1, 2, 3])
def test_a_run_resumes_to_the_bit_beside_batches_that_were_left_out(
    tmp_path: Path, kind: str, update: int
) -> None:
    straight = train(kind, BAD, 2, callbacks=[SaveAt(update, tmp_path / "state")])
    resumed = train(kind, BAD, 2, resume_from=tmp_path / "state")
    assert largest_difference(straight, resumed) == 0
    assert resumed.run_history.get_metric_values(
        "train_loss_epoch"
    ) == straight.run_history.get_metric_values("train_loss_epoch")
    assert resumed.run_progress == straight.run_progress


def test_a_scheduler_does_not_step_where_the_optimizer_does_not() -> None:
    rates = []
    for bad in ({4, 5, 6, 7}, set()):
        trainer = tiny_trainer()
        trainer.train(
            num_epochs=1,
            create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(
                optimizer, gamma=0.5
            ),
            **arguments_of("map", bad),
        )
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.1 * 0.5**5, 0.1 * 0.5**6]


@pytest.mark.parametrize("method", ["calculate_train_batch_loss", "calculate_eval_batch_loss"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_step_that_returns_none_gets_a_sentence_whenever_it_happens(method: str, step: int) -> None:
    calls = []

    def forgets(self: Trainer, batch: Any) -> Any:
        calls.append(batch)
        return None if len(calls) == step else getattr(Trainer, method)(self, batch)

    trainer = tiny_trainer(type("Forgetful", (Trainer,), {method: forgets}))
    with pytest.raises(
        ConfigurationError,
        match=rf"{method} returned None.*dictionary.*'loss', 'model_outputs' and 'batch_size'",
    ):
        trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data())


def test_workers_leave_out_batches_too() -> None:
    class Data(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(without(BAD))

    weights, losses, _ = by_hand(BAD, 2)
    for data, kwargs in ((without(BAD), {"shuffle": False}), (Data(), {})):
        trainer = tiny_trainer()
        trainer.train(
            DataLoader(data, batch_size=4, collate_fn=readable, num_workers=1, **kwargs),  # type: ignore[arg-type]
            num_epochs=2,
            gradient_accumulation_steps=2,
        )
        assert float((weights_of(trainer) - weights).abs().max()) < 1e-14
        assert trainer.run_history.get_metric_values("train_loss_epoch") == pytest.approx(losses, rel=1e-12)


def test_a_model_with_batch_norm_and_dropout_is_left_alone_by_what_is_left_out() -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()

    trained = []
    for data in (without({8, 9, 10, 11}), SAMPLES[:8] + SAMPLES[12:]):
        trainer = tiny_trainer(model=model())
        trainer.train(
            data, num_epochs=2, per_device_batch_size=4, collate_fn=readable, train_dataloader_kwargs=IN_ORDER
        )
        trained.append(trainer.model.state_dict())
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
