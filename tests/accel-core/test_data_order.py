"""The order of the samples is a function of (seed, epoch) alone."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler, Subset, TensorDataset, WeightedRandomSampler, random_split

from accel_core import Trainer, TrainerCallback
from accel_core.data_order import EpochOrder, ShardedBatchSampler, derive_seed, share_of


class Numbers(Dataset[Any]):
    """Sample i is the number i."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]), torch.tensor([0.0])


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.samples: list[int] = []

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.samples += batch[0].flatten().long().tolist()


def samples_of(dataset: Any, seed: int = 7, **kwargs: Any) -> list[int]:
    seen = Seen()
    model = nn.Linear(1, 1)
    trainer = Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[seen], seed=seed)
    trainer.train(dataset, **{"num_epochs": 2, "per_device_batch_size": 4, **kwargs})
    return seen.samples


def in_memory() -> TensorDataset:
    return TensorDataset(torch.arange(23.0).unsqueeze(1), torch.zeros(23, 1))


def test_the_order_depends_on_neither_batch_size_nor_workers_nor_global_random_state_nor_the_way_of_reading() -> None:
    expected = samples_of(Numbers(), train_dataloader_kwargs={"num_workers": 0})
    assert sorted(expected[:23]) == sorted(expected[23:]) == list(range(23))
    assert expected[:23] != expected[23:]
    torch.manual_seed(99)
    assert samples_of(Numbers(), train_dataloader_kwargs={"num_workers": 2}) == expected
    assert samples_of(Numbers(), per_device_batch_size=5, train_dataloader_kwargs={"num_workers": 0}) == expected
    assert samples_of(in_memory()) == expected
    assert samples_of(in_memory(), gradient_accumulation_steps=3) == expected
    assert samples_of(in_memory(), seed=8) != expected


def test_subsets_in_memory_are_read_in_the_same_order_as_sample_by_sample() -> None:
    part, _ = random_split(in_memory(), [15, 8], generator=torch.Generator().manual_seed(0))
    nested = Subset(part, list(range(0, 15, 2)))
    by_sample = Subset(Subset(Numbers(), part.indices), list(range(0, 15, 2)))
    assert samples_of(nested) == samples_of(by_sample, train_dataloader_kwargs={"num_workers": 0})


def test_samplers_of_torch_draw_from_seed_and_epoch() -> None:
    sampler = WeightedRandomSampler([1.0] * 23, num_samples=10)
    kwargs = {"train_dataloader_kwargs": {"sampler": sampler}}
    first = samples_of(in_memory(), **kwargs)
    torch.manual_seed(5)
    assert samples_of(in_memory(), **kwargs) == first
    assert first[:10] != first[10:]


def test_a_sampler_of_the_users_keeps_its_order_and_hears_of_the_epoch() -> None:
    class Rotating(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 23

        def __iter__(self) -> Any:
            return iter([(index + self.epoch) % 23 for index in range(23)])

    samples = samples_of(in_memory(), train_dataloader_kwargs={"sampler": Rotating()})
    assert samples == [*range(23), *range(1, 23), 0]


def test_a_batch_sampler_of_the_users_gives_the_batches() -> None:
    batches = [[0, 1, 2], [5], [9, 3]]
    samples = samples_of(Numbers(), train_dataloader_kwargs={"batch_sampler": batches, "num_workers": 0})
    assert samples == [0, 1, 2, 5, 9, 3] * 2


@pytest.mark.parametrize(("num_samples", "num_processes"), [(37, 2), (37, 3), (5, 3), (2, 3), (1, 2), (24, 2)])
def test_each_sample_goes_to_one_process_once_and_the_rest_is_dealt_out_evenly(num_samples: int, num_processes: int) -> None:
    order = EpochOrder(SequentialSampler(range(num_samples)), seed=0)
    plans, dealt = [], []
    for process in range(num_processes):
        sampler = ShardedBatchSampler(order, 4, False, num_processes, process)
        sampler.begin_epoch(0)
        plan = list(sampler.plan())
        own = [batch.tolist() for batch in sampler]
        sizes = [size for _, size in plan if size]
        dealt += [index for batch, _ in zip(own, sizes, strict=False) for index in batch]
        assert len(own) == max(len(sizes), 1), "a process without any sample gets one batch to take part with"
        plans.append(plan)
    assert sorted(dealt) == list(range(num_samples))
    assert all(len(plan) == len(plans[0]) for plan in plans)
    last = [plan[-1][1] for plan in plans]
    assert max(last) - min(last) <= 1


def test_a_position_goes_on_with_the_next_sample_for_any_batch_size_and_number_of_processes() -> None:
    order = EpochOrder(SequentialSampler(range(37)), seed=0)
    dealt = []
    for process in range(3):
        sampler = ShardedBatchSampler(order, 5, False, 3, process)
        sampler.begin_epoch(0, position=16)
        dealt += [index for batch in sampler for index in batch.tolist()]
    assert sorted(dealt) == list(range(16, 37))


def test_shares_are_contiguous_and_seeds_differ() -> None:
    assert [share_of(7, 3, p) for p in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert derive_seed(1, "order", 2) == derive_seed(1, "order", 2)
    assert len({derive_seed(seed, "order", epoch) for seed in range(9) for epoch in range(9)}) == 81
