"""On several processes each sample is seen once: shared out by accel, or by the user who says so."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback
from accel_core.processes.collectives import all_gather_object
from case_runner import run_as_script, shared_folder

SIZE = 21
X = torch.arange(float(SIZE)).unsqueeze(1)
WHOLE = TensorDataset(X, X)


def place() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    is_alone = not torch.distributed.is_initialized()
    return (0, 1) if is_alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())


class OwnPart(IterableDataset[Any]):
    """A stream that gives each process, and each of its workers, a part."""

    def __init__(self, indices: range | None = None) -> None:
        # Workers do not know the process group.
        rank, world = place()
        self.indices = range(rank, SIZE, world) if indices is None else indices

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter([(X[index], X[index]) for index in self.indices[first::step]])


class Streaming(OwnPart):
    """One of a library whose streams can shard themselves."""

    __module__ = "streaming.base"


class Batches:
    """Ready batches of a part of the data."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.data, batch_size=2))


class Shuffling(IterableDataset[Any]):
    """Draws its order from the global random state."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(X[index], X[index]) for index in torch.randperm(SIZE).tolist()])


def part() -> Subset[Any]:
    rank, world = place()
    return Subset(WHOLE, range(rank, SIZE, world))


class CutByHand(Dataset[Any]):
    """Map-style data of equal parts, which only workers may read."""

    def __init__(self, is_cut: bool = True) -> None:
        rank, world = place() if is_cut else (0, 1)
        self.names = [
            f"/machine_{place()[0]}/{index}.png" for index in range(SIZE)[rank::world][: SIZE // world]
        ]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        assert get_worker_info() is not None
        value = torch.tensor([float(self.names[index].rpartition("/")[2].removesuffix(".png"))])
        return value, value


class UnevenBatches:
    """A batch sampler of the user's own."""

    def __init__(self, size: int) -> None:
        self.batches = [range(size)[first : first + 1 + first % 3] for first in (0, 1, 3, 4, 6)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, iter(self.batches))


def batches_of_part() -> DataLoader[Any]:
    return DataLoader(part(), batch_sampler=UnevenBatches(len(part())))  # type: ignore[arg-type]


def uneven() -> range:
    """All on the last process but two samples."""
    rank, world = place()
    if world == 1:
        return range(SIZE)
    return range(2, SIZE) if rank == world - 1 else range(2 * (rank == 0))


class Recording(Trainer):
    def __init__(self, *callbacks: TrainerCallback, lr: float = 0.0) -> None:
        model = nn.Linear(1, 1)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        super().__init__(
            model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=lr), callbacks, seed=0
        )
        self.seen: list[int] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        if self.model.training:
            self.seen += batch[0].flatten().int().tolist()
        outputs = self.model(batch[0])
        return {"loss": outputs.mean(), "model_outputs": outputs, "batch_size": len(batch[0])}

    calculate_eval_batch_loss = calculate_train_batch_loss


def seen_by_all(data: Any, is_sharded: bool = True, epochs: int = 1, **kwargs: Any) -> list[int]:
    """What all processes have seen, without what padding steps repeat."""
    trainer = Recording()
    seen: list[int] = []
    step = trainer.run_train_step
    trainer.run_train_step = lambda one, group: (
        step(one, group) if not one.is_padding else _padding(trainer, step, one, group)
    )  # type: ignore[method-assign]
    trainer.train(data, epochs, per_device_batch_size=4, data_is_sharded=is_sharded, **kwargs)
    for samples in all_gather_object(trainer.seen):
        seen += samples
    return sorted(seen)


def _padding(trainer: Recording, step: Callable[..., None], one: Any, group: Any) -> None:
    before = list(trainer.seen)
    step(one, group)
    trainer.seen = before


def error_of(data: Any, **kwargs: Any) -> str:
    try:
        seen_by_all(data, is_sharded=False, **kwargs)
    except ConfigurationError as error:
        return str(error)
    return ""


def warning_of(data: Any) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen_by_all(data, is_sharded=False)
    return " ".join(str(each.message) for each in caught if each.category is AccelWarning)


def evaluated(data: Any) -> float:
    return Recording().evaluate(data, 4, data_is_sharded=True)["evaluation_loss"]


def predicted(data: Any) -> list[int]:
    trainer = Recording()
    outputs = trainer.predict(data, 4, data_is_sharded=True)
    return outputs.flatten().round().int().tolist()  # type: ignore[no-any-return]


