"""Data of every kind: what the trainer reads, in which order, with which workers and settings."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from accel_core import ConfigurationError, Trainer
from accel_core.data.loader import ShardedDataLoader
from accel_core.processes.group import DataGroup

SIZE = 11
FEATURES = torch.arange(SIZE, dtype=torch.float32).reshape(SIZE, 1)
DATA = TensorDataset(FEATURES, torch.zeros(SIZE, 1))
PAIRS = list(zip(FEATURES, torch.zeros(SIZE, 1), strict=True))
IN_ORDER = list(range(SIZE))


class Recording(Trainer):
    """Remembers the batches of training and of evaluation by what stands in them."""

    def __init__(self) -> None:
        model = nn.Linear(1, 1)
        super().__init__(
            model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks=[], seed=4
        )
        self.trained: list[list[float]] = []
        self.evaluated: list[list[float]] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.trained.append(inputs_of(batch).flatten().tolist())
        inputs = inputs_of(batch).float().reshape(-1, 1)
        outputs = self.model(inputs)
        return {"loss": outputs.square().mean(), "model_outputs": outputs, "batch_size": len(inputs)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.evaluated.append(inputs_of(batch).flatten().tolist())
        return {"loss": torch.zeros(()), "model_outputs": None, "batch_size": len(self.evaluated[-1])}


def seeded_recording() -> Recording:
    """A trainer that has seeded the process already, as it does once, so that a test may change the random state."""
    trainer = Recording()
    trainer.predict(FEATURES[:1])
    return trainer


def inputs_of(batch: Any) -> torch.Tensor:
    while not isinstance(batch, torch.Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


def flat(batches: list[list[float]]) -> list[float]:
    return [value for batch in batches for value in batch]


class MapStyle(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return PAIRS[index]


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PAIRS)


class Sized(Unsized):
    def __len__(self) -> int:
        return SIZE


class PlainIterable:
    """No class of torch's, but can be read again and again."""

    def __iter__(self) -> Iterator[Any]:
        return (pair for pair in PAIRS)


class Mappings(MapStyle):
    def __getitem__(self, index: int) -> Any:
        return {"x": PAIRS[index][0], "nested": {"y": 0.0}}


class ForeignLoader:
    """A loader of nobody's: it has batches and says their size."""

    batch_size = 4

    def __iter__(self) -> Iterator[Any]:
        return iter([(FEATURES[i : i + 4], None) for i in range(0, SIZE, 4)])


class OwnLoader(DataLoader[Any]):
    """A loader that iterates in its own way."""

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield x + 100, y


SOURCES: dict[str, Callable[[], Any]] = {
    "tensor data set": lambda: DATA,
    "subset of it": lambda: Subset(Subset(DATA, list(range(SIZE))), list(range(SIZE))),
    "map-style": MapStyle,
    "list": lambda: PAIRS,
    "one tensor": lambda: FEATURES,
    "one array": lambda: FEATURES.numpy(),
    "mappings": Mappings,
    "unsized": Unsized,
    "sized iterable": Sized,
    "plain iterable": PlainIterable,
    "generator": lambda: (pair for pair in PAIRS),
    "ready loader": lambda: DataLoader(DATA, batch_size=4),
    "ready loader of unsized data": lambda: DataLoader(Unsized(), batch_size=4),
    "loader of nobody's": ForeignLoader,
}


def joined(name: str, batch_size: int) -> dict[str, Any] | None:
    """What says that the items of an iterable that is no data set of torch's are samples."""
    return {"batch_size": batch_size} if name in ("plain iterable", "generator") else None


@pytest.mark.parametrize("name", SOURCES)
def test_every_sample_is_trained_on_once_and_evaluated_once_in_order(name: str) -> None:
    trainer = Recording()
    loading = {"train_dataloader_kwargs": joined(name, 4), "eval_dataloader_kwargs": joined(name, 4)}
    history = trainer.train(SOURCES[name](), 1, SOURCES[name](), 4, **loading)
    assert sorted(flat(trainer.trained)) == IN_ORDER
    assert [len(batch) for batch in trainer.trained] == [4, 4, 3]
    assert flat(trainer.evaluated) == IN_ORDER
    assert trainer.run_progress.updates_completed == 3
    assert history.get_latest_metric("eval_loss_epoch") == 0.0


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_data_can_be_predicted_in_its_order(name: str) -> None:
    trainer = Recording()
    trainer.calculate_predictions = lambda batch: inputs_of(batch).flatten()  # type: ignore[method-assign]
    assert trainer.predict(SOURCES[name](), 3, joined(name, 3)).tolist() == IN_ORDER


