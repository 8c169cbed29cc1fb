"""Items of loaders are batches, items of data sets are samples, and the user may say otherwise."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accel_core import ConfigurationError, Trainer

BATCHES = [(torch.arange(5.0).unsqueeze(1) + 5 * number, torch.zeros(5, 1)) for number in range(4)]


class Recording(Trainer):
    """Keeps the shapes of the inputs of its batches."""

    def __init__(self) -> None:
        model = nn.Linear(1, 1)
        super().__init__(
            model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.0), (), seed=0
        )
        self.shapes: list[tuple[int, ...]] = []
        self.samples: list[float] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.shapes.append(tuple(batch[0].shape))
        self.samples += batch[0].flatten().tolist()
        return super().calculate_train_batch_loss(batch)

    calculate_eval_batch_loss = calculate_train_batch_loss


class OnlyIterable:
    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class WithLength(OnlyIterable):
    def __len__(self) -> int:
        return len(BATCHES)


class WithSize(OnlyIterable):
    batch_size = 5


class WebLoader(IterableDataset[Any]):
    """webdataset's own is a data set of torch's too."""

    __module__ = "webdataset.compat"

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class PrefetchLoader:
    """timm's own hides a data set by index."""

    __module__ = "timm.data.loader"

    def __init__(self) -> None:
        self.dataset = [sample for x, y in BATCHES for sample in zip(x, y, strict=True)]

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a loader is iterated")

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class Loader(OnlyIterable):
    __module__ = "torchdata.nodes.loader"


class FurtherLoader(WebLoader):
    """A subclass of a known loader."""


LOADERS: dict[str, Callable[[], Any]] = {
    "iterable": OnlyIterable,
    "iterable with a length": WithLength,
    "iterable with a size": WithSize,
    "generator": lambda: (batch for batch in BATCHES),
    "loader of webdataset": WebLoader,
    "subclass of it": FurtherLoader,
    "loader of timm": PrefetchLoader,
    "loader of torchdata": Loader,
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("kwargs", [None, {"batch_size": None}])
def test_batches_of_a_loader_are_taken_as_they_are(
    name: str, kwargs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Recording()
    loader = LOADERS[name]()
    trainer.train(loader, 1, per_device_batch_size=8, train_dataloader_kwargs=kwargs)
    assert trainer.shapes == [(5, 1)] * 4
    assert trainer.samples == list(range(20))
    printed = [line for line in capsys.readouterr().out.splitlines() if "ready batch" in line]
    assert len(printed) == 1
    for part in (type(loader).__name__, "a tuple of (a Tensor of the shape (5, 1)", "'batch_size'"):
        assert part in printed[0]


@pytest.mark.parametrize("name", LOADERS)
def test_batches_are_evaluated_and_predicted_as_they_are(name: str) -> None:
    trainer = Recording()
    trainer.evaluate(LOADERS[name]())
    assert trainer.shapes == [(5, 1)] * 4
    assert trainer.predict(LOADERS[name]()).shape == (20, 1)


class Samples:
    """Samples that can only be iterated."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.tensor([float(index)]), torch.zeros(1)) for index in range(6)])


class Stream(IterableDataset[Any]):
    batch_size = 3
    """A data set of torch's gives samples, whatever its attributes are called."""

    def __iter__(self) -> Iterator[Any]:
        return iter(Samples())


class ByIndex(Samples):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return list(self)[index]


@pytest.mark.parametrize(
    ("data", "kwargs"),
    [
        (Samples(), {"batch_size": 4}),
        (Stream(), None),
        (ByIndex(), {"shuffle": False}),
        (list(Samples()), {"shuffle": False}),
    ],
    ids=["asked for", "stream", "by index", "list"],
)
def test_samples_are_joined(data: Any, kwargs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Recording()
    trainer.train(data, 1, per_device_batch_size=4, train_dataloader_kwargs=kwargs)
    assert trainer.shapes == [(4, 1), (2, 1)]
    assert trainer.samples == list(range(6))
    assert "ready batch" not in capsys.readouterr().out


class OfBatches(Dataset[Any]):
    def __len__(self) -> int:
        return len(BATCHES)

    def __getitem__(self, index: int) -> Any:
        return BATCHES[index]


@pytest.mark.parametrize("data", [OfBatches(), WebLoader(), BATCHES], ids=lambda data: type(data).__name__)
def test_none_as_batch_size_forbids_joining(data: Any) -> None:
    trainer = Recording()
    trainer.train(data, 1, train_dataloader_kwargs={"batch_size": None})
    assert trainer.shapes == [(5, 1)] * 4


def test_a_collate_function_joins_the_samples_of_an_iterable_if_a_size_is_given() -> None:
    trainer = Recording()
    joined = torch.utils.data.default_collate
    trainer.train(Samples(), 1, train_dataloader_kwargs={"batch_size": 2}, collate_fn=joined)
    assert trainer.shapes == [(2, 1)] * 3


@pytest.mark.parametrize(
    "arguments",
    [{"train_dataloader_kwargs": {"num_workers": 1}}, {"collate_fn": torch.utils.data.default_collate}],
    ids=["workers", "collate"],
)
def test_settings_without_a_use_are_refused_with_the_way_out(arguments: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"ready.*'batch_size'.*items joined") as caught:
        Recording().train(OnlyIterable(), 1, **arguments)
    assert "OnlyIterable" in str(caught.value)


def test_a_torch_loader_is_not_described(capsys: pytest.CaptureFixture[str]) -> None:
    Recording().train(DataLoader(Stream(), batch_size=2), 1)
    assert "ready batch" not in capsys.readouterr().out


def test_loaders_of_other_libraries_are_known() -> None:
    nodes = pytest.importorskip("torchdata.nodes")
    samples = list(Samples())

    def loader() -> Any:
        node = nodes.MapStyleWrapper(map_dataset=samples, sampler=list(range(6)))
        return nodes.Loader(
            nodes.Mapper(nodes.Batcher(node, 4, drop_last=False), torch.utils.data.default_collate)
        )

    trainer = Recording()
    trainer.train(loader(), 1)
    assert trainer.shapes == [(4, 1), (2, 1)]
