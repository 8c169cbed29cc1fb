"""Finders, statistics and trackers on two processes: the same on both, and equal to one process with the global batch."""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import TrackerCallback, TrainingStatisticsCallback, find_batch_size, find_learning_rate
from accel_core import Trainer, TrainerCallback
from accel_integrations.schedulers import CosineLrScheduler
from case_runner import BATCH_SIZE, Outcome, run_as_script
from tiny import Seen, tiny_data, tiny_network, tiny_trainer, weights_of


def is_second_process() -> bool:
    return os.environ.get("RANK") == "1"


def build(*callbacks: Any, model: nn.Module | None = None) -> Trainer:
    """Batch norm and dropout, so that buffers and random numbers count."""
    torch.manual_seed(4)
    own = model or nn.Sequential(tiny_network(), nn.BatchNorm1d(2), nn.Dropout(0.3), nn.Linear(2, 2)).double()
    return Trainer(
        own, nn.functional.cross_entropy, torch.optim.AdamW(own.parameters(), lr=0.01), callbacks=callbacks
    )


def run_after(find: Any) -> list[Any]:
    """What a run leaves, without and with a call of `find` before it; with a run before that, too."""
    outcomes = []
    for runs_before in (0, 1):
        for does_find in (False, True):
            seen = Seen()
            trainer = build(seen)
            for _ in range(runs_before):
                trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=BATCH_SIZE)
            if does_find:
                find(trainer)
            trainer.train(
                tiny_data(), num_epochs=2, per_device_batch_size=BATCH_SIZE, reset_run_history=False
            )
            state = [value.tolist() for value in trainer.model.state_dict().values()]
            records = trainer.run_history.to_records()
            outcomes.append(
                [state, records, seen.samples, torch.rand(1).item(), repr(trainer.optimizer.state_dict())]
            )
    return outcomes


def after_learning_rate(batch_size: int) -> list[Any]:
    return run_after(lambda trainer: find_learning_rate(trainer, tiny_data(), BATCH_SIZE, num_updates=5))


def after_batch_size(batch_size: int) -> list[Any]:
    return run_after(lambda trainer: find_batch_size(trainer, tiny_data(), 2))


