"""A shuffle that is computed place by place is a shuffle, begins at once, and leaves older runs their order."""

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import RandomSampler

from accel_core import CheckpointError, TrainerCallback, samples_of, updates_of
from accel_core.data import order
from accel_core.data.batch_sampler import ShardedBatchSampler
from accel_core.data.keyed_order import BLOCK, KeyedOrder
from accel_core.data.order import EpochOrder, random_order
from accel_core.processes.group import DataGroup
from states import edit
from tiny import tiny_data, tiny_trainer

BILLION = 10**9


@pytest.mark.seconds
def test_each_index_comes_once_at_every_length_up_to_2000() -> None:
    for length in range(2001):
        keyed = KeyedOrder(length, key=length + 1)
        assert np.array_equal(np.sort(keyed[:]), np.arange(length))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 2**18), key=st.integers(0, 2**63 - 1))
def test_each_index_comes_once_at_any_length(length: int, key: int) -> None:
    keyed = KeyedOrder(length, key)
    indices = keyed[:]
    assert np.array_equal(np.bincount(indices, minlength=length), np.ones(length))
    assert np.array_equal(keyed.places_of(indices), np.arange(length))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, BILLION), key=st.integers(0, 2**63 - 1), place=st.integers(0, BILLION - 1))
def test_a_place_has_the_index_that_has_this_place(length: int, key: int, place: int) -> None:
    keyed = KeyedOrder(length, key)
    place %= length
    assert 0 <= keyed[place] < length
    assert keyed.places_of([keyed[place]]).tolist() == [place]


def test_slices_are_those_of_the_whole_order() -> None:
    keyed = KeyedOrder(3 * BLOCK + 5, key=3)
    whole = np.asarray(KeyedOrder(len(keyed), key=3))
    for part in (
        slice(0, 8),
        slice(BLOCK - 2, 2 * BLOCK + 2),
        slice(-5, None),
        slice(5, 5),
        slice(9, 2),
        slice(1, 90, 7),
    ):
        assert keyed[part].dtype == np.int64
        assert np.array_equal(keyed[part], whole[part])
    assert keyed[-1] == whole[-1]
    with pytest.raises(IndexError):
        keyed[len(keyed)]


def chi_square(counts: Any) -> float:
    """How many standard deviations the statistic of equally likely cells lies above its mean."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - (counts.size - 1)) / np.sqrt(2 * (counts.size - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 13, 60, 200])
def test_places_pairs_and_steps_are_as_likely_as_each_other(length: int) -> None:
    """A drawn shuffle lies below 5 standard deviations in all but one of a million tests."""
    num_keys = 2500
    places, pairs = np.zeros((length, length)), np.zeros((length, length))
    steps = np.zeros(length)
    for key in range(num_keys):
        indices = KeyedOrder(length, key * 7919 + length)[:]
        places[np.arange(length), indices] += 1
        pairs[indices[0], indices[1]] += 1
        steps += np.bincount(np.diff(indices) % length, minlength=length)
    assert chi_square(places) < 5
    assert chi_square(steps[1:]) < 5
    # Of a long order most pairs never come first.
    if length < 20:
        assert chi_square(pairs[~np.eye(length, dtype=bool)]) < 5


def test_epochs_seeds_and_lengths_have_other_orders() -> None:
    first = KeyedOrder(BILLION, 1)[:100]
    for other in (KeyedOrder(BILLION, 2), KeyedOrder(BILLION + 1, 1)):
        assert len(set(first.tolist()) & set(other[:100].tolist())) < 3


class Indices:
    """A data set of any length, whose samples are their indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index % 97)]), torch.tensor([0.0])


def test_an_epoch_of_a_billion_samples_begins_with_little_memory() -> None:
    sampler = ShardedBatchSampler(
        EpochOrder(RandomSampler(Indices(BILLION)), seed=3),
        32,
        False,
        DataGroup(2, 1),  # type: ignore[arg-type]
    )
    tracemalloc.start()
    sampler.begin_epoch(1, position=BILLION // 2)
    plan, batches = sampler.plan(), iter(sampler)
    first = next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20
    assert len(plan) == BILLION // 2 // 64
    assert (plan[0], plan[-1], plan[2:4]) == ((64, 32), (64, 32), [(64, 32)] * 2)
    assert first == sampler.items[BILLION // 2 + 32 : BILLION // 2 + 64].tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_trainer_makes_updates_of_a_billion_samples(shuffle: bool) -> None:
    trainer = tiny_trainer()
    trainer.model = torch.nn.Linear(1, 1)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01)
    trainer.loss_func = torch.nn.functional.mse_loss
    tracemalloc.start()
    trainer.train(Indices(BILLION), max_num_train_steps=3, train_dataloader_kwargs={"shuffle": shuffle})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert trainer.run_progress.updates_completed == 3
    assert peak < 50 * 2**20


class Record(TrainerCallback):
    """Notes the samples of each update, by their inputs."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_step_start(self, trainer: Any, batch: Any) -> None:
        self.seen.append(batch[0][:, 0].tolist())


def train(folder: Path, **kwargs: Any) -> Any:
    record = Record()
    trainer = tiny_trainer(callbacks=[record])
    trainer.train(tiny_data(24), 2, per_device_batch_size=8, **kwargs)
    return trainer, record.seen


def test_a_run_of_the_order_before_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `KEYED_FROM` at 0 every shuffle of the present version is a keyed one."""
    _, drawn = train(tmp_path)
    monkeypatch.setattr(order, "KEYED_FROM", 0)
    _, keyed = train(tmp_path)
    first_epochs = [sorted(itertools.chain.from_iterable(seen[:3])) for seen in (drawn, keyed)]
    assert first_epochs[0] == first_epochs[1] and drawn != keyed

    def save(folder: Path, version: int) -> Any:
        trainer = tiny_trainer()
        trainer.train(tiny_data(24), max_num_train_steps=2, per_device_batch_size=8)
        trainer.save_training_state(folder)
        edit(folder, "order_version", value=version)
        return folder

    new, old = save(tmp_path / "new", 2), save(tmp_path / "old", 1)
    resumed, seen = train(tmp_path, resume_from=new)
    assert seen == keyed[2:]
    resumed, seen = train(tmp_path, resume_from=old)
    assert seen == drawn[2:]
    # Its own states say so too, and a further stage of the run keeps the order.
    resumed.save_training_state(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "trainer_state.json").read_text())["order_version"] == 1
    with pytest.raises(CheckpointError, match=r"version 3 .*up to 2.*Use the version of accel that wrote it"):
        train(tmp_path, resume_from=save(tmp_path / "newer", 3))


def test_samples_of_an_update_and_updates_of_a_sample_hold_for_keyed_orders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "KEYED_FROM", 0)
    data = tiny_data(24)
    trainer, seen = train(tmp_path)
    trainer.save_training_state(tmp_path / "state")
    for update in range(1, 7):
        indices = samples_of(tmp_path / "state", update)
        assert data.tensors[0][indices][:, 0].tolist() == seen[update - 1]
    for sample in range(24):
        updates = updates_of(tmp_path / "state", sample)
        assert [
            number for number in range(1, 7) if sample in samples_of(tmp_path / "state", number)
        ] == updates


def test_a_short_shuffle_is_the_drawn_one() -> None:
    sampler = RandomSampler(range(1000))
    assert torch.equal(torch.as_tensor(EpochOrder(sampler, 5).of_epoch(2)), random_order(1000, 5, 2))
