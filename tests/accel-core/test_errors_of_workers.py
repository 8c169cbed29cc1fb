"""What goes wrong in a worker gets a sentence: killed workers, errors that cannot be sent, data that cannot be pickled."""

import dataclasses
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accel_core import ConfigurationError, Trainer
from tiny import Killed, KilledStream, Sized

# A file that a worker was handing over is lost with it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Torch notices the end of a worker when it waits for a batch, or anywhere else, by a signal.
LOST = r"killed by (SIGKILL \(exit status -9\)|signal: Killed)[\s\S]*memory\?[\s\S]*fewer workers"


def trainer() -> Trainer:
    model = nn.Linear(1, 1)
    return Trainer(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), (), seed=0)


def run(method: str, data: Any, **kwargs: Any) -> None:
    if method == "train":
        trainer().train(data, 1, per_device_batch_size=2, train_dataloader_kwargs=kwargs)
    else:
        getattr(trainer(), method)(data, 2, dataloader_kwargs=kwargs)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the platform has no such signals")
@pytest.mark.parametrize(
    ("method", "kind", "num_workers"),
    [
        ("train", Killed, 1),
        ("train", KilledStream, 2),
        ("evaluate", Killed, 2),
        ("predict", KilledStream, 1),
    ],
)
def test_a_worker_that_was_killed_is_named_with_its_exit_status(
    method: str, kind: Any, num_workers: int
) -> None:
    with pytest.raises(RuntimeError, match=LOST):
        run(method, kind(signal.SIGKILL), num_workers=num_workers)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the platform has no such signals")
@pytest.mark.seconds
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_a_killed_worker_is_named_however_it_was_started(context: str) -> None:
    with pytest.raises(RuntimeError, match=LOST):
        run("train", Killed(signal.SIGKILL), num_workers=1, multiprocessing_context=context)


def test_a_killed_worker_of_the_users_own_loader_is_named() -> None:
    loader = DataLoader(KilledStream(signal.SIGKILL), batch_size=2, num_workers=1)

    class Own(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:
            return super().__iter__()

    for each in (loader, Own(Killed(0), batch_size=2, num_workers=1)):
        with pytest.raises(
            RuntimeError,
            match=r"SIGKILL|signal: Killed|ended with exit status 3.*num_workers=0|with exit code 3",
        ):
            trainer().train(each, 1)


def test_what_a_worker_raises_stays_the_users_own() -> None:
    class Fails(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise ConnectionResetError("the server has gone")

    with pytest.raises(ConnectionResetError, match="the server has gone"):
        run("train", Fails(), num_workers=1)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_an_error_of_a_stream_that_cannot_be_sent_is_told(num_workers: int, when: str) -> None:
    class LocalError(Exception):
        def __init__(self, code: int, why: str) -> None:
            super().__init__(code, why)

    class Fails(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            if when == "at the start":
                raise LocalError(4, "not opened")
            for _ in range(3):
                yield torch.zeros(1), torch.zeros(1)
            raise LocalError(4, "not read")

    with pytest.raises(
        RuntimeError, match=r"LocalError in a worker.*top of a module[\s\S]*not (opened|read)"
    ):
        run("train", Fails(), num_workers=num_workers)


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
@pytest.mark.parametrize("method", ["train", "evaluate", "predict"])
def test_local_classes_cannot_be_sent_to_workers_that_are_spawned(context: str, method: str) -> None:
    class Local(Sized):
        pass

    with pytest.raises(
        ConfigurationError,
        match=rf"{context}.*data set cannot be pickled.*Local.*top of a module.*num_workers=0",
    ):
        run(method, Local(), num_workers=1, multiprocessing_context=context)


def test_a_local_collate_function_cannot_be_sent_either() -> None:
    kwargs = {"num_workers": 1, "multiprocessing_context": "spawn", "collate_fn": lambda samples: samples}
    with pytest.raises(ConfigurationError, match=r"spawn.*collate_fn cannot be pickled"):
        run("train", Sized(), **kwargs)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Its constructor asks for other arguments than there are fields."""

    inputs: torch.Tensor = dataclasses.field(init=False)
    targets: torch.Tensor = dataclasses.field(init=False)
    samples: dataclasses.InitVar[Any]

    def __post_init__(self, samples: Any) -> None:
        object.__setattr__(self, "inputs", torch.stack([sample[0] for sample in samples]))
        object.__setattr__(self, "targets", torch.stack([sample[1] for sample in samples]))


class OfPairs(Trainer):
    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_eval_batch_loss((batch.inputs, batch.targets))

    def calculate_predictions(self, batch: Any) -> Any:
        return dataclasses.replace(batch, samples=[(row, row) for row in batch.inputs])


def test_dataclasses_of_any_constructor_are_joined() -> None:
    model = nn.Linear(1, 1)
    predicting = OfPairs(model, nn.functional.mse_loss, None, ())
    outputs = predicting.predict(Sized(), 3, collate_fn=Pair)
    assert type(outputs) is Pair
    assert outputs.inputs.shape == outputs.targets.shape == (8, 1)
    assert outputs.inputs.flatten().tolist() == [1.0] * 8
