"""Samples of similar length meet in a batch, each once an epoch, in an order that can be had again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, SequentialSampler

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.data.loader import ShardedDataLoader
from accel_core.processes.group import DataGroup
from accel_integrations.samplers import LengthGroupedSampler

LENGTHS = (np.random.default_rng(0).lognormal(3.0, 0.8, 900) + 1).astype(int).tolist()
"""A few long ones among many short ones."""


def padding_of(order: list[int], batch_size: int) -> float:
    """The share of a padded epoch that is padding."""
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    return 1 - sum(LENGTHS) / padded


def test_little_is_padding() -> None:
    shuffled = torch.randperm(900, generator=torch.Generator().manual_seed(0)).tolist()
    grouped = list(LengthGroupedSampler(LENGTHS, 16))
    assert padding_of(shuffled, 16) > 0.5
    assert padding_of(grouped, 16) < 0.2


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1000), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_each_sample_comes_once(lengths: list[int], batch_size: int, shuffle: bool, epoch: int) -> None:
    sampler = LengthGroupedSampler(lengths, batch_size, shuffle)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    again = LengthGroupedSampler(torch.tensor(lengths), batch_size, shuffle)
    again.set_epoch(epoch)
    assert list(again) == list(sampler)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = []
    for seed in (0, 1):
        sampler = LengthGroupedSampler(LENGTHS, 16, seed=seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.append(tuple(sampler))
    assert len(set(orders)) == 4


def test_without_shuffling_the_longest_come_first() -> None:
    assert list(LengthGroupedSampler([3, 9, 3, 5], 2, shuffle=False)) == [1, 3, 0, 2]


class Indices(Dataset[Any]):
    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]), torch.zeros(1)


class Recording(Trainer):
    def __init__(self, *callbacks: TrainerCallback) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        super().__init__(model, nn.functional.mse_loss, optimizer, callbacks, seed=0)
        self.seen: list[list[int]] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.seen.append(batch[0].flatten().int().tolist())
        return super().calculate_train_batch_loss(batch)


def loading() -> dict[str, Any]:
    return {"sampler": LengthGroupedSampler(LENGTHS, 16)}


def test_a_run_resumes_with_the_next_sample(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 40:
                trainer.save_training_state(tmp_path / "state")

    whole, rest = Recording(Save()), Recording()
    whole.train(Indices(), 2, per_device_batch_size=16, train_dataloader_kwargs=loading())
    arguments = {"train_dataloader_kwargs": loading(), "resume_from": tmp_path / "state"}
    rest.train(Indices(), 2, per_device_batch_size=16, **arguments)
    assert rest.seen == whole.seen[40:]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_processes_share_each_epoch(processes: int) -> None:
    loader = torch.utils.data.DataLoader(Indices(), batch_size=16, **loading())
    seen: list[int] = []
    for index in range(processes):
        sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup(processes, index))
        sharded.begin_epoch(1)
        batches = [batch[0].flatten().int().tolist() for batch in sharded]
        seen += [sample for batch in batches for sample in batch]
        lengths = [[LENGTHS[sample] for sample in batch] for batch in batches]
        assert np.median([max(batch) - min(batch) for batch in lengths]) <= 2
    assert sorted(seen) == list(SequentialSampler(Indices()))


@pytest.mark.parametrize("lengths", [[], [1, -1], [[1, 2]], "abc", None, ["a"]], ids=str)
def test_lengths_that_are_none_are_refused(lengths: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"lengths is .*one number.*len\(sample\)"):
        LengthGroupedSampler(lengths, 4)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        LengthGroupedSampler([1, 2], 0)
