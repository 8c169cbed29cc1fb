"""On one process a batch is read when it is due, and a sampler is asked when its batch is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from accel_core import Trainer, TrainerCallback


class Recording(Trainer):
    def __init__(self, *callbacks: TrainerCallback, lr: float = 0.0) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        super().__init__(model, nn.functional.mse_loss, optimizer, callbacks, seed=0)
        self.seen: list[list[int]] = []

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.seen.append(batch[0].flatten().int().tolist())
        return super().calculate_train_batch_loss(batch)


class Costly(IterableDataset[Any]):
    """Counts what is read of it."""

    def __init__(self, size: int = 1000) -> None:
        self.size = size
        self.num_read = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.size):
            self.num_read += 1
            yield torch.ones(1), torch.zeros(1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_with_a_limit_reads_no_sample_too_many(accumulation: int) -> None:
    data = Costly()
    trainer = Recording()
    trainer.train(
        data, max_num_train_steps=3, per_device_batch_size=4, gradient_accumulation_steps=accumulation
    )
    assert data.num_read == 12 * accumulation
    assert trainer.run_progress.updates_completed == 3


def test_a_stop_reads_no_sample_too_many() -> None:
    class Stop(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == 2:
                trainer.request_stop("enough")

    data = Costly()
    trainer = Recording(Stop())
    trainer.train(data, 1, per_device_batch_size=4)
    # A stop that is asked for after an update takes effect after the next one.
    assert data.num_read == 4 * trainer.run_progress.updates_completed == 12


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_stream_is_read_to_its_end_in_short_updates_too(accumulation: int) -> None:
    data = Costly(11)
    trainer = Recording()
    trainer.train(data, 2, per_device_batch_size=2, gradient_accumulation_steps=accumulation)
    assert data.num_read == 22
    assert trainer.run_progress.epochs_completed == 2
    assert trainer.run_progress.updates_completed == 2 * -(-6 // accumulation)


def test_data_made_by_the_model_is_made_by_the_newest_weights() -> None:
    trainer = Recording(lr=0.1)
    made: list[float] = []
    used: list[float] = []

    class FromModel(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for _ in range(4):
                made.append(trainer.get_model().weight.item())
                yield torch.ones(2, 1), torch.zeros(2, 1)

    class Weights(TrainerCallback):
        def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
            used.append(trainer.get_model().weight.item())

    trainer.callbacks.add_callback(Weights())
    trainer.train(DataLoader(FromModel(), batch_size=None), 1)
    assert made == used
    assert len(set(made)) == 4


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)]), torch.zeros(1)


class Curriculum(Sampler[int]):
    """Gives other samples as soon as it is told to."""

    is_hard = False

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[int]:
        for index in range(16):
            yield 100 + index if self.is_hard else index


def test_a_sampler_is_asked_when_its_batch_is_due() -> None:
    sampler = Curriculum()

    class Harder(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            sampler.is_hard = trainer.run_progress.updates_completed >= 2

    trainer = Recording(Harder())
    trainer.train(Numbers(), 1, per_device_batch_size=4, train_dataloader_kwargs={"sampler": sampler})
    assert trainer.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [108, 109, 110, 111], [112, 113, 114, 115]]


class OneList(Sampler[list[int]]):
    """Gives one list object again and again."""

    def __init__(self, claimed: int = 4) -> None:
        self.claimed = claimed

    def __len__(self) -> int:
        return self.claimed

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in range(16):
            batch.append(index)
            if len(batch) == 4 + (index > 8):
                yield batch
                batch.clear()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("claimed", [1, 3, 9])
def test_a_batch_sampler_gives_what_it_gives_in_torch_whatever_length_it_claims(
    num_workers: int, claimed: int
) -> None:
    plain = [batch[0].flatten().int().tolist() for batch in DataLoader(Numbers(), batch_sampler=OneList())]
    trainer = Recording()
    kwargs = {"batch_sampler": OneList(claimed), "num_workers": num_workers}
    trainer.train(Numbers(), 1, train_dataloader_kwargs=kwargs)
    assert trainer.seen == plain
    assert trainer.run_progress.epochs_completed == 1


@pytest.mark.parametrize(
    "kwargs", [{"sampler": Curriculum()}, {"batch_sampler": OneList()}], ids=["sampler", "batch sampler"]
)
@pytest.mark.parametrize("update", [1, 2])
def test_a_live_sampler_resumes_at_the_next_sample(kwargs: Any, update: int, tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed == update:
                trainer.save_training_state(tmp_path / "state")

    whole, rest = Recording(Save()), Recording()
    whole.train(Numbers(), 2, per_device_batch_size=5, train_dataloader_kwargs=kwargs)
    arguments = {"train_dataloader_kwargs": kwargs, "resume_from": tmp_path / "state"}
    rest.train(Numbers(), 2, per_device_batch_size=5, **arguments)
    assert rest.seen == whole.seen[update:]
