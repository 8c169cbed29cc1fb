"""What each layout can and cannot do, as the table "Limits" of docs/distributed.md has it: the cases, and their tests.

Each row is tried on every layout. What the table allows gives the weights of one process; the rest raises an error
on every process before the first update.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from accel_callbacks import (
    ModelAverageCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    UnfreezeCallback,
)
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.parts import local_shard
from accel_core.state.files import read_tensors
from case_runner import Cases, shared_folder
from layout_promises import GLOBAL_BATCH, GoesOnAnywhere, Layout, make_data
from tiny import Stream

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
COLUMNS = {"FSDP2": "FSDP2, HSDP", "HSDP": "FSDP2, HSDP", "DEEPSPEED": "DeepSpeed"}
"""Of layouts that `trainer.describe()` calls otherwise."""
ALLOWED = ("yes", "yes, held whole", "of the main process")


def limits_of(layout: Layout) -> dict[str, str]:
    """The column of a layout: cells by the name of their row."""
    _, text = PAGE.read_text().split("\n## Limits\n")
    lines = [line for line in text.strip().split("\n\n")[0].splitlines() if not line.startswith("|---")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    column = header.index(COLUMNS.get(layout.name, layout.name))
    return {row[0]: row[column].replace("`", "") for row in rows}


def overriding(name: str) -> type[Trainer]:
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        return getattr(Trainer, name)(self, *args, **kwargs)

    return type("Overrides", (Trainer,), {name: method})


class Tokens(Trainer):
    """Each sample has another number of items, over which the loss is a mean."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs, items = self.model(batch[0]), batch[1] + 1
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        loss = (losses * items).sum() / items.sum()
        size = len(items)
        return {"loss": loss, "model_outputs": outputs, "batch_size": size, "num_items_in_batch": items.sum()}


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, targets)


class Unknown(Trainer):
    """Of this loss accel does not know that it is a mean over the samples."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] + 0.0}


class OfTwo(Trainer):
    """Trains a second model by an optimizer of its own inside the step."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        second_loss = nn.functional.cross_entropy(self.second(output["model_outputs"].detach()), batch[1])
        self.backward_step(second_loss)
        self.step_optimizer(self.second_optimizer)
        return output


class WhereItChanges(TrainerCallback):
    """Whether the parameters have changed before `optimizer_step`."""

    has_changed = False
    before: torch.Tensor | None = None

    def values(self, trainer: Trainer) -> torch.Tensor:
        parts = [local_shard(each.detach()).flatten() for each in trainer.model.parameters()]
        return torch.cat(parts).clone()

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        self.before = self.values(trainer)

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        # A process that has no batch in the update has not begun a step.
        if self.before is not None:
            self.has_changed |= not torch.equal(self.before, self.values(trainer))
        self.before = None


