"""A kind of data is one class and one entry in SOURCES: here one that no line of the library knows."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from accel_core import Trainer
from accel_core.data import loader as data_loader
from accel_core.data.loader import ShardedDataLoader
from accel_core.data.source import Source
from accel_core.processes.group import DataGroup
from tiny import Seen

SIZE = 10


class Ring:
    """The numbers of a ring: each epoch begins one further. Its batches cannot be iterated."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the kind of data reads by `between`")

    def between(self, epoch: int, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = (torch.arange(first, stop, dtype=torch.float32) + epoch) % SIZE
        return numbers.unsqueeze(1), torch.zeros(stop - first, 1)


class RingSource:
    """The part of a step that falls to this process, computed from where the step begins."""

    is_sized = True
    num_samples = SIZE
    may_lack_batches = False
    state = None

    def __init__(self, loader: Ring, seed: int, group: DataGroup, seed_each_sample: bool) -> None:
        self.ring = loader
        self.group = group
        self.batch_size = loader.batch_size
        self.num_steps = SIZE // (loader.batch_size * group.size)
        self.closed = 0

    @classmethod
    def accepts(cls, loader: Any) -> bool:
        return isinstance(loader, Ring)

    def begin_epoch(self, epoch: int, position: int, max_steps: int | None) -> None:
        step_size = self.batch_size * self.group.size
        self.epoch = epoch
        self.starts = list(range(0, SIZE, step_size))[:max_steps][position // step_size :]

    def plan(self) -> list[tuple[int, int]]:
        return [(self.batch_size * self.group.size, self.batch_size)] * len(self.starts)

    def read(self, log: Callable[[str], object]) -> Iterator[Any]:
        for start in self.starts:
            first = start + self.group.index * self.batch_size
            yield self.ring.between(self.epoch, first, first + self.batch_size)

    def restore(self, state: Any) -> None: ...

    def limits_of_exactness(self, saved_position: int, saved_num_processes: int) -> list[str]:
        return ["The ring has been turned meanwhile."] if saved_position else []

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[type[Source]] = [RingSource, *data_loader.SOURCES]
    monkeypatch.setattr(data_loader, "SOURCES", sources)


def trainer_with(*callbacks: Any) -> Trainer:
    model = nn.Linear(1, 1)
    return Trainer(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01), callbacks=callbacks
    )


def test_a_new_kind_of_data_is_trained_on_evaluated_and_closed() -> None:
    seen = Seen()
    trainer = trainer_with(seen)
    trainer.train(Ring(2), num_epochs=2, eval_dataset=Ring(5))
    assert [int(sample) for sample in seen.samples] == [*range(SIZE), *range(1, SIZE), 0]
    assert trainer.run_config.num_update_steps == 10
    assert trainer.run_config.eval_per_device_batch_size == 5
    assert trainer.train_dataloader is not None
    source = trainer.train_dataloader.source
    assert isinstance(source, RingSource)
    assert source.closed == 1
    assert repr(trainer.train_dataloader) == "ShardedDataLoader(RingSource of Ring)"
    assert trainer.evaluate(Ring(5)).keys() == {"evaluation_loss"}


def test_a_new_kind_of_data_is_limited_and_resumed_and_says_what_it_cannot_promise(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trainer_with()
    first.train(Ring(2), max_num_train_steps=3)
    first.save_training_state(tmp_path / "state")
    seen = Seen()
    trainer_with(seen).train(Ring(2), num_epochs=1, resume_from=tmp_path / "state")
    assert [int(sample) for sample in seen.samples] == [6, 7, 8, 9]
    assert "The ring has been turned meanwhile." in capsys.readouterr().out


def test_a_new_kind_of_data_is_sharded_by_itself() -> None:
    shards = []
    for index in range(2):
        sharded = ShardedDataLoader(Ring(2), 0, torch.device("cpu"), DataGroup(2, index))
        sharded.begin_epoch(0, max_steps=2)
        assert sharded.plan() == [(4, 2), (4, 2)]
        shards.append([batch.flatten().tolist() for batch, _ in sharded])
    assert shards == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
