"""In every epoch the data is read as it is in the main process, whoever reads it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
)

from accel_core import Trainer, TrainerCallback
from accel_core.data.content import digest_of
from accel_core.data.parts import announce_epoch, parts_of
from tiny import Sized

WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"num_workers": 1},
    "two that are kept": {"num_workers": 2, "persistent_workers": True},
}
START_METHODS = [
    pytest.param("spawn", False, marks=pytest.mark.slow),
    pytest.param("forkserver", True, marks=pytest.mark.slow),
]


class OfEpoch(Sized):
    """Each sample is the epoch that the data set was told."""

    def set_epoch(self, epoch: int) -> None:
        self.size = epoch


class StreamOfEpoch(IterableDataset[Any]):
    """A stream of the epoch that it was told."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor([float(self.epoch)]), torch.zeros(1))] * 8)


class Wrapper(Dataset[Any]):
    """A wrapper of the user's own, which passes on what it does not know."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __len__(self) -> int:
        return len(self.inside)

    def __getitem__(self, index: int) -> Any:
        return self.inside[index]

    def __getattr__(self, name: str) -> Any:
        if name == "inside":
            raise AttributeError(name)
        return getattr(self.inside, name)


class PlainWrapper:
    """One that is no class of torch's, and keeps its data under a private name."""

    def __init__(self, inside: Any) -> None:
        self._data = inside

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        return self._data[index]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda data: data,
    "subset of a subset": lambda data: Subset(Subset(data, range(8)), list(range(8))),
    "joined": lambda data: ConcatDataset([Subset(data, range(4)), Subset(data, range(4, 8))]),
    "own wrappers": lambda data: Wrapper(PlainWrapper(data)),
}


class Recording(Trainer):
    """Keeps the samples of each epoch, of training and of evaluation."""

    def __init__(self, *callbacks: TrainerCallback) -> None:
        model = nn.Linear(1, 1)
        super().__init__(
            model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks, seed=0
        )
        self.trained: list[set[float]] = []
        self.evaluated: list[set[float]] = []

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        self.trained.append(set())

    def eval_epoch_start(self) -> None:
        super().eval_epoch_start()
        self.evaluated.append(set())

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.trained[-1].update(batch[0].flatten().tolist())
        return super().calculate_train_batch_loss(batch)

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.evaluated[-1].update(batch[0].flatten().tolist())
        return super().calculate_eval_batch_loss(batch)


