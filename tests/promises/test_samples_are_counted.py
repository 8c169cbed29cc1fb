"""Several processes count the samples of a batch, the items of a loss, and what is left out, like one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset

from accel_core import Trainer
from case_runner import BATCH_SIZE, Outcome, run_as_script
from tiny import Stream, tiny_data, tiny_network

SEQUENCES = [
    (row.expand(2 + 5 * (index % 3), 5), target) for index, (row, target) in enumerate(tiny_data(29))
]
"""Sequences of 2, 7 or 12 equal rows."""


class LastRow(nn.Module):
    """Classifies the last row of each sequence of a batch of shape `(time, batch, 5)`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny_network()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs[-1])  # type: ignore[no-any-return]


def time_first(samples: list[Any]) -> Any:
    inputs, targets = zip(*samples, strict=True)
    return pad_sequence([rows.flip(0) for rows in inputs]).flip(0), torch.stack(targets)


def readable(samples: list[Any]) -> Any:
    """The batch of the samples that are there, or None if none is."""
    kept = [sample for sample in samples if sample is not None]
    return time_first(kept) if kept else None


def without(*numbers: int) -> list[Any]:
    return [None if index in numbers else sample for index, sample in enumerate(SEQUENCES)]


def run(
    batch_size: int,
    data: Any,
    model: Callable[[], nn.Module] = LastRow,
    loss_func: Any = F.cross_entropy,
    accumulation: int = 2,
    **kwargs: Any,
) -> Any:
    """Weights, losses, evaluation and predictions of a trainer that trains two epochs in the order of the data."""
    trainer = Trainer(
        module := model(), loss_func, torch.optim.SGD(module.parameters(), lr=0.1), callbacks=[], seed=3
    )
    in_order = {} if isinstance(data, Stream) else {"shuffle": False, "num_workers": 0}
    arguments = {"per_device_batch_size": batch_size, "gradient_accumulation_steps": accumulation, **kwargs}
    history = trainer.train(
        data,
        2,
        data,
        train_dataloader_kwargs=in_order,
        eval_dataloader_kwargs={"num_workers": 0},
        **arguments,
    )
    predictions = trainer.predict(data, batch_size, {"num_workers": 0}, kwargs.get("collate_fn"))
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in module.parameters()]),
        "train": history.get_metric_values("train_loss_epoch"),
        "eval": history.get_metric_values("eval_loss_epoch"),
        "predictions": predictions,
        "updates": (trainer.run_progress.updates_completed, trainer.run_progress.updates_skipped),
    }


def data_of(targets: torch.Tensor) -> TensorDataset:
    return TensorDataset(tiny_data(len(targets)).tensors[0], targets)


def pixels() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6).double(), nn.Unflatten(1, (2, 3)))


CLASSES = (torch.arange(29) % 2).where(torch.arange(29) < 25, -100)
"""The last four are ignored, so that only late batches of one process have any."""
PIXELS = (torch.arange(87).reshape(29, 3) % 2).where(
    torch.arange(87).reshape(29, 3) % 7 < torch.arange(29)[:, None] / 4, -100
)
PIXELS[::4] = 1
WEIGHTS = torch.tensor([1.0, 9.0], dtype=torch.float64)

CASES: dict[str, Callable[[int], Any]] = {
    "time first": partial(run, data=SEQUENCES, collate_fn=time_first),
    "a stream": lambda batch_size: run(batch_size, Stream(SEQUENCES), collate_fn=time_first),
    "single steps": partial(run, data=SEQUENCES, collate_fn=time_first, accumulation=1),
    "class weights": partial(
        run, data=data_of(CLASSES.clamp(min=0)), model=tiny_network, loss_func=nn.CrossEntropyLoss(WEIGHTS)
    ),
    "ignored late": partial(run, data=data_of(CLASSES), model=tiny_network, accumulation=1),
    "pixels": partial(run, data=data_of(PIXELS), model=pixels, loss_func=nn.CrossEntropyLoss(WEIGHTS)),
    "samples are missing": partial(run, data=without(0, 3, 13, 14, 20), collate_fn=readable),
}
LEFT_OUT: dict[str, tuple[int, ...]] = {
    "a batch of the second process": (12, 13, 14, 15),
    "its first batch": (4, 5, 6, 7),
    "the first batch of the first process": (0, 1, 2, 3),
    "an update": tuple(range(16)),
    "the last update": tuple(range(16, 29)),
    "a step in the middle": tuple(range(8, 16)),
    "all of the second process but its tail": (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23),
}
"""Samples that cannot be read: in steps of 4 on each process, 2 of which are an update."""
for _name, _numbers in LEFT_OUT.items():
    CASES[f"map: {_name}"] = partial(run, data=without(*_numbers), collate_fn=readable)
    CASES[f"stream: {_name}"] = lambda batch_size, numbers=_numbers: run(  # type: ignore[misc]
        batch_size, Stream(without(*numbers)), collate_fn=readable
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_count_like_one_with_the_global_batch(outcome: Outcome, case: str) -> None:
    wanted = outcome.alone(case)
    for found in outcome.of(case):
        assert torch.allclose(found["weights"], wanted["weights"], rtol=0, atol=1e-14)
        assert torch.allclose(found["predictions"], wanted["predictions"], rtol=0, atol=1e-13)
        for name in ("train", "eval"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-12)
        assert found["updates"] == wanted["updates"]


@pytest.mark.parametrize("case", LEFT_OUT)
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_what_is_left_out_is_left_out_by_hand(outcome: Outcome, case: str, kind: str) -> None:
    """An update without any sample is counted, but nothing is stepped."""
    data = without(*LEFT_OUT[case])
    by_hand = LastRow()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    size = 2 * BATCH_SIZE * outcome.processes
    updates = [
        [sample for sample in data[first : first + size] if sample is not None]
        for first in range(0, len(data), size)
    ]
    for samples in updates * 2:
        if samples:
            inputs, targets = time_first(samples)
            F.cross_entropy(by_hand(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = torch.cat([parameter.detach().flatten() for parameter in by_hand.parameters()])
    for found in outcome.of(f"{kind}: {case}"):
        assert torch.allclose(found["weights"], wanted, rtol=0, atol=1e-14)
        assert found["updates"] == (2 * len(updates), 2 * updates.count([]))


if __name__ == "__main__":
    run_as_script(CASES)