def test_an_iterable_without_a_length_can_end_by_updates_alone() -> None:
    """Lesson A27: an endless stream."""

    def endless() -> Iterator[Any]:
        while True:
            yield from PAIRS

    trainer = Recording()
    trainer.train(endless(), max_num_train_steps=5, train_dataloader_kwargs={"batch_size": 3})
    assert flat(trainer.trained)[:12] == [*IN_ORDER, 0]
    assert trainer.run_progress.updates_completed == 5
    assert trainer.run_progress.epochs_completed == 0


def test_a_stream_that_ends_too_early_is_told_when_it_is_begun_again() -> None:
    trainer = Recording()
    with pytest.raises(ConfigurationError, match=r"list_iterator.*no batch.*read to its end.*begins again"):
        trainer.train(iter(PAIRS), max_num_train_steps=10, train_dataloader_kwargs={"batch_size": 8})
    assert trainer.run_progress.epochs_completed == 1


def test_a_sized_iterable_gives_the_numbers_of_the_run() -> None:
    trainer = Recording()
    trainer.train(Sized(), num_epochs=2, per_device_batch_size=4)
    assert trainer.run_config.num_update_steps_per_epoch == 3
    assert trainer.run_config.num_update_steps == 6
    trainer.train(Unsized(), num_epochs=2, per_device_batch_size=4)
    assert trainer.run_config.num_update_steps is None
    assert trainer.run_progress.updates_completed == 6


def test_several_runs_with_different_data_on_one_trainer() -> None:
    """Lesson A35: nothing of an earlier run's data is kept."""
    trainer = Recording()
    trainer.train(DATA, num_epochs=1, eval_dataset=DATA, per_device_batch_size=4)
    trainer.trained, trainer.evaluated = [], []
    trainer.train(Unsized(), num_epochs=1, per_device_batch_size=5)
    assert trainer.trained == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]]
    assert trainer.evaluated == []
    assert trainer.eval_dataloader is None
    kwargs = {"batch_size": 10}
    trainer.train(DataLoader(DATA, batch_size=6), 1, PlainIterable(), eval_dataloader_kwargs=kwargs)
    assert trainer.trained[3:] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert trainer.evaluated == [IN_ORDER[:10], [10]]


def test_evaluate_takes_the_data_of_the_latest_run_and_keeps_the_history() -> None:
    """Lesson A35: the history of training survives, and other data does not replace what the run had."""
    trainer = Recording()
    trainer.train(
        DATA,
        num_epochs=2,
        eval_dataset=PAIRS[:5],
        collate_fn=lambda samples: torch.stack([x for x, _ in samples]),
    )
    records = trainer.run_history.to_records()
    assert trainer.evaluate(PAIRS[:2]) == {"evaluation_loss": 0.0}
    trainer.evaluated = []
    trainer.evaluate()
    assert trainer.evaluated == [[0, 1, 2, 3, 4]]
    assert trainer.run_history.to_records()[: len(records)] == records
    assert trainer.run_history.get_metric_values("evaluation_loss") == [0.0, 0.0]


def test_the_run_config_is_there_after_a_bare_evaluation_and_can_be_copied() -> None:
    """Lesson A34: `to_dict` works without training, and takes nothing out of the live arguments."""
    trainer = Recording()
    trainer.evaluate(DATA, per_device_batch_size=4, dataloader_kwargs={"num_workers": 0})
    values = trainer.run_config.to_dict()
    assert values["eval_per_device_batch_size"] == 4
    assert values["num_epochs"] is values["num_update_steps"] is None
    arguments = {"sampler": RandomSampler(DATA), "num_workers": 0}
    trainer.train(DATA, num_epochs=1, train_dataloader_kwargs=arguments)
    trainer.run_config.to_dict()["train_dl_kwargs"].clear()
    assert set(arguments) == {"sampler", "num_workers"}
    assert set(trainer.run_config.to_dict()["train_dl_kwargs"]) == {"sampler", "num_workers"}


