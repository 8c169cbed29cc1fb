"""The order of the samples is a function of (seed, epoch) alone."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from accel_core import ConfigurationError, Trainer
from accel_core.data.batch_sampler import ShardedBatchSampler
from accel_core.data.order import EpochOrder, shard_of
from accel_core.processes.group import DataGroup
from accel_core.state.random import derive_seed
from tiny import Seen

SIZE = 23


class Numbers(Dataset[Any]):
    """Sample i is the number i; read sample by sample."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]), torch.tensor([0.0])


def in_memory() -> TensorDataset:
    """The same samples as tensors, which are read batch by batch."""
    return TensorDataset(torch.arange(float(SIZE)).unsqueeze(1), torch.zeros(SIZE, 1))


def samples_of(dataset: Any, seed: int | None = 7, num_workers: int = 0, **kwargs: Any) -> list[int]:
    """The samples of two epochs in the order in which the model sees them."""
    seen = Seen()
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model,
        nn.functional.mse_loss,
        torch.optim.SGD(model.parameters(), lr=0.0),
        callbacks=[seen],
        seed=seed,
    )
    loading = {"num_workers": num_workers, **kwargs.pop("train_dataloader_kwargs", {})}
    loading = {} if isinstance(dataset, DataLoader) else {"train_dataloader_kwargs": loading}
    trainer.train(dataset, **{"num_epochs": 2, "per_device_batch_size": 4, **loading, **kwargs})
    return [int(sample) for sample in seen.samples]