def after_exception(batch_size: int) -> list[Any]:
    def find(trainer: Trainer) -> None:
        calls = []

        def failing(outputs: Any, targets: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise KeyError
            return nn.functional.cross_entropy(outputs, targets)

        own, trainer.loss_func = trainer.loss_func, failing
        with pytest.raises(KeyError):
            find_learning_rate(trainer, tiny_data(), BATCH_SIZE, num_updates=5)
        trainer.loss_func = own

    return run_after(find)


def learning_rates(batch_size: int) -> Any:
    return find_learning_rate(
        tiny_trainer(), tiny_data(64), batch_size, min_lr=1e-3, max_lr=1e3, num_updates=30
    ).records


class Limited(nn.Module):
    """The second process has memory for less than the first."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.network, self.limits = tiny_network(), (first, second)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > self.limits[is_second_process()]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.network(inputs)  # type: ignore[no-any-return]


def batch_sizes(batch_size: int) -> list[Any]:
    """Memory runs out on one process in the forward, and on the other in fetching a batch and in the optimizer."""

    def collate(samples: list[Any]) -> Any:
        if len(samples) > 3 and not is_second_process():
            raise MemoryError
        return torch.utils.data.default_collate(samples)

    class Greedy(Trainer):
        def optimizer_step(self) -> None:
            if (self.run_config.train_per_device_batch_size or 0) > 2 and is_second_process():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            super().optimizer_step()

    found = [
        find_batch_size(tiny_trainer(model=Limited(99, 99)), tiny_data(64), 8),
        find_batch_size(tiny_trainer(model=Limited(99, 4)), tiny_data(64), 8),
        find_batch_size(tiny_trainer(model=Limited(1, 99)), tiny_data(64), 8),
        find_batch_size(tiny_trainer(), tiny_data(64), 8, collate_fn=collate),
        find_batch_size(tiny_trainer(Greedy), tiny_data(64), 8),
    ]
    return [(each.per_device_batch_size, each.gradient_accumulation_steps) for each in found]


def updates_of_found_size(batch_size: int) -> torch.Tensor:
    """Accumulation on both processes makes the updates of the batch that one process would take at once."""
    trainer = tiny_trainer(model=Limited(99, 2))
    found = find_batch_size(trainer, tiny_data(), batch_size)
    trainer.train(
        tiny_data(),
        num_epochs=2,
        per_device_batch_size=found.per_device_batch_size,
        gradient_accumulation_steps=found.gradient_accumulation_steps,
    )
    return weights_of(trainer)


def statistics(batch_size: int) -> Any:
    """A cosine over the whole run, whose rates are recorded at each update."""
    trainer = tiny_trainer(callbacks=[TrainingStatisticsCallback(1)])
    history = trainer.train(
        tiny_data(64),
        num_epochs=3,
        per_device_batch_size=batch_size,
        create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(lr_min=0.0),
        gradient_clip_norm=0.1,
    )
    return history.to_records()


def unequal_waiting(batch_size: int) -> Any:
    """The second process waits for its data; the first waits for the second, but not for its data."""

    class Slow(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if is_second_process():
                import time

                time.sleep(0.005)
            return super().__getitem__(index)

    trainer = tiny_trainer(callbacks=[TrainingStatisticsCallback(4)])
    trainer.train(
        Slow(*tiny_data(64).tensors),
        num_epochs=1,
        per_device_batch_size=8,
        train_dataloader_kwargs={"num_workers": 0},
    )
    return trainer.run_history.to_records()


def tracker(batch_size: int) -> Any:
    """What is sent, who has a tracker, and whether the processes can still talk afterwards."""
    folder = Path(tempfile.mkdtemp())  # of each process; only the main one writes
    callback, had = TrackerCallback("tensorboard", "project", logging_dir=folder, log_every_n_updates=2), []

    class Looks(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            had.append(callback.tracker is not None)

    trainer = tiny_trainer(callbacks=[callback, Looks()])
    trainer.train(tiny_data(40), num_epochs=2, per_device_batch_size=batch_size)
    everyone = trainer.gather(torch.tensor([trainer.accelerator.process_index])).tolist()
    values: dict[str, Any] = {}
    if trainer.is_main_process:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (run,) = (folder / "project").iterdir()
        events = EventAccumulator(str(run)).Reload()
        values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return {"had": set(had), "everyone": everyone, "values": values}


CASES = {
    "after learning rate": after_learning_rate,
    "after batch size": after_batch_size,
    "after exception": after_exception,
    "learning rates": learning_rates,
    "batch sizes": batch_sizes,
    "updates of found size": updates_of_found_size,
    "statistics": statistics,
    "unequal waiting": unequal_waiting,
    "tracker": tracker,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["after learning rate", "after batch size", "after exception"])
def test_a_run_that_follows_is_the_same_to_the_last_bit(outcome: Outcome, case: str) -> None:
    for without, with_find, without_later, with_find_later in outcome.of(case):
        assert with_find == without
        assert with_find_later == without_later


@pytest.mark.slow
def test_both_processes_find_the_learning_rate_of_one(outcome: Outcome) -> None:
    first, second = outcome.of("learning rates")
    assert first == second
    alone = outcome.alone("learning rates")
    assert len(first) == len(alone) < 30
    assert [record["loss"] for record in first] == pytest.approx([record["loss"] for record in alone])


@pytest.mark.slow
def test_both_processes_find_the_batch_size_that_fits_on_both(outcome: Outcome) -> None:
    first, second = outcome.of("batch sizes")
    assert first == second == [(8, 1), (4, 2), (1, 8), (2, 4), (2, 4)]


@pytest.mark.slow
def test_updates_of_the_found_size_equal_those_of_one_process(outcome: Outcome) -> None:
    for weights in outcome.of("updates of found size"):
        assert float((weights - outcome.alone("updates of found size")).abs().max()) < 1e-12


def of_name(records: Any, name: str) -> list[float]:
    return [record["value"] for record in records if record["name"] == name]


@pytest.mark.slow
def test_both_processes_record_the_same_statistics(outcome: Outcome) -> None:
    first, second = outcome.of("statistics")
    assert first == second
    norms, alone = of_name(first, "gradient_norm"), of_name(outcome.alone("statistics"), "gradient_norm")
    assert norms == pytest.approx(alone, rel=1e-9)


@pytest.mark.slow
def test_two_processes_run_the_whole_cosine(outcome: Outcome) -> None:
    """Lesson A4: planned with the updates of all processes and stepped with those of one, they run half of it."""
    rates = of_name(outcome.of("statistics")[0], "learning_rate")
    assert rates == of_name(outcome.alone("statistics"), "learning_rate")
    assert len(rates) == 24
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * update / 24)) for update in range(24)])


@pytest.mark.slow
def test_the_share_of_waiting_is_that_of_all_processes(outcome: Outcome) -> None:
    first, second = outcome.of("unequal waiting")
    assert first == second
    assert 0.3 < of_name(first, "data_wait_share")[0] < 0.7


@pytest.mark.slow
def test_the_main_process_alone_tracks_and_the_process_group_stays(outcome: Outcome) -> None:
    first, second = outcome.of("tracker")
    assert (first["had"], second["had"]) == ({True}, {False})
    assert first["everyone"] == second["everyone"] == [0, 1]
    values, alone = first["values"], outcome.alone("tracker")["values"]
    assert {name: [step for step, _ in pairs] for name, pairs in values.items()} == {
        "train_loss": [2, 4, 6, 8, 10],
        "learning_rate": [2, 4, 6, 8, 10],
        "train_loss_epoch": [5, 10],
    }
    assert values["train_loss"] == [
        (step, pytest.approx(value, rel=1e-5)) for step, value in alone["train_loss"]
    ]


if __name__ == "__main__":
    run_as_script(CASES)