# ------------------------------------------------------------------ ready loaders


def first_worker_settings(worker: int) -> None:
    Settings.is_of_worker = True


class Settings(Dataset[Any]):
    """Tells whether the worker that reads it has called its user's function."""

    is_of_worker = False

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> bool:
        return self.is_of_worker


def test_a_ready_loader_keeps_its_settings() -> None:
    def collate(samples: list[Any]) -> Any:
        return torch.stack([x for x, _ in samples])

    loader = DataLoader(
        MapStyle(),
        batch_size=3,
        drop_last=True,
        collate_fn=collate,
        num_workers=1,
        prefetch_factor=3,
        persistent_workers=True,
        timeout=33,
        worker_init_fn=first_worker_settings,
        multiprocessing_context="fork",
    )
    sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup())
    used = sharded.source.torch_loader
    for name in ("num_workers", "prefetch_factor", "persistent_workers", "timeout", "pin_memory"):
        assert getattr(used, name) == getattr(loader, name), name
    assert used.collate_fn.collate_fn.collate_fn is collate
    assert used.multiprocessing_context.get_start_method() == "fork"
    trainer = Recording()
    trainer.train(loader, num_epochs=1)
    assert trainer.trained == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_workers_call_the_users_function_and_end_when_their_parent_says_so() -> None:
    loader = DataLoader(Settings(), batch_size=3, num_workers=1, worker_init_fn=first_worker_settings)
    sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup())
    sharded.begin_epoch(0)
    batches = iter(sharded)
    assert next(batches).all()
    worker = multiprocessing.active_children()[-1]
    worker.terminate()
    worker.join(10)
    assert worker.exitcode is not None
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches)


def test_a_ready_loader_stays_usable_by_its_owner() -> None:
    loader = DataLoader(DATA, batch_size=4)
    Recording().train(loader, num_epochs=1, eval_dataset=loader)
    assert [len(x) for x, _ in loader] == [4, 4, 3]


def test_a_loader_that_iterates_in_its_own_way_is_iterated_in_its_own_way() -> None:
    trainer = Recording()
    trainer.train(OwnLoader(DATA, batch_size=4), num_epochs=1)
    assert flat(trainer.trained) == [value + 100 for value in IN_ORDER]


def test_a_loader_without_batching_reads_ready_batches_in_the_order_of_the_epoch() -> None:
    batches = [(FEATURES[:4], None), (FEATURES[4:8], None), (FEATURES[8:], None)]
    trainer = Recording()
    trainer.train(batches, num_epochs=2, train_dataloader_kwargs={"batch_size": None, "collate_fn": tuple})
    assert (
        sorted(trainer.trained[:3])
        == sorted(trainer.trained[3:])
        == [x.flatten().tolist() for x, _ in batches]
    )
    assert trainer.run_config.num_update_steps == 6
    assert trainer.run_config.train_per_device_batch_size is None
    again = Recording()
    again.train(batches, num_epochs=2, train_dataloader_kwargs={"batch_size": None, "collate_fn": tuple})
    assert again.trained == trainer.trained


class ByList(MapStyle):
    """Is asked for a whole batch at once, as torch's documentation of `batch_size=None` shows."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, list)
        return FEATURES[index], torch.zeros(len(index), 1)


@pytest.mark.parametrize("seed_each_sample", [False, True])
def test_a_batch_sampler_in_place_of_the_sampler_asks_for_lists_of_indices(seed_each_sample: bool) -> None:
    trainer = Recording()
    data = ByList()
    loader = DataLoader(
        data, batch_size=None, sampler=BatchSampler(RandomSampler(data), batch_size=4, drop_last=False)
    )
    trainer.train(loader, num_epochs=2, seed_each_sample=seed_each_sample)
    assert [len(batch) for batch in trainer.trained] == [4, 4, 3] * 2
    assert sorted(flat(trainer.trained[:3])) == IN_ORDER
    usual = Recording()
    usual.train(DATA, num_epochs=2, per_device_batch_size=4)
    assert trainer.trained == usual.trained


def test_what_shuffles_itself_has_an_order_of_seed_and_epoch_and_leaves_the_random_state_alone() -> None:
    class Shuffling(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from random.sample(PAIRS, SIZE)

    runs = []
    for disturbance in (1, 2):
        trainer = seeded_recording()
        random.seed(disturbance)
        before = random.getstate()
        trainer.train(Shuffling(), num_epochs=2, per_device_batch_size=SIZE)
        assert random.getstate() == before
        runs.append(trainer.trained)
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


# ------------------------------------------------------------------ samplers and collate functions


class Backwards(Sampler[int]):
    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(reversed(range(SIZE)))


class WithEpoch(Backwards):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([(index + self.epoch) % SIZE for index in range(SIZE)])


class ByParity(Sampler[list[int]]):
    """Batches of different sizes."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(0, SIZE, 2)), list(range(1, SIZE, 2))])