def epochs_of(samples: list[int]) -> tuple[list[int], list[int]]:
    return samples[: len(samples) // 2], samples[len(samples) // 2 :]


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return samples_of(Numbers())


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(expected: list[int]) -> None:
    first, second = epochs_of(expected)
    assert sorted(first) == sorted(second) == list(range(SIZE))
    assert len({tuple(first), tuple(second), tuple(range(SIZE))}) == 3


def test_another_seed_gives_another_order(expected: list[int]) -> None:
    assert samples_of(Numbers(), seed=8) != expected


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_the_order_does_not_depend_on_the_batch_size(expected: list[int], batch_size: int) -> None:
    assert samples_of(Numbers(), per_device_batch_size=batch_size) == expected
    assert samples_of(in_memory(), per_device_batch_size=batch_size) == expected


def test_the_order_does_not_depend_on_accumulation(expected: list[int]) -> None:
    assert samples_of(Numbers(), gradient_accumulation_steps=4) == expected


@pytest.mark.parametrize("loading", [{}, {"persistent_workers": False}, {"prefetch_factor": 5}])
def test_the_order_does_not_depend_on_workers(expected: list[int], loading: dict[str, Any]) -> None:
    assert samples_of(Numbers(), num_workers=2, train_dataloader_kwargs=loading) == expected


def test_the_order_does_not_depend_on_the_global_random_state(expected: list[int]) -> None:
    """Neither on the state before the run nor on what the data set draws in it."""

    class Drawing(Numbers):
        def __getitem__(self, index: int) -> Any:
            torch.rand(1)
            np.random.rand()
            random.random()
            return super().__getitem__(index)

    torch.manual_seed(99)
    assert samples_of(Drawing()) == expected


def test_tensors_in_memory_are_read_in_the_same_order_as_sample_by_sample(expected: list[int]) -> None:
    assert samples_of(in_memory()) == expected
    assert samples_of(in_memory(), num_workers=1) == expected


def test_a_ready_loader_that_shuffles_has_the_same_order(expected: list[int]) -> None:
    for dataset in (Numbers(), in_memory()):
        generator = torch.Generator().manual_seed(1)
        assert samples_of(DataLoader(dataset, batch_size=3, shuffle=True, generator=generator)) == expected


def test_the_order_of_a_run_can_be_had_again_from_torchs_own_seed() -> None:
    torch.manual_seed(11)
    first = samples_of(in_memory(), seed=None)
    torch.rand(100)
    assert samples_of(in_memory(), seed=None) == first, "what was drawn since the seeding plays no part"
    torch.manual_seed(12)
    assert samples_of(in_memory(), seed=None) != first


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_draws_no_random_number_for_the_order(num_workers: int) -> None:
    model = nn.Linear(1, 1)
    trainer = Trainer(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[]
    )
    before = torch.get_rng_state()
    trainer.train(Numbers(), num_epochs=1, train_dataloader_kwargs={"num_workers": num_workers})
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    for dataset in (Numbers(), in_memory()):
        assert samples_of(dataset, train_dataloader_kwargs={"shuffle": False}) == [*range(SIZE)] * 2


def test_parts_of_data_in_memory_are_read_in_the_same_order_as_sample_by_sample() -> None:
    part, _ = random_split(in_memory(), [15, 8], generator=torch.Generator().manual_seed(0))
    by_sample: Subset[Any] = Subset(Numbers(), part.indices)
    assert samples_of(part) == samples_of(by_sample)
    assert sorted(epochs_of(samples_of(part))[0]) == sorted(part.indices)
    every_second = list(range(0, 15, 2))
    assert samples_of(Subset(part, every_second)) == samples_of(Subset(by_sample, every_second))


# ---------------------------------------------------------------------- samplers


TORCH_SAMPLERS: dict[str, Any] = {
    "weighted": lambda: WeightedRandomSampler([1.0] * SIZE, num_samples=10),
    "subset": lambda: SubsetRandomSampler(range(3, 13)),
    "replacement": lambda: RandomSampler(range(SIZE), replacement=True, num_samples=10),
    "part": lambda: RandomSampler(range(SIZE), num_samples=10),
}


@pytest.mark.parametrize("name", TORCH_SAMPLERS)
def test_samplers_of_torch_draw_from_seed_and_epoch(name: str) -> None:
    def samples(dataset: Any, **kwargs: Any) -> list[int]:
        torch.rand(1)
        return samples_of(dataset, train_dataloader_kwargs={"sampler": TORCH_SAMPLERS[name]()}, **kwargs)

    first = samples(Numbers())
    assert len(first) == 20
    assert epochs_of(first)[0] != epochs_of(first)[1]
    assert samples(Numbers(), num_workers=2) == samples(in_memory(), per_device_batch_size=3) == first
    assert samples(Numbers(), seed=8) != first


def test_weights_of_a_sampler_count() -> None:
    weights = [0.0] * SIZE
    weights[4] = weights[9] = 1.0
    sampler = WeightedRandomSampler(weights, num_samples=50)
    assert set(samples_of(Numbers(), train_dataloader_kwargs={"sampler": sampler})) == {4, 9}


def test_a_sampler_keeps_the_generator_that_it_was_made_with() -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    sampler = WeightedRandomSampler([1.0] * SIZE, num_samples=10, generator=generator)
    samples_of(Numbers(), train_dataloader_kwargs={"sampler": sampler})
    assert sampler.generator is generator
    assert torch.equal(generator.get_state(), before)


class Rotating(Sampler[int]):
    """Begins one further in each epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter([(index + self.epoch) % SIZE for index in range(SIZE)])


class Unsized(Sampler[int]):
    """Torch demands no length of a sampler."""

    def __iter__(self) -> Iterator[int]:
        return iter([5, 3, 8, 1, 9])


@pytest.mark.parametrize("dataset", [Numbers(), in_memory()])
def test_a_sampler_of_the_users_keeps_its_order_and_hears_of_the_epoch(dataset: Any) -> None:
    samples = samples_of(dataset, train_dataloader_kwargs={"sampler": Rotating()})
    assert samples == [*range(SIZE), *range(1, SIZE), 0]


@pytest.mark.parametrize("dataset", [Numbers(), in_memory()])
def test_a_sampler_without_a_length_is_read_to_its_end(dataset: Any) -> None:
    assert samples_of(dataset, train_dataloader_kwargs={"sampler": Unsized()}) == [5, 3, 8, 1, 9] * 2


class Batches:
    """A batch sampler of the user's own, with batches of different sizes."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1, 2], [5 + self.epoch], [9, 3]])


@pytest.mark.parametrize("dataset", [Numbers(), in_memory()])
def test_a_batch_sampler_of_the_users_gives_the_batches(dataset: Any) -> None:
    samples = samples_of(dataset, train_dataloader_kwargs={"batch_sampler": Batches()})
    assert samples == [0, 1, 2, 5, 9, 3, 0, 1, 2, 6, 9, 3]


def test_batches_of_different_sizes_weigh_by_their_samples_in_an_update() -> None:
    """The targets are 0, so the gradient of the bias is twice the mean output over the six samples."""
    gradients: list[float] = []

    class Watching(Trainer):
        def optimizer_step(self) -> None:
            gradients.append(float(self.model.bias.grad))  # type: ignore[arg-type,union-attr]

    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    trainer = Watching(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[]
    )
    kwargs = {"batch_sampler": [[0, 1, 2], [5], [9, 3]], "num_workers": 0}
    trainer.train(Numbers(), num_epochs=1, gradient_accumulation_steps=3, train_dataloader_kwargs=kwargs)
    assert gradients == pytest.approx([2 * (0 + 1 + 2 + 5 + 9 + 3) / 6])


def test_a_sampler_that_shards_the_data_itself_is_refused() -> None:
    sampler = torch.utils.data.DistributedSampler(Numbers(), num_replicas=2, rank=0)
    with pytest.raises(ConfigurationError, match=r"DistributedSampler.*Pass the data set alone"):
        samples_of(Numbers(), train_dataloader_kwargs={"sampler": sampler})


# ---------------------------------------------------------------------- random numbers of the data set


class Augmented(Numbers):
    """Each sample is drawn anew, with three generators."""

    def __getitem__(self, index: int) -> Any:
        drawn = 1e6 * torch.rand(1) + 1e6 * np.random.rand() + 1e6 * random.random()
        return drawn.float(), torch.tensor([0.0])


def test_random_samples_depend_on_seed_epoch_and_index_alone_where_each_is_seeded() -> None:
    def drawn(**kwargs: Any) -> list[int]:
        torch.rand(1)
        random.random()
        return samples_of(Augmented(), seed_each_sample=True, **kwargs)

    first = drawn()
    assert len(set(first)) == 2 * SIZE
    assert (
        drawn(num_workers=2)
        == drawn(per_device_batch_size=7, num_workers=1)
        == drawn(per_device_batch_size=5)
        == first
    )
    assert drawn(seed=8) != first


# ---------------------------------------------------------------------- shares of processes


@pytest.mark.parametrize(
    ("num_samples", "num_processes"), [(37, 2), (37, 3), (5, 3), (2, 3), (1, 2), (24, 2)]
)
def test_each_sample_goes_to_one_process_once_and_the_rest_is_divided_evenly(
    num_samples: int, num_processes: int
) -> None:
    order = EpochOrder(SequentialSampler(range(num_samples)), seed=0)
    plans, taken = [], []
    for process in range(num_processes):
        sampler = ShardedBatchSampler(order, 4, False, DataGroup(num_processes, process))
        sampler.begin_epoch(0)
        plan = list(sampler.plan())
        own = list(sampler)
        sizes = [size for _, size in plan if size]
        taken += [index for batch, _ in zip(own, sizes, strict=False) for index in batch]
        assert len(own) == max(len(sizes), 1), "a process without any sample gets one batch to take part with"
        plans.append(plan)
    assert sorted(taken) == list(range(num_samples))
    assert all(len(plan) == len(plans[0]) for plan in plans)
    last = [plan[-1][1] for plan in plans]
    assert max(last) - min(last) <= 1


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 60),
    batch_sizes=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    processes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_steps=st.integers(0, 5),
)
def test_a_position_goes_on_with_the_next_sample_for_any_batch_size_and_number_of_processes(
    num_samples: int, batch_sizes: tuple[int, int], processes: tuple[int, int], num_steps: int
) -> None:
    order = EpochOrder(RandomSampler(range(num_samples)), seed=5)

    def taken(batch_size: int, num_processes: int, position: int, most: int | None = None) -> list[int]:
        samples = []
        for process in range(num_processes):
            sampler = ShardedBatchSampler(order, batch_size, False, DataGroup(num_processes, process))
            sampler.begin_epoch(3, position)
            own = [size for _, size in sampler.plan()][:most]
            samples += [index for size, batch in zip(own, sampler, strict=False) if size for index in batch]
        return samples

    before = taken(batch_sizes[0], processes[0], 0, num_steps)
    after = taken(batch_sizes[1], processes[1], position=len(before))
    assert sorted(before + after) == list(range(num_samples))


def test_shares_are_contiguous_and_seeds_differ() -> None:
    assert [shard_of(7, DataGroup(3, p)) for p in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert derive_seed(1, "order", 2) == derive_seed(1, "order", 2)
    assert len({derive_seed(seed, "order", epoch) for seed in range(9) for epoch in range(9)}) == 81
