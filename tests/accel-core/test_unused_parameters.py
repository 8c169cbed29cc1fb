"""On two processes DDP itself refuses parameters without a gradient; its error gets the way out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from accel_core import Trainer
from case_runner import Outcome, run_as_script
from tiny import tiny_data


class Half(nn.Module):
    """Leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 2).double()
        self.spare = nn.Linear(5, 2).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)  # type: ignore[no-any-return]


def train(
    batch_size: int, accelerator: Accelerator | None = None, change: Callable[[Half], Any] | None = None
) -> Any:
    model = Half()
    if change is not None:
        change(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model, nn.functional.cross_entropy, optimizer, callbacks=[], accelerator=accelerator, seed=0
    )
    try:
        trainer.train(tiny_data(), num_epochs=1, per_device_batch_size=batch_size)
    except RuntimeError as error:
        return type(error).__name__, str(error), getattr(error, "__notes__", [])
    return trainer.run_progress.updates_completed


def train_by_the_way_out(batch_size: int) -> Any:
    return train(
        batch_size, Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    )


def train_when_frozen(batch_size: int) -> Any:
    return train(batch_size, change=lambda model: model.spare.requires_grad_(False))


def train_when_removed(batch_size: int) -> Any:
    return train(batch_size, change=lambda model: delattr(model, "spare"))


WAYS_OUT = {"expected": train_by_the_way_out, "frozen": train_when_frozen, "removed": train_when_removed}
CASES = {**WAYS_OUT, "unused": train}


@pytest.mark.seconds
def test_the_error_of_ddp_names_the_way_out(outcome: Outcome) -> None:
    for kind, message, notes in outcome.of("unused"):
        assert kind == "RuntimeError"
        assert "finished reduction" in message
        assert any("DistributedDataParallelKwargs(find_unused_parameters=True)" in note for note in notes)


@pytest.mark.seconds
@pytest.mark.parametrize("name", WAYS_OUT)
def test_each_way_out_trains(outcome: Outcome, name: str) -> None:
    assert outcome.of(name) == [5, 5]


if __name__ == "__main__":
    run_as_script(CASES, ignore="find_unused_parameters=True was specified")
