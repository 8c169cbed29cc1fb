"""Each way out that an error about data names works: the mistake is made, then what the message says instead."""

import multiprocessing
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from accel_core import Trainer
from accel_core.data.shares import WAYS_OUT
from case_runner import run_as_script
from tiny import CountsTargets, Killed, Stream, tiny_data, tiny_trainer
from ways_out import (
    DATA,
    Row,
    check_every_error_is_known,
    check_told,
    make_mistake_and_ways_out,
    name_of,
    told,
    ways_out_of_checks,
)

PLACE = "accel-core/src/accel_core/data"
INPUTS, TARGETS = DATA.tensors
BATCHES = list(DataLoader(DATA, 4))
IS_FIRST_CLASS = TARGETS == 0


def train(data: Any = DATA, *, trainer: Any = None, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer() if trainer is None else trainer
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    assert trainer.run_progress.updates_completed > 0
    return trainer


def train_with(data: Any = DATA, **kwargs: Any) -> Trainer:
    """Train with arguments of a loader."""
    return train(data, train_dataloader_kwargs=kwargs)


class Ready:
    """Ready batches that can be read again."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class Samples:
    """Samples that can be read again, which are no data set of torch's."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(DATA))


class Counted(Stream):
    """A stream that knows how many samples it has."""

    def __len__(self) -> int:
        return len(self.data)


class AtTheTop(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


def of_the_top(samples: Any) -> Any:
    return AtTheTop(*default_collate(samples))


def of_a_local_class(samples: Any) -> Any:
    class Local(AtTheTop):
        pass

    return Local(*default_collate(samples))


class ByName(Trainer):
    """Takes batches of any class that has names."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss((batch.inputs, batch.targets))


def joined_by(collate_fn: Any, num_workers: int) -> Trainer:
    workers = {"num_workers": num_workers, "multiprocessing_context": "fork" if num_workers else None}
    trainer = tiny_trainer(ByName)
    return train(collate_fn=collate_fn, trainer=trainer, train_dataloader_kwargs=workers)


def started_by_spawn(collate_fn: Any, num_workers: int = 1) -> Trainer:
    spawn = multiprocessing.get_context("spawn") if num_workers else None
    kwargs = {"num_workers": num_workers, "multiprocessing_context": spawn}
    return train(trainer=tiny_trainer(CountsTargets), collate_fn=collate_fn, train_dataloader_kwargs=kwargs)


def read_killed(number: int, num_workers: int, **kwargs: Any) -> Trainer:
    """Train on data whose worker ends at the fifth sample; in this process it does not."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, nn.functional.mse_loss, optimizer, (), seed=0)
    return train(
        Killed(number), trainer=trainer, train_dataloader_kwargs={"num_workers": num_workers, **kwargs}
    )


def by_sampler(sampler: Any = None, **kwargs: Any) -> Trainer:
    return train(DataLoader(DATA, 4, sampler=sampler), **kwargs)


def share() -> Any:
    return DistributedSampler(DATA, num_replicas=2, rank=0)


def train_twice(data: Any) -> list[Trainer]:
    return [train(data), train(data)]


def of_loader(data: Any) -> int:
    return len(train(data).train_dataloader)


ROWS: tuple[Row, ...] = (
    Row(
        ", which Accelerate has prepared already, so it would be sharded twice. Pass the loader as it was before",
        lambda: train(Accelerator().prepare(DataLoader(DATA, 4))),
        (lambda: train(DataLoader(DATA, 4)),),
    ),
    Row(
        "but must be a data set (with __getitem__ and __len__, or iterable) or a ready DataLoader. Put tensors",
        lambda: train({"inputs": INPUTS, "targets": TARGETS}),
        (
            lambda: train(list(DATA)),
            lambda: train(Stream(DATA)),
            lambda: train(DataLoader(DATA, 4)),
            lambda: train(TensorDataset(INPUTS, TARGETS)),
        ),
    ),
    Row(
        " is empty: its length is 0, but it must have at least one sample. Check how it is read.",
        lambda: train([]),
        (lambda: train(tiny_data(1)),),
    ),
    Row(
        ", which can be read only once, but num_epochs is {}. Use num_epochs=1, or pass an object whose __iter__",
        lambda: train(iter(BATCHES), num_epochs=2),
        (lambda: train(iter(BATCHES), num_epochs=1), lambda: train(Ready(), num_epochs=2)),
    ),
    Row(
        " arrays of the length {}, which would be {} samples. Pass torch.utils.data.TensorDataset(inputs, targets)",
        lambda: train((INPUTS, TARGETS)),
        (lambda: train(TensorDataset(INPUTS, TARGETS)),),
    ),
    Row(
        "after torch.as_tensor for arrays of numpy.",
        lambda: train((INPUTS.numpy(), TARGETS.numpy())),
        (lambda: train(TensorDataset(*map(torch.as_tensor, (INPUTS.numpy(), TARGETS.numpy())))),),
    ),
    Row(
        "but must be a dictionary of arguments of torch's DataLoader. Pass dict(num_workers=2).",
        lambda: train(train_dataloader_kwargs=2),
        (lambda: train_with(num_workers=2),),
    ),
    Row(
        ", which keeps its own settings. Leave {} out, or pass the data set inside the loader.",
        lambda: train_with(DataLoader(DATA, 4), shuffle=False),
        (lambda: train_with(DataLoader(DATA, 4)), lambda: train_with(DATA, shuffle=False)),
    ),
    Row(
        " are taken for ready batches, so these settings have no use. Leave them out, or add 'batch_size'",
        lambda: train_with(Samples(), drop_last=True),
        (lambda: train_with(Ready()), lambda: train_with(Samples(), drop_last=True, batch_size=4)),
    ),
    Row(
        "which makes its own batches. Give the loader its collate_fn, pass the data set inside it, or add 'batch_size'",
        lambda: train(Ready(), collate_fn=default_collate, trainer=tiny_trainer(CountsTargets)),
        (
            lambda: train(
                DataLoader(DATA, 4, collate_fn=default_collate), trainer=tiny_trainer(CountsTargets)
            ),
            lambda: train(DATA, collate_fn=default_collate, trainer=tiny_trainer(CountsTargets)),
            lambda: train(
                Samples(),
                collate_fn=default_collate,
                trainer=tiny_trainer(CountsTargets),
                train_dataloader_kwargs={"batch_size": 4},
            ),
        ),
    ),
    Row(
        "which are True and False, not numbers of samples. Pass numpy.flatnonzero of them.",
        lambda: train(Subset(DATA, IS_FIRST_CLASS)),  # type: ignore[arg-type]
        (lambda: train(Subset(DATA, np.flatnonzero(IS_FIRST_CLASS))),),  # type: ignore[arg-type]
    ),
    Row(
        "The dataloader_kwargs have the key {}, which torch's DataLoader does not know.{}",
        lambda: train_with(num_worker=0),
        (lambda: train_with(num_workers=0),),
    ),
    Row(
        " are refused by torch's DataLoader over a {}: {} Leave out or change what it names.",
        lambda: train_with(num_workers=0, prefetch_factor=4),
        (lambda: train_with(num_workers=0), lambda: train_with(num_workers=1, prefetch_factor=4)),
    ),
    Row(
        "The number of batches of {} is not known: it has no __len__. Give it one that counts its samples.",
        lambda: of_loader(Stream(DATA)),
        (lambda: of_loader(Counted(DATA)),),
        TypeError,
    ),
    Row(
        ", gave no batch: it is empty, smaller than a batch of all processes with drop_last=True, or was read to",
        lambda: train_with(Stream(tiny_data(3)), drop_last=True),
        (
            lambda: train_with(Stream(tiny_data(4)), drop_last=True),
            lambda: train_with(Stream(tiny_data(3))),
        ),
    ),
    Row(
        "its end before. Pass more data, leave drop_last out, or pass an object whose __iter__ begins again.",
        lambda: train_twice(iter(BATCHES)),
        (lambda: train_twice(Ready()),),
    ),
    Row(
        ", which shards the data itself, as accel does too. Pass the data set alone, a sampler over all of it, or",
        lambda: by_sampler(share()),
        (
            lambda: train(DATA),
            lambda: by_sampler(RandomSampler(DATA)),
            lambda: by_sampler(share(), data_is_sharded=True),
        ),
    ),
    Row(
        "A worker cannot send its batch to the main process, since a part cannot be pickled: ",
        lambda: joined_by(of_a_local_class, num_workers=1),
        (lambda: joined_by(of_the_top, num_workers=1), lambda: joined_by(of_a_local_class, num_workers=0)),
        RuntimeError,
    ),
    Row(
        "ended with exit status {}. What it printed before says why; num_workers=0 shows it in this process.",
        lambda: read_killed(0, num_workers=1),
        (lambda: read_killed(0, num_workers=0),),
        RuntimeError,
    ),
    Row(
        "Was there not enough memory? Use fewer workers, a smaller batch or prefetch_factor, or a data set",
        lambda: read_killed(9, num_workers=1),
        (
            lambda: read_killed(9, num_workers=0),
            lambda: train_with(num_workers=1, batch_size=2, prefetch_factor=1),
        ),
        RuntimeError,
    ),
    Row(
        "Use 1 for batches of single samples.",
        lambda: train_with(batch_size=0),
        (lambda: train_with(batch_size=1),),
    ),
    Row(
        "Pass a function from a list of samples to a batch.",
        lambda: train(collate_fn=4),
        (lambda: train(collate_fn=default_collate, trainer=tiny_trainer(CountsTargets)),),
    ),
)

# Python is started anew for the worker.
SPAWNED = Row(
    "cannot be pickled: {}. Define classes and functions at the top of a module, or pass num_workers=0.",
    lambda: started_by_spawn(lambda samples: default_collate(samples)),
    (
        lambda: started_by_spawn(default_collate),
        lambda: started_by_spawn(lambda samples: default_collate(samples), num_workers=0),
    ),
)

FACTS = {
    "Use the version of accel that wrote the state.": "a test has no version of the future",
}


# ---------------------------------------------------------------------- on two processes


def own_share() -> Any:
    index = Accelerator().process_index
    return Subset(DATA, range(8 * index, 8 * index + 8))


class Shards(IterableDataset[Any]):
    """As the streams of these packages, which can give each process its own share."""

    __module__ = "streaming"

    def __init__(self, gives_shares: bool) -> None:
        self.gives_shares = gives_shares

    def __iter__(self) -> Iterator[Any]:
        return iter(own_share() if self.gives_shares else DATA)


def subsets(batch_size: int) -> list[str]:
    return told(
        lambda: train(own_share()),
        lambda: train(DATA),
        lambda: train(own_share(), data_is_sharded=True),
    )


def streams(batch_size: int) -> list[str]:
    return told(
        lambda: train(Shards(True)),
        lambda: train(Shards(False)),
        lambda: train(Shards(True), data_is_sharded=True),
    )


CASES = {
    " with different samples on each of the {} processes. It is a shard already, and accel would shard it": subsets,
    "The first item of the {} differs between {} processes. It seems to be a shard already": streams,
}


# ---------------------------------------------------------------------- the tests


def test_every_error_about_data_is_known() -> None:
    checks = [text for text in ways_out_of_checks(PLACE) if text]
    rows = [row.text for row in (*ROWS, SPAWNED) if row.text not in checks]
    assert set(checks) <= {row.text for row in ROWS}
    check_every_error_is_known(PLACE, rows=[*rows, *CASES], facts=FACTS)


# A file that a worker was handing over is lost with it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("row", [*ROWS, pytest.param(SPAWNED, marks=pytest.mark.seconds)], ids=name_of)
def test_what_an_error_about_data_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


@pytest.mark.slow
@pytest.mark.parametrize("text", CASES)
def test_what_an_error_about_shares_says_instead_works(outcome: Any, text: str) -> None:
    for said in outcome.of(text):
        check_told(text, said, says=WAYS_OUT)


if __name__ == "__main__":
    run_as_script(CASES)
