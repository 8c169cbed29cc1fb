"""The loop on random sizes of data, batches, accumulation, limits and epochs, against plain Python."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import LimitBatchesCallback, Trainer
from accel_core.data.batch_sampler import ShardedBatchSampler
from accel_core.data.order import random_order
from accel_core.processes.group import DataGroup
from tiny import Stream

SMALL = settings(max_examples=40, deadline=None)


class Observed(Trainer):
    """Its loss is the mean of what stands in the batch, times a weight that each update makes smaller by the gradient."""

    def __init__(self, *callbacks: Any) -> None:
        model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(model.weight)
        super().__init__(
            model, None, torch.optim.SGD(model.parameters(), lr=1e-3), callbacks=callbacks, seed=6
        )
        self.epochs: list[list[list[int]]] = []
        self.updates = 0

    def train_epoch_start(self) -> None:
        super().train_epoch_start()
        self.epochs.append([])

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.epochs[-1].append(batch[0].flatten().int().tolist())
        outputs = self.model(batch[0])
        return {"loss": outputs.mean(), "model_outputs": outputs, "batch_size": len(outputs)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": batch[0].mean(), "model_outputs": None, "batch_size": len(batch[0])}

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.updates += 1


def data_of(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size, dtype=torch.float64).reshape(size, 1))


class Expected:
    """What plain Python makes of the same numbers, epoch by epoch."""

    def __init__(
        self,
        orders: list[list[int]],
        batch_size: int,
        accumulation: int,
        *,
        drop_last: bool = False,
        limit: int | None = None,
        most_updates: float = math.inf,
    ) -> None:
        self.epochs: list[list[list[int]]] = []
        self.losses: list[float] = []
        self.updates, self.weight = 0, 1.0
        for order in orders:
            if self.updates >= most_updates:
                break
            batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
            batches = [batch for batch in batches if len(batch) == batch_size or not drop_last][:limit]
            self.epochs.append([])
            total = count = 0.0
            for first in range(0, len(batches), accumulation):
                if self.updates >= most_updates:
                    break
                group = batches[first : first + accumulation]
                self.epochs[-1] += group
                samples = [sample for batch in group for sample in batch]
                total += self.weight * sum(samples)
                count += len(samples)
                self.weight -= 1e-3 * sum(samples) / len(samples)
                self.updates += 1
            self.losses.append(total / count)


@SMALL
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    accumulation=st.integers(1, 5),
    num_epochs=st.integers(1, 3),
    most_updates=st.none() | st.integers(1, 20),
    limit=st.none() | st.integers(1, 6),
    drop_last=st.booleans(),
    is_stream=st.booleans(),
)
def test_updates_samples_weights_and_losses_are_those_of_plain_python(
    size: int,
    batch_size: int,
    accumulation: int,
    num_epochs: int,
    most_updates: int | None,
    limit: int | None,
    drop_last: bool,
    is_stream: bool,
) -> None:
    drop_last = drop_last and size >= batch_size
    trainer = Observed(*([] if limit is None else [LimitBatchesCallback(limit)]))
    data = data_of(size)
    history = trainer.train(
        Stream(data) if is_stream else data,
        num_epochs,
        per_device_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_num_train_steps=most_updates,
        train_dataloader_kwargs={"drop_last": drop_last},
    )
    in_order = [list(range(size))] * num_epochs
    orders = in_order if is_stream else [random_order(size, 6, epoch).tolist() for epoch in range(num_epochs)]
    expected = Expected(
        orders,
        batch_size,
        accumulation,
        drop_last=drop_last,
        limit=limit,
        most_updates=most_updates or math.inf,
    )
    assert trainer.epochs == expected.epochs
    assert trainer.updates == trainer.run_progress.updates_completed == expected.updates
    assert trainer.model.weight.item() == pytest.approx(expected.weight, abs=1e-12)
    assert history.get_metric_values("train_loss_epoch") == pytest.approx(expected.losses)
    if not is_stream:
        assert trainer.run_config.num_update_steps == expected.updates
    for epoch in trainer.epochs:
        seen = [sample for batch in epoch for sample in batch]
        assert len(seen) == len(set(seen))
        if not drop_last and limit is None and most_updates is None:
            assert set(seen) == set(range(size))


@SMALL
@given(size=st.integers(1, 40), batch_size=st.integers(1, 12), is_stream=st.booleans())
def test_the_loss_of_an_evaluation_is_the_mean_over_samples_and_predictions_have_their_order(
    size: int, batch_size: int, is_stream: bool
) -> None:
    trainer = Observed()
    trainer.calculate_predictions = lambda batch: batch[0]  # type: ignore[method-assign]
    data = Stream(data_of(size)) if is_stream else data_of(size)
    assert trainer.evaluate(data, batch_size)["evaluation_loss"] == pytest.approx((size - 1) / 2)
    assert trainer.predict(data, batch_size).flatten().tolist() == list(range(size))


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    num_processes=st.integers(1, 5),
    taken=st.integers(0, 60),
    other_batch_size=st.integers(1, 9),
    other_processes=st.integers(1, 5),
)
def test_going_on_with_other_sizes_gives_each_sample_once_and_in_order(
    size: int, batch_size: int, num_processes: int, taken: int, other_batch_size: int, other_processes: int
) -> None:
    """What was read up to a step, and what is read from there on by other processes in other batches."""

    class Order:
        is_users = False

        def __len__(self) -> int:
            return size

        def of_epoch(self, epoch: int) -> torch.Tensor:
            return random_order(size, 3, epoch)

    position = min(taken - taken % (batch_size * num_processes), size)

    def read(batch_size: int, num_processes: int, start: int) -> list[int]:
        samplers = [
            ShardedBatchSampler(Order(), batch_size, False, DataGroup(num_processes, index))
            for index in range(num_processes)
        ]  # type: ignore[arg-type]
        by_process = []
        for sampler in samplers:
            sampler.begin_epoch(1, start)
            own = [part for _, part in sampler.plan()]
            batches = list(sampler)
            # A process without any sample reads the first one to take part, with weight zero.
            by_process.append([b for b, n in zip(batches, (n for n in own if n), strict=False) if n])
        steps = max(map(len, by_process))
        return [
            sample
            for step in range(steps)
            for part in by_process
            if step < len(part)
            for sample in part[step]
        ]

    whole = random_order(size, 3, 1).tolist()
    assert read(batch_size, num_processes, 0) == whole
    assert read(other_batch_size, other_processes, position) == whole[position:]