class CountMessages(TrainerCallback):
    """How many agreements are sent between the first and the third update."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.reduce, self.sent, self.after = dist.all_reduce, 0, []
        dist.all_reduce = self.count

    def count(self, *args: Any, **kwargs: Any) -> Any:
        # Nothing but an agreement is a maximum that nobody waits for.
        self.sent += bool(kwargs.get("op") == dist.ReduceOp.MAX and kwargs.get("async_op"))
        return self.reduce(*args, **kwargs)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.after.append(self.sent)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        dist.all_reduce = self.reduce


def train(
    layout: Layout,
    callbacks: Callable[[Path], Sequence[TrainerCallback]] = lambda folder: (),
    trainer_class: type[Trainer] = Trainer,
    is_scaled: bool = False,
    is_stream: bool = False,
    is_apart: bool = False,
    **kwargs: Any,
) -> Any:
    """Return the weights, or what the error says that was raised before the first update."""
    loss_func, folder, here = Scaled(layout.dtype) if is_scaled else None, shared_folder(), Path.cwd()
    trainer: Any = layout.create_trainer(callbacks(folder), 3, trainer_class, loss_func)
    if trainer_class is OfTwo:
        torch.manual_seed(5)
        trainer.second = nn.Linear(3, 3, dtype=layout.dtype)
        trainer.second_optimizer = torch.optim.SGD(trainer.second.parameters(), lr=0.1)
    data = make_data(25, layout.dtype)
    size = GLOBAL_BATCH // trainer.data_group.size
    if is_apart:
        # The working folder stands for a disk of each process.
        own = folder / f"disk_{Accelerator().process_index}"
        own.mkdir()
        os.chdir(own)
    try:
        trainer.train(Stream(data) if is_stream else data, 2, per_device_batch_size=size, **kwargs)
    except ConfigurationError as error:
        assert trainer.run_progress.updates_completed == 0
        return str(error)
    finally:
        os.chdir(here)
    path = shared_folder() / "model.safetensors"
    trainer.save_checkpoint(path)
    return read_tensors(path), dict(trainer.loss_func.state_dict())


ATTEMPTS: dict[str, list[Callable[[Layout], Any]]] = {
    "clipping by norm": [functools.partial(train, gradient_clip_norm=0.5)],
    "clipping by value": [functools.partial(train, gradient_clip_value=0.01)],
    "override `optimizer_step`, `optimizer_zero_grad`, `clip_gradients`": [
        functools.partial(train, trainer_class=overriding(name), gradient_clip_norm=0.5)
        for name in ("optimizer_step", "optimizer_zero_grad", "clip_gradients")
    ],
    "losses over tokens, data without a length": [
        functools.partial(train, trainer_class=Tokens),
        functools.partial(train, trainer_class=Unknown, is_stream=True),
    ],
    "a disk for training states": [
        functools.partial(
            train, callbacks=lambda folder: [SaveTrainingStateCallback("states")], is_apart=True
        )
    ],
    "training states in the background": [
        functools.partial(
            train, callbacks=lambda folder: [SaveTrainingStateCallback(folder, in_background=True)]
        )
    ],
    "parameters beside the model, further optimizers": [
        functools.partial(train, is_scaled=True),
        functools.partial(train, trainer_class=OfTwo),
    ],
    "`ModelEmaCallback`, `ModelAverageCallback`": [
        functools.partial(train, callbacks=lambda folder: [ModelEmaCallback(0.5)]),
        functools.partial(train, callbacks=lambda folder: [ModelAverageCallback()]),
    ],
    "`UnfreezeCallback`": [functools.partial(train, callbacks=lambda folder: [UnfreezeCallback({2: 0})])],
}


def attempt(layout: Layout, batch_size: int) -> dict[str, list[Any]]:
    return {row: [run(layout) for run in runs] for row, runs in ATTEMPTS.items()}


def look(layout: Layout, batch_size: int) -> tuple[dict[str, str], int]:
    """The cells that are neither yes nor no, and the messages of two updates beside their gradients."""
    watch, messages = WhereItChanges(), CountMessages()
    trainer = layout.create_trainer([watch, messages])
    size = GLOBAL_BATCH // trainer.data_group.size
    trainer.train(make_data(25, layout.dtype), 1, per_device_batch_size=size)
    path = shared_folder() / "model.pt"
    trainer.save_checkpoint(path)
    has_optimizer = "optimizer_state_dict" in torch.load(path, weights_only=True)
    cells = {
        "parameters change in": "the backward pass" if watch.has_changed else "optimizer_step",
        "exports": "all parts" if has_optimizer else "without the optimizer",
    }
    return cells, messages.after[2] - messages.after[0]


def cases(layout: Layout) -> Cases:
    return {"attempts": functools.partial(attempt, layout), "facts": functools.partial(look, layout)}


@functools.cache
def attempts_on_one_process(layout: Layout) -> dict[str, list[Any]]:
    return attempt(layout, GLOBAL_BATCH)


class KeepsLimits:
    """The column of the table is right, cell by cell."""

    def test_what_the_table_allows_equals_one_process_and_the_rest_is_refused(self, layout, outcome):
        cells = limits_of(layout)
        for results in outcome.of("attempts"):
            for row, found in results.items():
                is_refused = [isinstance(each, str) for each in found]
                assert is_refused == [cells[row] not in ALLOWED] * len(found), (row, found)
                if not any(is_refused):
                    layout.assert_equal(found, attempts_on_one_process(layout)[row])
        said = [
            str([each for each in results.values() if isinstance(each[0], str)])
            for results in outcome.of("attempts")
        ]
        assert len(set(said)) == 1

    def test_the_other_cells_of_the_table_say_what_happens(self, layout, outcome):
        cells = limits_of(layout)
        for facts, _ in outcome.of("facts"):
            assert facts == {row: cells[row] for row in facts}
        for result in outcome.of("resume"):
            is_unpickled = result["refused"] is not None
            kind = "unpickled, if trusted" if is_unpickled else "read without executing code"
            assert cells["files of a training state"] == kind

    def test_only_the_requests_of_ddp_travel_with_the_gradients(self, layout, outcome):
        """Elsewhere each update has one message more."""
        assert [sent for _, sent in outcome.of("facts")] == [
            0 if layout.name == "DDP" else 2
        ] * outcome.processes

    def test_every_row_of_the_table_is_tried(self, layout):
        others = {"parameters change in", "exports", "files of a training state"}
        cells = limits_of(layout)
        other_number = cells.pop("resume on another number of processes")
        assert other_number == ("yes" if isinstance(self, GoesOnAnywhere) else "no")
        assert set(cells) == {*ATTEMPTS, *others}