def resumed(data: Callable[[], Any]) -> bool:
    """Whether a run that is saved in the middle of its second epoch goes on with the samples that are left."""
    folder = shared_folder() / "state"

    class Save(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 4:
                trainer.save_training_state(folder)
                trainer.seen.clear()  # type: ignore[attr-defined]

    whole, rest = Recording(Save()), Recording()
    whole.train(data(), 2, per_device_batch_size=4, data_is_sharded=True)
    rest.train(data(), 2, per_device_batch_size=4, data_is_sharded=True, resume_from=folder)
    return whole.seen == rest.seen


SHARDED: dict[str, Callable[[], Any]] = {
    "subset": part,
    "stream": OwnPart,
    "stream of a library": Streaming,
    "ready batches": lambda: Batches(part()),
    "sampler": lambda: DataLoader(
        WHOLE,
        batch_size=4,
        sampler=DistributedSampler(WHOLE, place()[1], place()[0], shuffle=False, drop_last=False),
    ),
    "sampler of a part": lambda: DataLoader(WHOLE, batch_size=4, sampler=SubsetRandomSampler(part().indices)),
    "uneven": lambda: OwnPart(uneven()),
}
CASES: dict[str, Callable[[int], Any]] = {
    **{f"sharded {name}": (lambda size, make=make: seen_by_all(make())) for name, make in SHARDED.items()},
    "with workers": lambda size: seen_by_all(OwnPart(), train_dataloader_kwargs={"num_workers": 2}),
    "evaluated": lambda size: [evaluated(make()) for make in (part, lambda: OwnPart(uneven()))],
    "predicted": lambda size: predicted(part()),
    "resumed": lambda size: [resumed(part), resumed(OwnPart), resumed(batches_of_part)],
    "refused subset": lambda size: error_of(Subset(WHOLE, range(place()[0], 20, place()[1]))),
    "refused inner subset": lambda size: error_of(
        Subset(Subset(WHOLE, range(place()[0], 20, place()[1])), range(5))
    ),
    "refused lengths": lambda size: error_of(part()),
    "refused stream": lambda size: error_of(Streaming()),
    "refused sampler": lambda size: error_of(SHARDED["sampler"]()),
    "warned stream": lambda size: warning_of(OwnPart()),
    "warned batches": lambda size: warning_of(Batches(OwnPart())),
    "refused batches": lambda size: error_of(Batches(Subset(WHOLE, range(place()[0], 20, place()[1])))),
    "warned with workers": lambda size: warning_of(DataLoader(OwnPart(), batch_size=2, num_workers=1)),
    "cut by hand": lambda size: [
        warning_of(TensorDataset(*(X[place()[0] :: place()[1]][: SIZE // place()[1]],) * 2)),
        warning_of(DataLoader(CutByHand(), batch_size=2, num_workers=1)),
    ],
    "whole sets": lambda size: [
        warning_of(WHOLE),
        warning_of(DataLoader(CutByHand(is_cut=False), batch_size=2, num_workers=1)),
    ],
    "whole streams": lambda size: [
        seen_by_all(data, is_sharded=False)
        for data in (Shuffling(), DataLoader(Shuffling(), batch_size=4, num_workers=1), Batches(WHOLE))
    ],
}


@pytest.mark.parametrize("name", SHARDED)
def test_data_that_is_sharded_is_read_whole_by_each_process(outcome: Any, name: str) -> None:
    expected = list(range(SIZE))
    for seen in outcome.of(f"sharded {name}"):
        # The sampler fills up its last step by repeating the first samples.
        assert (sorted(set(seen)) if name == "sampler" else seen) == expected
    assert outcome.alone(f"sharded {name}") == expected


def test_shares_can_be_read_by_workers(outcome: Any) -> None:
    assert all(seen == list(range(SIZE)) for seen in outcome.of("with workers"))


def test_metrics_of_uneven_shares_are_exact(outcome: Any) -> None:
    for losses in outcome.of("evaluated"):
        assert losses == pytest.approx([10.0, 10.0], abs=1e-6)


def test_predictions_of_shares_stand_in_the_order_of_the_processes(outcome: Any) -> None:
    world = outcome.processes
    expected = [index for rank in range(world) for index in range(rank, SIZE, world)]
    assert all(outputs == expected for outputs in outcome.of("predicted"))


def test_a_run_on_shares_resumes_with_the_samples_that_are_left(outcome: Any) -> None:
    assert all(all(same) for same in outcome.of("resumed"))


@pytest.mark.parametrize(
    "case",
    [
        "refused subset",
        "refused batches",
        "refused inner subset",
        "refused lengths",
        "refused stream",
        "refused sampler",
    ],
)
def test_what_is_a_share_already_is_refused_on_every_process(outcome: Any, case: str) -> None:
    if case == "refused lengths" and SIZE % outcome.processes == 0:
        pytest.skip("all shares are of one length")
    for message in outcome.of(case):
        assert "data_is_sharded=True" in message
    assert outcome.alone(case) == ""


@pytest.mark.parametrize("case", ["warned stream", "warned batches", "warned with workers"])
def test_what_seems_to_be_a_share_is_warned_about_on_every_process(outcome: Any, case: str) -> None:
    for message in outcome.of(case):
        assert "first item" in message and "data_is_sharded=True" in message and "whole data" in message
    assert outcome.alone(case) == ""


def test_a_set_that_is_cut_by_hand_is_warned_about_on_every_process(outcome: Any) -> None:
    for message in [each for messages in outcome.of("cut by hand") for each in messages]:
        assert (
            "first entries differ" in message
            and "data_is_sharded=True" in message
            and "whole data" in message
        )
    assert outcome.alone("cut by hand") == ["", ""]
    assert all(messages == ["", ""] for messages in outcome.of("whole sets"))


def test_streams_that_shuffle_are_whole_on_every_process_also_in_workers(outcome: Any) -> None:
    for epochs in outcome.of("whole streams"):
        assert epochs == [list(range(SIZE))] * 3


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return X[index], X[index]


def test_one_process_reads_everything_whatever_is_said() -> None:
    assert seen_by_all(Numbers()) == seen_by_all(Numbers(), is_sharded=False) == [0, 1, 2, 3]


if __name__ == "__main__":
    run_as_script(CASES)
