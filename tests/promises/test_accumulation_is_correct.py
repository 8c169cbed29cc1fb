"""Promise 4: an update is that of the one big batch, on any number of processes, and the logged loss is the loss."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_core import Trainer
from case_runner import compare, run_as_script
from tiny import Stream, tiny_data, tiny_network

UPDATE = 24
"""Samples of a full update. Each of the sizes leaves a short window or a smaller last batch, or fewer samples than processes."""
SIZES = (61, 37, 13, 2, 1)


class Tokens(Trainer):
    """A loss that is the mean over the tokens of a batch; samples have 0 to 19."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0])
        tokens = (batch[0][:, 0].abs() * 10).long()
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        loss = (losses * tokens).sum() / tokens.sum().clamp(min=1)
        output = {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(tokens),
            "num_items_in_batch": int(tokens.sum()),
        }
        return {**output, "log": {"tokens": tokens.sum()}}


class TensorTokens(Tokens):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "num_items_in_batch": torch.tensor(output["num_items_in_batch"])}


class CountedTokens(Tokens):
    def count_items(self, batch: Any) -> int:
        return int((batch[0][:, 0].abs() * 10).long().sum())


def collate(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves out what cannot be read: here samples with a small first number."""
    kept = [sample for sample in samples if sample[0][0] > -1.0] or samples[:1]
    return torch.stack([sample[0] for sample in kept]), torch.stack([sample[1] for sample in kept])


def train(
    trainer_class: type[Trainer],
    data: Any,
    batch_size: int,
    steps: int | None = None,
    dtype: Any = torch.float64,
    **kwargs: Any,
) -> Any:
    """Weights and history after two epochs. Without `steps`, as many as an update of `UPDATE` samples has."""
    accelerator = Accelerator(cpu=True)
    steps = UPDATE // (batch_size * accelerator.num_processes) if steps is None else steps
    model = tiny_network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_class(
        model, nn.functional.cross_entropy, optimizer, callbacks=[], accelerator=accelerator, seed=3
    )
    arguments = {
        "num_epochs": 2,
        "per_device_batch_size": batch_size,
        "gradient_accumulation_steps": steps,
        **kwargs,
    }
    history = trainer.train(data, **arguments)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {
        "weights": weights,
        "updates": trainer.run_progress.updates_completed,
        "history": {name: history.get_metric_values(name) for name in sorted(history.get_metric_names())},
    }


def all_sizes(trainer_class: type[Trainer] = Trainer, steps: int | None = None) -> Any:
    return lambda batch_size: [
        train(trainer_class, tiny_data(size), batch_size, steps) for size in SIZES[:-2]
    ]


def few_samples(batch_size: int) -> Any:
    return [train(Trainer, tiny_data(size), batch_size) for size in SIZES[-2:]]


def streams(batch_size: int) -> Any:
    return [train(Trainer, Stream(tiny_data(size)), batch_size) for size in SIZES[:-2]]


def in_float32(batch_size: int) -> Any:
    return [
        train(Trainer, tiny_data(size, torch.float32), batch_size, dtype=torch.float32) for size in SIZES[:-2]
    ]


CASES = {
    "samples": all_sizes(),
    "single steps": all_sizes(steps=1),
    "tokens": all_sizes(Tokens),
    "tokens as tensors": all_sizes(TensorTokens),
    "tokens counted ahead": all_sizes(CountedTokens),
    "few samples": few_samples,
    "streams": streams,
    "float32": in_float32,
}


class MeanOfTheUpdate(Trainer):
    """Compares each update with the gradient of the mean over all samples that were there, on all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inputs: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.largest_difference = 0.0

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.inputs.append(batch[0].clone())
        self.targets.append(batch[1].clone())
        return {**super().calculate_train_batch_loss(batch), "batch_size": len(batch[1])}

    def clip_gradients(self) -> None:
        inputs, targets = self.gather(torch.cat(self.inputs)), self.gather(torch.cat(self.targets))
        self.inputs, self.targets = [], []
        model = self.get_model()
        parameters = list(model.parameters())
        wanted = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), parameters)
        for gradient, parameter in zip(wanted, parameters, strict=True):
            assert parameter.grad is not None
            difference = float((gradient - parameter.grad).abs().max())
            self.largest_difference = max(self.largest_difference, difference)


def dropped(batch_size: int) -> float:
    """A collate function that drops samples: what is there depends on the split, so each update is checked by itself."""
    accelerator, model = Accelerator(cpu=True), tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = MeanOfTheUpdate(
        model, nn.functional.cross_entropy, optimizer, callbacks=[], accelerator=accelerator, seed=3
    )
    arguments = {"per_device_batch_size": batch_size, "gradient_accumulation_steps": 3, "collate_fn": collate}
    trainer.train(tiny_data(61), num_epochs=2, **arguments)  # type: ignore[arg-type]
    assert trainer.run_progress.updates_completed >= 4
    return trainer.largest_difference


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return compare({**CASES, "dropped": dropped}, __file__, 2, tmp_path_factory.mktemp("cases"))


def assert_equal(results: list[Any], expected: list[Any], tolerance: float) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert result["updates"] == wanted["updates"]
        assert float((result["weights"] - wanted["weights"]).abs().max()) < tolerance
        assert result["history"].keys() == wanted["history"].keys()
        for name, values in result["history"].items():
            if name == "train_loss_epoch":
                assert values == pytest.approx(
                    wanted["history"][name], rel=1e-6 if tolerance > 1e-9 else 1e-12
                )


BIG_BATCHES = {
    "samples": (Trainer, tiny_data, torch.float64, 1e-14),
    "tokens": (Tokens, tiny_data, torch.float64, 1e-14),
    "tokens as tensors": (Tokens, tiny_data, torch.float64, 1e-14),
    "tokens counted ahead": (Tokens, tiny_data, torch.float64, 1e-14),
    "streams": (Trainer, lambda size: Stream(tiny_data(size)), torch.float64, 1e-14),
    "float32": (Trainer, lambda size: tiny_data(size, torch.float32), torch.float32, 1e-6),
}


@pytest.mark.parametrize("case", BIG_BATCHES)
def test_an_update_of_two_processes_is_that_of_one_big_batch_on_one(outcome: Any, case: str) -> None:
    trainer_class, data, dtype, tolerance = BIG_BATCHES[case]
    expected = [train(trainer_class, data(size), UPDATE, 1, dtype) for size in SIZES[:-2]]  # type: ignore[operator]
    for results in outcome.of(case):
        assert_equal(results, expected, tolerance)


@pytest.mark.parametrize("case", ["samples", "single steps", "tokens", "few samples"])
def test_two_processes_train_like_one_with_the_global_batch(outcome: Any, case: str) -> None:
    """Also where the second process has fewer samples than the first, or none in the whole epoch."""
    for results in outcome.of(case):
        assert_equal(results, outcome.alone(case), 1e-14)


def test_both_processes_hold_the_same_weights(outcome: Any) -> None:
    for case in CASES:
        for one, other in zip(*outcome.of(case), strict=True):
            assert torch.equal(one["weights"], other["weights"])


def test_a_collate_function_that_drops_samples_leaves_the_mean_over_those_that_are_there(
    outcome: Any,
) -> None:
    assert max(outcome.of("dropped")) < 1e-14


if __name__ == "__main__":
    run_as_script({**CASES, "dropped": dropped})
