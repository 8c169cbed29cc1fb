"""What is legal in a plain loader works here too, and what would hang or mislead gets a sentence."""

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from accel_core import ConfigurationError, Trainer

X = torch.arange(8.0).unsqueeze(1)
DATA = TensorDataset(X, X)


class Recording(Trainer):
    def __init__(self) -> None:
        model = nn.Linear(1, 1)
        super().__init__(
            model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), (), seed=0
        )
        self.seen: list[int] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.seen += batch[0].flatten().int().tolist()
        return super().calculate_train_batch_loss(batch)


class ByIndex(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return DATA[index]


@pytest.mark.parametrize("data", [DATA, ByIndex()], ids=["tensors", "by index"])
@pytest.mark.parametrize(
    "indices", [[-1, -2, 0, 1], np.array([3, -8]), torch.tensor([-1, 7]), range(-3, 3)], ids=repr
)
def test_indices_from_the_end_are_those_of_python(data: Any, indices: Any) -> None:
    trainer = Recording()
    trainer.train(Subset(data, indices), 1, train_dataloader_kwargs={"shuffle": False})
    assert trainer.seen == [int(X[int(index)]) for index in indices]


def test_subsets_of_subsets_count_from_their_own_end() -> None:
    trainer = Recording()
    part = Subset(Subset(DATA, [2, 4, 6]), [-1, 0])
    trainer.train(part, 1, train_dataloader_kwargs={"shuffle": False})
    assert trainer.seen == [6, 2]


@pytest.mark.parametrize(
    "indices", [[True, False], np.array([True, False]), torch.tensor([True, False])], ids=repr
)
def test_masks_are_no_indices(indices: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"train_dataset.*True.*flatnonzero"):
        Recording().train(Subset(DATA, indices), 1)


@pytest.mark.parametrize("kwargs", [None, {"shuffle": True}])
def test_predictions_of_shuffled_data_are_refused(kwargs: Any) -> None:
    data = DataLoader(DATA, shuffle=True) if kwargs is None else DATA
    with pytest.raises(ConfigurationError, match=r"RandomSampler.*order of the data.*shuffle=False"):
        Recording().predict(data, dataloader_kwargs=kwargs)


def test_keys_of_a_loader_of_ones_own_are_passed_on() -> None:
    class Own(Recording):
        def create_train_dataloader(
            self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None
        ) -> Any:
            assert train_dl_kwargs == {"input_size": 3}
            return DataLoader(self.train_dataset, batch_size)

    trainer = Own()
    trainer.train(DATA, 1, train_dataloader_kwargs={"input_size": 3})
    assert trainer.seen == list(range(8))
    with pytest.raises(ConfigurationError, match="input_size"):
        Recording().train(DATA, 1, train_dataloader_kwargs={"input_size": 3})


def test_a_batch_that_a_worker_cannot_send_is_an_error() -> None:
    Local = namedtuple("Local", "x y")

    class OfLocal(ByIndex):
        def __getitem__(self, index: int) -> Any:
            return Local(*DATA[index])

    with pytest.raises(RuntimeError, match=r"cannot send its batch.*top of a module"):
        Recording().train(OfLocal(), 1, train_dataloader_kwargs={"num_workers": 1})


def test_an_error_of_a_collate_function_that_a_worker_cannot_send_is_an_error() -> None:
    class LocalError(Exception):
        pass

    def fail(samples: Any) -> Any:
        raise LocalError("not joined")

    with pytest.raises(RuntimeError, match="LocalError"):
        Recording().train(ByIndex(), 1, train_dataloader_kwargs={"num_workers": 1}, collate_fn=fail)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_default_device_is_not_that_of_indices(shuffle: bool) -> None:
    before = torch.get_default_device()
    trainer = Recording()
    torch.set_default_device("meta")
    try:
        trainer.train(DATA, 1, train_dataloader_kwargs={"shuffle": shuffle})
    finally:
        torch.set_default_device(before)
    assert sorted(trainer.seen) == list(range(8))