class Grow(TrainerCallback):
    """Raises the size of a data set at an event of each epoch."""

    def __init__(self, data: Sized, event: str) -> None:
        self.data = data
        setattr(self, event, self.grow)

    def grow(self, trainer: Trainer, **event: Any) -> None:
        self.data.size = trainer.run_progress.epochs_completed + 1

    on_train_epoch_start = on_training_run_epoch_end = lambda self, trainer: None


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("event", ["on_train_epoch_start", "on_training_run_epoch_end"])
def test_a_change_between_epochs_counts_in_training_and_evaluation(workers: str, event: str) -> None:
    data = Sized()
    trainer = Recording(Grow(data, event))
    loading = {"train_dataloader_kwargs": WORKERS[workers], "eval_dataloader_kwargs": WORKERS[workers]}
    trainer.train(data, 3, data, **loading)
    assert trainer.trained == trainer.evaluated == [{1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize(("method", "is_kept"), START_METHODS)
def test_a_change_counts_however_workers_are_started(method: str, is_kept: bool) -> None:
    data = Sized()
    trainer = Recording(Grow(data, "on_train_epoch_start"))
    loading = {"num_workers": 1, "multiprocessing_context": method, "persistent_workers": is_kept}
    trainer.train(data, 2, train_dataloader_kwargs=loading)
    assert trainer.trained == [{1.0}, {2.0}]


def test_a_change_counts_without_any_argument_of_the_loader() -> None:
    data = Sized()
    trainer = Recording(Grow(data, "on_train_epoch_start"))
    trainer.train(data, 3)
    assert trainer.trained == [{1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("workers", WORKERS)
def test_map_style_data_is_told_the_epoch_through_wrappers(workers: str, wrapper: str) -> None:
    trainer = Recording()
    trainer.train(WRAPPERS[wrapper](OfEpoch()), 3, train_dataloader_kwargs=WORKERS[workers])
    assert trainer.trained == [{0.0}, {1.0}, {2.0}]


@pytest.mark.parametrize("workers", WORKERS)
def test_streams_are_told_the_epoch_in_the_process_that_reads(workers: str) -> None:
    trainer = Recording()
    trainer.train(StreamOfEpoch(), 3, train_dataloader_kwargs=WORKERS[workers])
    assert trainer.trained == [{0.0}, {1.0}, {2.0}]


class OwnLoader(DataLoader[Any]):
    """A loader that iterates in its own way."""

    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize("loader_class", [DataLoader, OwnLoader])
def test_ready_loaders_are_told_the_epoch(loader_class: type[DataLoader[Any]]) -> None:
    trainer = Recording()
    trainer.train(loader_class(OfEpoch(), batch_size=4, num_workers=1, persistent_workers=True), 3)
    assert trainer.trained == [{0.0}, {1.0}, {2.0}]


class Told(Sampler[Any]):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


class OwnBatches(BatchSampler):
    """Batches of the user's own, over a sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        return super().__iter__()


@pytest.mark.parametrize("name", ["sampler", "batch_sampler of torch", "batch_sampler of one's own"])
def test_samplers_are_told_each_epoch_once_at_any_depth(name: str) -> None:
    told = Told()
    kwargs: dict[str, Any] = {"sampler": told}
    if name != "sampler":
        kind = BatchSampler if name.endswith("torch") else OwnBatches
        kwargs = {"batch_sampler": kind(told, 4, False)}
    Recording().train(Sized(), 3, train_dataloader_kwargs=kwargs)
    assert told.epochs == [0, 1, 2]


def test_an_evaluation_in_mid_epoch_leaves_data_that_training_shares_at_its_epoch() -> None:
    class Evaluate(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            trainer.run_eval_epoch(is_intermediate=True)

    data = OfEpoch()
    trainer = Recording(Evaluate())
    trainer.train(Subset(data, range(6)), 3, Subset(data, range(6, 8)), per_device_batch_size=2)
    assert trainer.trained == [{0.0}, {1.0}, {2.0}]


class Pids(Sized):
    """Each sample is the process that read it."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(os.getpid())]), torch.zeros(1)


def test_workers_are_kept_as_long_as_their_copies_are_true() -> None:
    data = Pids()

    class Change(TrainerCallback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            data.size = max(trainer.run_progress.current_epoch, 2)

    trainer = Recording(Change())
    trainer.train(data, 3, train_dataloader_kwargs={"num_workers": 1, "persistent_workers": True})
    # Sizes 2, 2, 3.
    assert trainer.trained[0] == trainer.trained[1] != trainer.trained[2]


def test_exchanged_tensors_and_indices_are_read_in_the_next_epoch() -> None:
    data = TensorDataset(torch.zeros(8, 1), torch.zeros(8, 1))
    part = Subset(data, [0, 1])

    class Exchange(TrainerCallback):
        def on_train_epoch_start(self, trainer: Trainer) -> None:
            epoch = trainer.run_progress.epochs_completed
            data.tensors = (torch.arange(8.0).unsqueeze(1) + 10 * epoch, torch.zeros(8, 1))
            part.indices = range(epoch, 8)

    trainer = Recording(Exchange())
    trainer.train(part, 3)
    assert trainer.trained == [{10.0 * epoch + index for index in range(epoch, 8)} for epoch in range(3)]


def test_parts_are_found_once_each() -> None:
    inside = OfEpoch()
    data = ConcatDataset([Subset(inside, [0]), Wrapper(inside)])
    assert sum(part is inside for part in parts_of(DataLoader(data))) == 1
    assert announce_epoch(DataLoader(data), 4) == {id(inside)}
    assert inside.size == 4


def test_a_digest_follows_values_classes_and_what_functions_have_captured(tmp_path: Path) -> None:
    switch = {"mosaic": True}

    class Local(Sized):
        scale = 1.0

    data = Local()
    data.transform = lambda value: value if switch["mosaic"] else -value  # type: ignore[attr-defined]
    data.table = torch.zeros(3)  # type: ignore[attr-defined]
    with (tmp_path / "file").open("w") as file:
        data.file = file  # type: ignore[attr-defined]
        digests = [digest_of(data), digest_of(data)]
        assert digests[0] == digests[1] is not None
        switch["mosaic"] = False
        digests.append(digest_of(data))
        Local.scale = 2.0
        digests.append(digest_of(data))
        data.table.data[1] = 1.0  # type: ignore[attr-defined]
        digests.append(digest_of(data))
    assert len(set(digests)) == 4
    assert digest_of(iter([])) is not None
    assert digest_of(value for value in ()) is None
