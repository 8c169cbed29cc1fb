"""Without a word from the user the main process reads, and slow data is reported once."""

import dataclasses
import multiprocessing
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from accel_core import Trainer, TrainerCallback
from accel_core.data.defaults import default_dataloader_kwargs
from accel_core.data.devices import move_to_device
from accel_core.data.waiting import NEVER, WaitingReport

SIZE = 60


def trainer_of(*callbacks: TrainerCallback, trainer_class: type[Trainer] = Trainer) -> Trainer:
    model = nn.Linear(1, 1)
    return trainer_class(
        model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), callbacks, seed=0
    )


class InZip(Dataset[Any]):
    """Opens its file when it is made. A sample is what it reads there, and what it should have read."""

    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for index in range(SIZE):
                archive.writestr(str(index), bytes([index]) * 2000)
        self.archive = zipfile.ZipFile(path)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(self.archive.read(str(index))[0])]), torch.tensor([float(index)])


class Compare(TrainerCallback):
    """Collects the pairs of what was read and what should have been."""

    def __init__(self) -> None:
        self.pairs: set[tuple[float, float]] = set()

    def on_train_step_end(self, trainer: Trainer, batch: Any, **event: Any) -> None:
        self.pairs.update(zip(batch[0].flatten().tolist(), batch[1].flatten().tolist(), strict=True))


def test_a_file_that_the_data_set_has_opened_gives_the_samples_that_were_asked_for(tmp_path: Path) -> None:
    compare = Compare()
    trainer_of(compare).train(InZip(tmp_path / "samples.zip"), 2)
    assert compare.pairs == {(float(index), float(index)) for index in range(SIZE)}


class Ones(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.ones(1), torch.zeros(1)


def train_in_daemon() -> None:
    trainer_of().train(Ones(), 1)


def test_a_process_that_may_have_no_children_can_train() -> None:
    daemon = multiprocessing.get_context("fork").Process(target=train_in_daemon, daemon=True)
    daemon.start()
    daemon.join(60)
    assert daemon.exitcode == 0


class OnGpu:
    """Of an accelerator only the device is asked."""

    device = torch.device("cuda")
    num_processes = 1


@pytest.mark.parametrize(("where", "expected"), [("cpu", True), ("meta", False)])
def test_only_what_can_be_pinned_is_pinned(where: str, expected: bool) -> None:
    class Own(Dataset[Any]):
        def __init__(self) -> None:
            self.parts = {"x": torch.empty(4, device=where)}

    tensors = TensorDataset(torch.empty(4, device=where))
    accelerator: Any = OnGpu()
    for data in (
        tensors,
        Subset(tensors, [0]),
        ConcatDataset([Subset(tensors, [0]), tensors]),
        Own(),
        [torch.ones(1, device=where)],
    ):
        kwargs = default_dataloader_kwargs(data, 4, True, accelerator)
        assert (kwargs["num_workers"], kwargs["pin_memory"]) == (0, expected)
    sparse = TensorDataset(torch.eye(4).to_sparse())
    assert not default_dataloader_kwargs(sparse, 4, True, accelerator)["pin_memory"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "a"


class Asks:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: Any, non_blocking: bool = False) -> "Asks":
        return Asks(self.x.to(device))


class Pair(NamedTuple):
    x: torch.Tensor
    y: Any


def test_batches_of_any_structure_are_moved() -> None:
    x = torch.ones(2)
    meta = torch.device("meta")
    moved = move_to_device({"a": [Frozen(x), (Pair(x, Frozen(x)),)], "b": Asks(x), "c": "text"}, meta)
    tensors = [moved["a"][0].x, moved["a"][1][0].x, moved["a"][1][0].y.x, moved["b"].x]
    assert all(tensor.device == meta for tensor in tensors)
    assert isinstance(moved["a"][1][0], Pair) and moved["a"][0].name == "a" and moved["c"] == "text"
    assert x.device.type == "cpu"


# ------------------------------------------------------------------ waiting


class Slow(Ones):
    def __getitem__(self, index: int) -> Any:
        time.sleep(0.03)
        return super().__getitem__(index)


class SlowStream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Slow()[index] for index in range(8))


@pytest.mark.parametrize(
    ("data", "way_out"),
    [
        (Slow(), "try train_dataloader_kwargs={'num_workers': "),
        (DataLoader(Slow(), batch_size=4), "in your DataLoader"),
        (SlowStream(), "get_worker_info"),
    ],
    ids=["map-style", "loader", "stream"],
)
def test_slow_data_is_reported_once_with_the_way_out(
    data: Any, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of().train(data, 3)
    printed = [line for line in capsys.readouterr().out.splitlines() if "waiting for data" in line]
    assert len(printed) == 1
    assert way_out in printed[0]
    assert 20 < int(printed[0].split(" %")[0].split()[-1]) <= 100


def test_slow_evaluation_data_and_quick_data_are_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    trainer_of().train(Ones(), 2, Slow())
    trainer_of().evaluate(Slow())
    assert "waiting" not in capsys.readouterr().out


def test_waiting_is_reported_after_half_a_minute_of_a_long_epoch() -> None:
    told: list[str] = []
    report = WaitingReport(DataLoader(Slow()))
    report.begin(100.0, 5.0)
    assert report.due_at == 130.0
    report.look(131.0, 5.0 + 31 * 0.37, told.append)
    assert told[0].startswith("37 % of the time was spent waiting for data; try ")
    report.begin(200.0, 50.0)
    report.look(300.0, 150.0, told.append)
    assert len(told) == 1 and report.due_at == NEVER


def test_the_start_of_workers_is_no_waiting() -> None:
    told: list[str] = []
    for waited in (11.0, 15.0):
        report = WaitingReport(DataLoader(Slow(), num_workers=2))
        report.begin(0.0, 0.0)
        report.look(10.0, 10.0, told.append)
        report.look(20.0, waited, told.append)
    assert len(told) == 1 and told[0].startswith("50 %")
