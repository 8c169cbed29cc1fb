"""Each kind of data gives the samples that a plain loop reads, on two processes each exactly once."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    StackDataset,
    Subset,
    TensorDataset,
)

from accel_core import Trainer
from accel_core.data.defaults import create_dataloader, default_dataloader_kwargs
from accel_core.data.loader import ShardedDataLoader
from accel_core.processes.group import DataGroup

SIZE = 22
X = torch.arange(float(SIZE)).unsqueeze(1)
TENSORS = TensorDataset(X, X)
PAIRS = [(x, x) for x in X]


class ByIndex(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return PAIRS[index]


class ByBatch(ByIndex):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [PAIRS[index] for index in indices]


class Duck:
    """No class of torch's."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if index >= SIZE:
            raise IndexError(index)
        return PAIRS[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(PAIRS)


class SizedStream(Stream):
    def __len__(self) -> int:
        return SIZE


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(TENSORS, batch_size=5))


class Backwards(Sampler[int]):
    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE - 1, -1, -1))


class OwnLoader(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


class Further(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        return PAIRS[index]


def hugging_face(is_stream: bool) -> Any:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": X.tolist()}).with_format("torch")
    return table.to_iterable_dataset() if is_stream else table


KINDS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: TENSORS,
    "subclass of tensors": lambda: Further(X, X),
    "subset of tensors": lambda: Subset(TENSORS, [3, 1, -1]),
    "map-style": ByIndex,
    "read by batch": ByBatch,
    "no class of torch": Duck,
    "subset": lambda: Subset(ByIndex(), range(2, 19)),
    "joined": lambda: ConcatDataset([ByIndex(), Subset(ByIndex(), range(5))]),
    "stacked": lambda: StackDataset(ByIndex(), ByIndex()),
    "list": lambda: PAIRS,
    "tuple": lambda: tuple(PAIRS),
    "one tensor": lambda: X,
    "one array": lambda: np.asarray(X),
    "stream": Stream,
    "stream with a length": SizedStream,
    "joined streams": lambda: ChainDataset([Stream(), SizedStream()]),
    "ready batches": Batches,
    "loader": lambda: DataLoader(TENSORS, batch_size=5),
    "loader of one's own": lambda: OwnLoader(TENSORS, batch_size=5),
    "loader with a sampler": lambda: DataLoader(TENSORS, batch_size=5, sampler=Backwards()),
    "loader with a batch sampler": lambda: DataLoader(
        TENSORS, batch_sampler=BatchSampler(Backwards(), 4, False)
    ),
    "table of Hugging Face": lambda: hugging_face(False),
    "stream of Hugging Face": lambda: hugging_face(True),
}


def values(batch: Any) -> list[int]:
    """The first number of each sample of a batch."""
    while not isinstance(batch, (torch.Tensor, np.ndarray)):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return [int(value) for value in batch.reshape(-1)]


def plain(data: Any) -> list[int]:
    """What a loop reads that is written by hand."""
    is_loader = isinstance(data, (DataLoader, Batches))
    loader = data if is_loader else DataLoader(data, batch_size=4)
    return [value for batch in loader for value in values(batch)]


class Recording(Trainer):
    def __init__(self) -> None:
        model = nn.Linear(1, 1)
        super().__init__(model, None, torch.optim.SGD(model.parameters(), lr=0.0), (), seed=0)
        self.trained: list[int] = []
        self.evaluated: list[int] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.trained += values(batch)
        return {
            "loss": self.model(torch.ones(1, 1)).mean(),
            "model_outputs": None,
            "batch_size": len(values(batch)),
        }

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.evaluated += values(batch)
        return {"loss": torch.zeros(()), "model_outputs": None, "batch_size": len(values(batch))}


@pytest.mark.parametrize("name", KINDS)
def test_one_process_reads_what_a_plain_loop_reads(name: str) -> None:
    expected = plain(KINDS[name]())
    trainer = Recording()
    trainer.train(KINDS[name](), 2, KINDS[name](), per_device_batch_size=4)
    half = len(expected)
    assert Counter(trainer.trained[:half]) == Counter(trainer.trained[half:]) == Counter(expected)
    assert trainer.evaluated == expected * 2


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_read_each_sample_once(name: str) -> None:
    data = KINDS[name]()
    defaults = default_dataloader_kwargs(data, 4, True, Recording().accelerator)
    loader = create_dataloader(data, defaults, None, None)
    read: Counter[int] = Counter()
    for index in range(2):
        sharded = ShardedDataLoader(loader, 0, torch.device("cpu"), DataGroup(2, index))
        sharded.begin_epoch(1)
        for batch in sharded:
            read.update(values(batch))
    assert read == Counter(plain(KINDS[name]()))