class WithoutLength(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


def test_a_sampler_of_the_users_own_gives_the_order() -> None:
    trainer = Recording()
    trainer.train(DATA, num_epochs=1, train_dataloader_kwargs={"sampler": Backwards()})
    assert flat(trainer.trained) == IN_ORDER[::-1]


def test_a_sampler_with_set_epoch_gets_the_epoch() -> None:
    trainer = Recording()
    trainer.train(
        DATA, num_epochs=3, per_device_batch_size=SIZE, train_dataloader_kwargs={"sampler": WithEpoch()}
    )
    assert [batch[0] for batch in trainer.trained] == [0, 1, 2]


def test_a_batch_sampler_gives_the_batches() -> None:
    trainer = Recording()
    trainer.train(
        MapStyle(), num_epochs=1, train_dataloader_kwargs={"batch_sampler": ByParity(), "num_workers": 0}
    )
    assert trainer.trained == [IN_ORDER[::2], IN_ORDER[1::2]]
    assert trainer.run_config.num_update_steps == 2


def test_the_batch_sampler_of_torch_keeps_its_size_and_its_last_batch() -> None:
    trainer = Recording()
    sampler = BatchSampler(Backwards(), batch_size=4, drop_last=True)
    trainer.train(DATA, num_epochs=1, train_dataloader_kwargs={"batch_sampler": sampler})
    assert trainer.trained == [[10, 9, 8, 7], [6, 5, 4, 3]]
    assert trainer.run_config.train_per_device_batch_size == 4


def test_a_sampler_without_a_length_is_read_as_a_stream() -> None:
    trainer = Recording()
    trainer.train(
        DATA, num_epochs=2, per_device_batch_size=4, train_dataloader_kwargs={"sampler": WithoutLength()}
    )
    assert flat(trainer.trained) == IN_ORDER * 2
    assert trainer.run_config.num_update_steps is None


@pytest.mark.parametrize(
    "create",
    [
        lambda: RandomSampler(DATA, replacement=True),
        lambda: RandomSampler(DATA, num_samples=30),
        lambda: WeightedRandomSampler([1.0] * SIZE, 20),
        lambda: SubsetRandomSampler(range(3, 9)),
    ],
)
def test_samplers_of_torch_draw_from_seed_and_epoch_alone(create: Callable[[], Sampler[int]]) -> None:
    orders = []
    for _ in range(2):
        trainer = Recording()
        trainer.train(
            DATA,
            num_epochs=2,
            train_dataloader_kwargs={"sampler": create()},
            per_device_batch_size=len(create()),
        )
        torch.rand(3)
        orders.append(trainer.trained)
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]


def test_the_collate_function_of_the_arguments_is_used_for_training_and_evaluation() -> None:
    def collate(samples: list[Any]) -> torch.Tensor:
        return torch.stack([x for x, _ in samples]) + 50

    trainer = Recording()
    trainer.train(DATA, num_epochs=1, eval_dataset=PAIRS, collate_fn=collate)
    assert sorted(flat(trainer.trained)) == flat(trainer.evaluated) == [value + 50 for value in IN_ORDER]


def test_what_the_user_gives_wins_over_the_defaults() -> None:
    trainer = Recording()
    arguments = {"batch_size": 5, "shuffle": False, "drop_last": True}
    trainer.train(DATA, num_epochs=1, per_device_batch_size=2, train_dataloader_kwargs=arguments)
    assert trainer.trained == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert trainer.run_config.train_per_device_batch_size == 5


