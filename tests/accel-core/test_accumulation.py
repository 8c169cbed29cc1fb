"""Gradient accumulation on one process: the update and the logged loss are those of the one big batch."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import IterableDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback
from tiny import CountsTargets, largest_difference, tiny_data, tiny_network, tiny_trainer, weights_of

SPLITS = [(12, 1), (6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
"""Batch size and steps of an update of 12 samples. Of 37 the last window has one sample; of 23 its last batch is smaller."""


def train_in_parts(batch_size: int, steps: int, data: Any = None, **kwargs: Any) -> Trainer:
    run = {name: kwargs.pop(name) for name in ("collate_fn", "num_epochs") if name in kwargs}
    trainer = tiny_trainer(**kwargs)
    arguments = {
        "num_epochs": 2,
        "per_device_batch_size": batch_size,
        "gradient_accumulation_steps": steps,
        **run,
    }
    trainer.train(tiny_data() if data is None else data, **arguments)
    return trainer


def logged_loss(trainer: Trainer) -> list[float]:
    return trainer.run_history.get_metric_values("train_loss_epoch")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("num_samples", [37, 23])
def test_every_split_gives_the_weights_of_the_big_batch(
    num_samples: int, dtype: torch.dtype, tolerance: float
) -> None:
    data = tiny_data(num_samples, dtype)
    whole = train_in_parts(12, 1, data, model=tiny_network(dtype))
    for batch_size, steps in SPLITS[1:]:
        parts = train_in_parts(batch_size, steps, data, model=tiny_network(dtype))
        assert largest_difference(whole, parts) < tolerance
        assert parts.run_progress.updates_completed == whole.run_progress.updates_completed


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(1, 40), batch_size=st.integers(1, 7), steps=st.integers(1, 9))
def test_any_split_of_any_data_gives_the_weights_of_the_big_batch(
    num_samples: int, batch_size: int, steps: int
) -> None:
    data = tiny_data(num_samples)
    whole = train_in_parts(batch_size * steps, 1, data, num_epochs=1)
    parts = train_in_parts(batch_size, steps, data, num_epochs=1)
    assert largest_difference(whole, parts) < 1e-14
    assert logged_loss(parts) == pytest.approx(logged_loss(whole), rel=1e-14)


def test_every_split_of_a_stream_gives_the_weights_of_the_big_batch() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(tiny_data())

    whole = train_in_parts(12, 1, Stream())
    for batch_size, steps in SPLITS[1:]:
        assert largest_difference(whole, train_in_parts(batch_size, steps, Stream())) < 1e-14


class TokenTrainer(Trainer):
    """Samples of 0 to 19 tokens, with a loss that is the mean over all tokens of the batch."""

    how = "int"

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0])
        tokens = (batch[0][:, 0].abs() * 10).long()
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        num_items = tokens.sum()
        counted = {
            "int": int(num_items),
            "float": float(num_items),
            "tensor": num_items,
            "tensor of shape (1,)": num_items.reshape(1),
            "float tensor": num_items.float(),
        }
        loss = (losses * tokens).sum() / num_items.clamp(min=1)
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(tokens),
            "num_items_in_batch": counted[self.how],
            "log": {"tokens": num_items.double()},
        }


@pytest.mark.parametrize("how", ["int", "float", "tensor", "tensor of shape (1,)", "float tensor"])
def test_losses_per_token_weigh_each_token_alike(how: str) -> None:
    """Also batches without any token, which weigh nothing."""
    trainer_class = type("CountingTrainer", (TokenTrainer,), {"how": how})
    whole = train_in_parts(12, 1, trainer_class=trainer_class)
    for batch_size, steps in SPLITS[1:]:
        parts = train_in_parts(batch_size, steps, trainer_class=trainer_class)
        assert largest_difference(whole, parts) < 1e-14
        assert logged_loss(parts) == pytest.approx(logged_loss(whole), rel=1e-12)


def test_an_update_without_any_token_is_an_error_that_says_what_to_leave_out() -> None:
    class EmptyTrainer(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            return {**super().calculate_train_batch_loss(batch), "num_items_in_batch": 0}

    with pytest.raises(
        ConfigurationError, match=r" 0 items, .*at least one.*Leave out samples.*num_items_in_batch above 0"
    ):
        train_in_parts(2, 3, trainer_class=EmptyTrainer)


def drop_some(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unreadable samples are left out; here those with a small first number."""
    kept = [sample for sample in samples if sample[0][0] > -1.0] or samples[:1]
    return torch.stack([sample[0] for sample in kept]), torch.stack([sample[1] for sample in kept])


