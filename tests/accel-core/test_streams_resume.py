"""Streams go on with the next sample, by a state that is exact or by being read again."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from accel_core import Trainer, TrainerCallback
from accel_core.data.exact_streams import restores_exactly

SIZE = 32


def sample(index: int) -> dict[str, Any]:
    return {"x": torch.tensor([float(index)])}


class Save(TrainerCallback):
    def __init__(self, folder: Path, update: int) -> None:
        self.folder = folder
        self.update = update

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.update:
            trainer.save_training_state(self.folder)


class Recording(Trainer):
    def __init__(self, *callbacks: TrainerCallback) -> None:
        model = nn.Linear(1, 1)
        super().__init__(model, None, torch.optim.SGD(model.parameters(), lr=0.0), callbacks, seed=0)
        self.seen: list[list[int]] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.seen.append(batch["x"].flatten().int().tolist())
        outputs = self.model(batch["x"])
        return {"loss": outputs.mean(), "model_outputs": outputs, "batch_size": len(outputs)}


def stream_of_hugging_face(buffer_size: int | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: ({"x": [float(index)]} for index in range(SIZE)))
    return (stream if buffer_size is None else stream.shuffle(seed=5, buffer_size=buffer_size)).with_format(
        "torch"
    )


class Reads:
    """How many samples were read, of all streams."""

    total = 0


class Exact(IterableDataset[Any]):
    """Keeps its place."""

    restores_exactly = True

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        while self.position < SIZE:
            self.position += 1
            Reads.total += 1
            yield sample(self.position - 1)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Promising(IterableDataset[Any]):
    """Its state says less than is needed: what is in its buffer is lost."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1)).tolist()
        for first in range(0, SIZE, 8):
            self.position = first + 8
            yield from (sample(index) for index in order[first : first + 8])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError("such a state is never used")


class ExactBatches:
    """A loader of nobody's that keeps its place."""

    restores_exactly = True

    def __init__(self) -> None:
        self.samples = Exact()

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.samples, batch_size=4))

    def state_dict(self) -> dict[str, int]:
        return self.samples.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.samples.load_state_dict(state)


class ByIndex(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return sample(index)


def nodes() -> Any:
    module = pytest.importorskip("torchdata.nodes")
    source = module.MapStyleWrapper(map_dataset=ByIndex(), sampler=list(range(SIZE)))
    return module.Loader(module.Mapper(module.Batcher(source, 4), torch.utils.data.default_collate))


def stateful_loader(**kwargs: Any) -> Any:
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(ByIndex(), batch_size=4, shuffle=True, **kwargs)


STREAMS: dict[str, Callable[[], Any]] = {
    "map-style": ByIndex,
    "own, exact": Exact,
    "own, promising": Promising,
    "own batches": ExactBatches,
    "Hugging Face": stream_of_hugging_face,
    "Hugging Face with a buffer": lambda: stream_of_hugging_face(8),
    "nodes of torchdata": nodes,
    "StatefulDataLoader": stateful_loader,
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # Asked for by torchdata.
@pytest.mark.parametrize("update", [3, 8, 11])
@pytest.mark.parametrize("name", STREAMS)
def test_a_resumed_run_sees_the_samples_of_the_unbroken_one(name: str, update: int, tmp_path: Path) -> None:
    whole, rest = Recording(Save(tmp_path / "state", update)), Recording()
    whole.train(STREAMS[name](), 2, per_device_batch_size=4)
    rest.train(STREAMS[name](), 2, per_device_batch_size=4, resume_from=tmp_path / "state")
    assert sorted(itertools.chain.from_iterable(whole.seen[:8])) == list(range(SIZE))
    assert rest.seen == whole.seen[update:]


@pytest.mark.parametrize("name", ["own, exact", "own batches"])
def test_an_exact_stream_is_not_read_again(name: str, tmp_path: Path) -> None:
    Recording(Save(tmp_path / "state", 6)).train(STREAMS[name](), 1, per_device_batch_size=4)
    Reads.total = 0
    Recording().train(STREAMS[name](), 1, per_device_batch_size=4, resume_from=tmp_path / "state")
    assert Reads.total == SIZE - 6 * 4


def test_the_table_knows_what_is_restored_exactly() -> None:
    assert restores_exactly(Exact())
    assert not restores_exactly(Promising())
    assert not restores_exactly(ByIndex())
    assert restores_exactly(stream_of_hugging_face())
    buffered = stream_of_hugging_face(8)
    assert not restores_exactly(buffered)
    assert not restores_exactly(buffered.map(lambda row: row).take(20))
    datasets = pytest.importorskip("datasets")
    assert not restores_exactly(datasets.interleave_datasets([stream_of_hugging_face(), buffered]))


@pytest.mark.parametrize("workers", [(0, 2), (2, 1), (1, 0)], ids=str)
def test_a_run_resumes_to_the_bit_with_another_number_of_workers(
    workers: tuple[int, int], tmp_path: Path
) -> None:
    def trained(num_workers: int, *callbacks: TrainerCallback, **kwargs: Any) -> Recording:
        trainer = Recording(*callbacks)
        nn.init.ones_(trainer.model.weight)
        nn.init.zeros_(trainer.model.bias)
        trainer.optimizer.param_groups[0]["lr"] = 0.01
        loading = {"num_workers": num_workers}
        trainer.train(ByIndex(), 2, per_device_batch_size=4, train_dataloader_kwargs=loading, **kwargs)
        return trainer

    whole = trained(workers[0], Save(tmp_path / "state", 5))
    rest = trained(workers[1], resume_from=tmp_path / "state")
    assert rest.seen == whole.seen[5:]
    for one, other in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(one, other)