def test_the_defaults_may_be_overridden() -> None:
    class InOrder(Recording):
        def get_default_train_dl_kwargs(self, batch_size: int) -> dict[str, Any]:
            return {**super().get_default_train_dl_kwargs(batch_size), "sampler": Backwards()}

    trainer = InOrder()
    trainer.train(DATA, num_epochs=1)
    assert flat(trainer.trained) == IN_ORDER[::-1]


# ------------------------------------------------------------------ workers


@pytest.mark.parametrize("data", [DATA, MapStyle(), PAIRS, Unsized()], ids=lambda data: type(data).__name__)
def test_there_are_no_workers_unless_they_are_asked_for(data: Any) -> None:
    trainer = Recording()
    trainer.train(data, 1, data)
    for loader in (trainer.train_dataloader, trainer.eval_dataloader):
        assert loader is not None
        assert (loader.loader.num_workers, loader.loader.persistent_workers, loader.loader.pin_memory) == (
            0,
            False,
            False,
        )
    trainer.train(MapStyle(), 1, train_dataloader_kwargs={"num_workers": 1})
    assert trainer.train_dataloader is not None
    assert not trainer.train_dataloader.loader.persistent_workers


class Process(MapStyle):
    """Every sample is the number of the process that read it."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(os.getpid())]), 0


def test_workers_live_through_all_epochs_and_end_with_the_run() -> None:
    """Lesson A28: workers are not started again for every epoch, if they are to be kept."""
    # Loaders of torch that other tests have iterated keep theirs until they are collected.
    others = set(multiprocessing.active_children())
    trainer = Recording()
    arguments = {"num_workers": 1, "persistent_workers": True}
    trainer.train(Process(), num_epochs=3, train_dataloader_kwargs=arguments)
    workers = set(flat(trainer.trained))
    assert len(workers) == 1
    assert os.getpid() not in workers
    assert set(multiprocessing.active_children()) <= others


def test_workers_end_with_evaluation_and_with_an_error() -> None:
    others = set(multiprocessing.active_children())
    trainer = Recording()
    trainer.evaluate(MapStyle(), dataloader_kwargs={"num_workers": 1})
    assert set(multiprocessing.active_children()) <= others
    trainer.calculate_train_batch_loss = lambda batch: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError) as caught:
        trainer.train(MapStyle(), num_epochs=1, train_dataloader_kwargs={"num_workers": 1})
    assert set(multiprocessing.active_children()) <= others
    assert caught.value is not None


# ------------------------------------------------------------------ random samples


class Augmented(MapStyle):
    """Draws from all three generators."""

    def __getitem__(self, index: int) -> Any:
        drawn = index + random.random() / 3 + float(np.random.rand()) / 3 + torch.rand(()) / 3
        return drawn.reshape(1), 0


def augmented_run(num_workers: int, disturbance: int, **changed: Any) -> list[list[float]]:
    trainer = seeded_recording()
    random.seed(disturbance)
    np.random.seed(disturbance)
    torch.manual_seed(disturbance)
    arguments = {"num_workers": num_workers, **changed}
    trainer.train(
        Augmented(), 2, train_dataloader_kwargs=arguments, seed_each_sample=True, per_device_batch_size=4
    )
    return trainer.trained


def test_seeded_samples_are_the_same_with_any_workers_and_random_state() -> None:
    expected = augmented_run(0, 1)
    assert augmented_run(0, 2) == expected
    assert augmented_run(2, 3, persistent_workers=True) == expected
    assert augmented_run(1, 4, persistent_workers=False) == expected
    epochs = [sorted(flat(expected[:3])), sorted(flat(expected[3:]))]
    assert [int(value) for value in epochs[0]] == IN_ORDER
    assert not set(epochs[0]) & set(epochs[1])


def test_seeding_samples_leaves_the_random_state_of_the_process_alone() -> None:
    trainer = seeded_recording()
    before = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["pos"],
        torch.get_rng_state().tolist(),
    )
    trainer.train(Augmented(), 1, train_dataloader_kwargs={"num_workers": 0}, seed_each_sample=True)
    assert (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["pos"],
        torch.get_rng_state().tolist(),
    ) == before


# ------------------------------------------------------------------ shares of several processes


def shares(loader: Any, num_processes: int) -> list[list[list[float]]]:
    """The batches of each process, as each of them would read the loader."""
    parts = []
    for process in range(num_processes):
        sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup(num_processes, process))
        sharded.begin_epoch(0)
        plan = sharded.plan()
        batches = [inputs_of(batch).flatten().tolist() for batch in sharded]
        parts.append(
            batches
            if plan is None
            else [batch for batch, (_, own) in zip(batches, plan, strict=False) if own]
        )
    return parts


@pytest.mark.parametrize(
    "name", ["unsized", "ready loader of unsized data", "ready loader", "loader of nobody's"]
)
def test_processes_share_any_loader_without_repeating_or_leaving_out(name: str) -> None:
    source = SOURCES[name]()
    loader = source if hasattr(source, "batch_size") else DataLoader(source, batch_size=4)
    by_process = shares(loader, 2)
    assert sorted(flat(flat(by_process))) == IN_ORDER  # type: ignore[arg-type]
    assert all(by_process)


@pytest.mark.parametrize("loader_class", [DataLoader, OwnLoader])
def test_processes_share_ready_batches(loader_class: type[DataLoader[Any]]) -> None:
    batches = [(FEATURES[:4], 0), (FEATURES[4:8], 0), (FEATURES[8:], 0)]
    by_process = shares(loader_class(batches, batch_size=None, collate_fn=tuple), 2)  # type: ignore[arg-type]
    assert sorted(len(part) for part in by_process) == [1, 2]
    assert len(set(flat(flat(by_process)))) == SIZE  # type: ignore[arg-type]


# ------------------------------------------------------------------ streams with a state


class Stateful(IterableDataset[Any]):
    """Knows its place."""

    restores_exactly = True

    def __init__(self) -> None:
        self.position = 0
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        while self.position < SIZE:
            self.position += 1
            self.read.append(self.position - 1)
            yield PAIRS[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def test_a_stream_with_a_state_goes_on_where_it_was_and_reads_nothing_twice() -> None:
    loader = DataLoader(Stateful(), batch_size=3)
    first = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup())
    first.begin_epoch(0)
    batches = iter(first)
    seen = [inputs_of(next(batches)).flatten().tolist() for _ in range(2)]
    assert seen[1] == [3, 4, 5]
    state = first.source_state
    dataset = Stateful()
    second = ShardedDataLoader(DataLoader(dataset, batch_size=3), 0, torch.device("cpu"), DataGroup())
    second.begin_epoch(0, position=6)
    second.restore_source(state)
    rest = [inputs_of(batch).flatten().tolist() for batch in second]
    assert rest == [[6, 7, 8], [9, 10]]
    assert dataset.read == [6, 7, 8, 9, 10]


def test_a_stream_without_a_state_skips_to_where_it_was() -> None:
    sharded = ShardedDataLoader(DataLoader(Unsized(), batch_size=3), 0, torch.device("cpu"), DataGroup())
    sharded.begin_epoch(0, position=6, max_steps=3)
    assert [inputs_of(batch).flatten().tolist() for batch in sharded] == [[6, 7, 8]]


@pytest.mark.parametrize(
    ("batch_size", "processes", "expected"), [(2, 1, [7, 8]), (5, 1, [7, 8, 9, 10]), (2, 2, [7, 8, 9, 10])]
)
def test_a_stream_without_a_state_goes_on_with_the_next_sample_in_batches_of_another_size(
    batch_size: int, processes: int, expected: list[int]
) -> None:
    first = []
    for index in range(processes):
        loader = DataLoader(Unsized(), batch_size=batch_size)
        sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup(processes, index))
        sharded.begin_epoch(0, position=7)
        first += inputs_of(next(iter(sharded))).flatten().tolist()
        sharded.begin_epoch(1)
        assert inputs_of(next(iter(sharded))).flatten()[0] == batch_size * index, (
            "the next epoch begins at its beginning"
        )
    assert first == expected


def test_leaving_out_what_was_read_before_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel_core.data.source.SECONDS_BETWEEN_MESSAGES", 0.0)
    sharded = ShardedDataLoader(DataLoader(Unsized(), batch_size=3), 0, torch.device("cpu"), DataGroup())
    messages: list[str] = []
    sharded.log = messages.append
    sharded.begin_epoch(0, position=6)
    assert len(list(sharded)) == 2
    assert len(messages) == 2 and "1 of 2 batches" in messages[0] and "2 of 2 batches" in messages[1]