class MeanOfTheUpdate(TrainerCallback):
    """Compares the gradient of each update with that of the mean over all samples that were there."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.differences: list[float] = []
        self.sizes: list[int] = []

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.batches.append(batch)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        inputs, targets = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        self.batches.clear()
        self.sizes.append(len(inputs))
        parameters = list(trainer.model.parameters())
        loss = nn.functional.cross_entropy(trainer.model(inputs), targets)
        pairs = zip(torch.autograd.grad(loss, parameters), parameters, strict=True)
        self.differences.append(max(float((wanted - has.grad).abs().max()) for wanted, has in pairs))


@pytest.mark.parametrize(("batch_size", "steps"), SPLITS)
def test_a_collate_function_that_drops_samples_leaves_the_mean_over_those_that_are_there(
    batch_size: int, steps: int
) -> None:
    compared = MeanOfTheUpdate()
    train_in_parts(batch_size, steps, trainer_class=CountsTargets, collate_fn=drop_some, callbacks=[compared])
    assert len(compared.differences) == 8
    assert max(compared.differences) < 1e-14
    if batch_size > 1:
        assert sum(compared.sizes) < 2 * 37, "nothing was dropped"


def test_a_loss_module_with_parameters_is_weighted_like_the_model() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs * self.scale, targets, reduction="none")

    class LossTokens(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            tokens = batch[0][:, 0].abs() + 0.1
            losses = self.loss_func(self.model(batch[0]), batch[1])  # type: ignore[misc]
            loss = (losses * tokens).sum() / tokens.sum()
            return {
                "loss": loss,
                "model_outputs": None,
                "batch_size": len(tokens),
                "num_items_in_batch": tokens.sum().detach(),
            }

    scales = []
    for batch_size, steps in SPLITS:
        model, temperature = tiny_network(), Temperature()
        optimizer = torch.optim.SGD([*model.parameters(), *temperature.parameters()], lr=0.1)
        trainer = LossTokens(model, temperature, optimizer, callbacks=[], seed=3)
        trainer.train(
            tiny_data(), num_epochs=2, per_device_batch_size=batch_size, gradient_accumulation_steps=steps
        )
        scales.append(temperature.scale.item())
    assert scales == pytest.approx([scales[0]] * len(SPLITS), rel=1e-13)
    assert scales[0] != 1.0


def test_the_logged_loss_is_the_mean_over_all_samples_whatever_the_split() -> None:
    """The model does not learn here, so that the loss of the epoch can be computed by hand."""
    inputs, targets = tiny_data().tensors
    by_hand = nn.functional.cross_entropy(tiny_network()(inputs), targets).item()
    for batch_size, steps in [*SPLITS, (5, 3)]:
        trainer = train_in_parts(batch_size, steps, lr=0.0)
        assert logged_loss(trainer) == pytest.approx([by_hand, by_hand], rel=1e-14)


def test_further_logged_values_are_weighted_like_the_loss() -> None:
    tokens = (tiny_data().tensors[0][:, 0].abs() * 10).long().double()
    trainer = train_in_parts(1, 4, trainer_class=TokenTrainer)
    expected = float((tokens * tokens).sum() / tokens.sum())
    assert trainer.run_history.get_latest_metric("train_tokens_epoch") == pytest.approx(expected)


@pytest.mark.parametrize("how", ["int", "tensor"])
def test_bfloat16_with_counts_far_from_the_plan_trains_like_the_big_batch(how: str) -> None:
    trainer_class = type("CountingTrainer", (TokenTrainer,), {"how": how})
    start = torch.cat(
        [parameter.flatten() for parameter in tiny_network(torch.float32).parameters()]
    ).detach()
    changes = []
    for batch_size, steps in SPLITS:
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model, data = tiny_network(torch.float32), tiny_data(dtype=torch.float32)
        trainer = train_in_parts(
            batch_size, steps, data, model=model, trainer_class=trainer_class, accelerator=accelerator
        )
        changes.append(weights_of(trainer) - start)
    assert float(changes[0].norm()) > 0.1
    for change in changes[1:]:
        assert float((change - changes[0]).norm() / changes[0].norm()) < 0.02


def test_a_model_in_bfloat16_trains_with_counts() -> None:
    model, data = tiny_network(torch.bfloat16), tiny_data(dtype=torch.bfloat16)
    trainer = train_in_parts(4, 3, data, num_epochs=4, model=model, trainer_class=TokenTrainer)
    losses = logged_loss(trainer)
    assert losses[-1] < losses[0]


def test_counts_are_scaled_by_the_plan_before_backward() -> None:
    """Backward starts from the loss times about one, not times the samples of the update, which float16 cannot hold."""
    started_from: list[float] = []

    class Watching(Trainer):
        def backward_step(self, loss: torch.Tensor) -> None:
            started_from.append(loss.item())
            super().backward_step(loss)

    train_in_parts(2, 6, trainer_class=Watching, num_epochs=1)
    assert max(started_from) < 1.0
    one_by_one = tiny_trainer(Watching)
    started_from.clear()
    one_by_one.train(tiny_data(), num_epochs=1, per_device_batch_size=1, gradient_accumulation_steps=37)
    losses = sum(started_from)
    assert losses == pytest.approx(one_by_one.run_history.get_latest_metric("train_loss_epoch"))
