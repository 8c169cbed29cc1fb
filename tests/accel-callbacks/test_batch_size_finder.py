"""The largest batch of a step that fits, with out-of-memory simulated at given sizes. What stays as it is: test_trial.py."""

from typing import Any

import pytest
import torch
from torch import nn

from accel_callbacks import BatchSize, find_batch_size
from accel_core import ConfigurationError, Trainer
from tiny import largest_difference, tiny_data, tiny_network, tiny_trainer, weights_of

# What does not fit is followed by a collection of garbage, which takes the longer, the more has been
# imported.
pytestmark = pytest.mark.seconds


class OutOfMemoryInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, most: int) -> torch.Tensor:
        ctx.most = most
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if len(gradients[0]) > ctx.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return gradients[0], None


class Limited(nn.Module):
    """The tiny network on a device that has memory for `most` samples in a step."""

    def __init__(self, most: int, where: str = "forward") -> None:
        super().__init__()
        self.network, self.most, self.where = tiny_network(), most, where

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.where == "backward":
            return OutOfMemoryInBackward.apply(self.network(inputs), self.most)  # type: ignore[no-any-return]
        if len(inputs) > self.most:
            if self.where == "allocator":
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
                )
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.network(inputs)  # type: ignore[no-any-return]


def sizes(found: BatchSize) -> tuple[int, int]:
    return found.per_device_batch_size, found.gradient_accumulation_steps


@pytest.mark.parametrize("where", ["forward", "allocator", "backward"])
@pytest.mark.parametrize(
    ("most", "expected"), [(99, (24, 1)), (24, (24, 1)), (23, (12, 2)), (7, (6, 4)), (1, (1, 24))]
)
def test_the_largest_divisor_that_fits_is_found(where: str, most: int, expected: tuple[int, int]) -> None:
    assert sizes(find_batch_size(tiny_trainer(model=Limited(most, where)), tiny_data(60), 24)) == expected


def test_the_update_equals_that_of_the_batch_that_was_asked_for() -> None:
    whole, limited = tiny_trainer(), tiny_trainer(model=Limited(5))
    found = find_batch_size(limited, tiny_data(), 16)
    assert sizes(found) == (4, 4)
    whole.train(tiny_data(), num_epochs=2, per_device_batch_size=16)
    limited.train(tiny_data(), num_epochs=2, per_device_batch_size=4, gradient_accumulation_steps=4)
    assert whole.run_progress.updates_completed == limited.run_progress.updates_completed == 6
    assert largest_difference(whole, limited) < 1e-12


def test_accumulation_that_is_asked_for_counts_into_the_share() -> None:
    assert sizes(
        find_batch_size(tiny_trainer(model=Limited(16)), tiny_data(), 8, gradient_accumulation_steps=4)
    ) == (16, 2)


def test_memory_of_the_optimizer_counts() -> None:
    """A first update may fit where a second does not, since the optimizer keeps something by then."""

    class Growing(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            if self.optimizer.state and len(batch[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().calculate_train_batch_loss(batch)

    model = tiny_network()
    trainer = Growing(model, nn.functional.cross_entropy, torch.optim.Adam(model.parameters()), callbacks=())
    assert sizes(find_batch_size(trainer, tiny_data(), 8)) == (4, 2)
    assert sizes(find_batch_size(trainer, tiny_data(), 8, num_updates=1)) == (8, 1)


def test_out_of_memory_in_the_optimizer_counts() -> None:
    class Greedy(Trainer):
        def optimizer_step(self) -> None:
            if self.run_config.train_per_device_batch_size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            super().optimizer_step()

    assert sizes(find_batch_size(tiny_trainer(Greedy), tiny_data(), 8)) == (2, 4)


def test_out_of_memory_in_fetching_a_batch_counts() -> None:
    def collate(samples: list[Any]) -> Any:
        if len(samples) > 2:
            raise MemoryError
        return torch.utils.data.default_collate(samples)

    assert sizes(find_batch_size(tiny_trainer(), tiny_data(), 8, collate_fn=collate)) == (2, 4)


def test_all_that_was_tried_is_reported() -> None:
    found = find_batch_size(tiny_trainer(model=Limited(2)), tiny_data(), 6)
    assert [(record["per_device_batch_size"], record["fits"]) for record in found.records] == [
        (6, False),
        (3, False),
        (2, True),
    ]


def test_if_not_even_one_sample_fits_it_raises() -> None:
    with pytest.raises(
        ConfigurationError, match=r"per_device_batch_size is 4.*one sample.* cpu.*smaller model"
    ):
        find_batch_size(tiny_trainer(model=Limited(0)), tiny_data(), 4)


def test_other_errors_are_heard_and_leave_the_trainer_as_it_was() -> None:
    trainer = tiny_trainer(loss_func=lambda outputs, targets: outputs @ targets)
    before = weights_of(trainer)
    with pytest.raises(
        RuntimeError, match=r"loss_func.*\(4, 2\).*\(4,\).*override calculate_train_batch_loss"
    ):
        find_batch_size(trainer, tiny_data(), 4)
    assert torch.equal(weights_of(trainer), before)


def test_data_whose_batches_have_a_size_of_their_own_is_refused() -> None:
    loader = torch.utils.data.DataLoader(tiny_data(), batch_size=4)
    with pytest.raises(
        ConfigurationError, match=r"dataset is .*DataLoader.*Pass the data set inside.*per_device_batch_size"
    ):
        find_batch_size(tiny_trainer(), loader, 4)
    with pytest.raises(
        ConfigurationError, match=r"train_dataloader_kwargs has \['batch_size'\].*per_device_batch_size"
    ):
        find_batch_size(tiny_trainer(), tiny_data(), 4, train_dataloader_kwargs={"batch_size": 8})
