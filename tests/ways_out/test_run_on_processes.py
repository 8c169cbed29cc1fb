"""Each way out that an error names works which only several processes can make: DDP, FSDP2 and tensor parallelism.

One launch makes all the mistakes. Accelerate refuses FSDP2 and tensor parallelism on a CPU, so their state is set
by hand (`tests/layouts.py`), after the cases of DDP.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback, SaveTrainingStateCallback, find_batch_size
from accel_core import Trainer, TrainerCallback
from case_runner import run_as_script, shared_folder
from layouts import fsdp2, tensor_parallel
from tiny import tiny_data, tiny_network, tiny_trainer
from ways_out import DATA, check_told, told

UNEVEN = tiny_data(9)


def rank() -> int:
    return Accelerator().process_index


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One that does not say what it counts."""
    return nn.functional.cross_entropy(outputs, targets)


def train(data: Any = DATA, callbacks: Any = (), kind: type[Trainer] = Trainer, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(kind, callbacks, loss_func=loss)
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    assert trainer.run_progress.updates_completed
    return trainer


def training(*args: Any, **kwargs: Any) -> Callable[[], Trainer]:
    return lambda: train(*args, **kwargs)


# ---------------------------------------------------------------------- DDP


def different_arguments() -> list[str]:
    own = tiny_data(16 + 4 * rank())
    return told(
        training(own),
        training(DATA),
        training(own, data_is_sharded=True),
    )


def on(event: str, act: Callable[[Trainer], Any]) -> TrainerCallback:
    def method(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        act(trainer)

    return type("Acts", (TrainerCallback,), {event: method})()


def gather_in_a_step() -> list[str]:
    def act(trainer: Trainer) -> None:
        trainer.gather(torch.ones(2))

    def measuring() -> Trainer:
        metric = MulticlassAccuracy(2)
        update = on("on_eval_step_end", lambda trainer: metric.update(torch.ones(1), torch.ones(1)))
        return train(
            DATA, [update, on("on_eval_epoch_end", lambda trainer: metric.compute())], eval_dataset=UNEVEN
        )

    in_training, at_the_end = [on(event, act) for event in ("on_train_step_end", "on_optimizer_step_end")]
    in_evaluation = told(
        training(DATA, [on("on_eval_step_end", act)], eval_dataset=UNEVEN),
        measuring,
        training(DATA, [MetricsCallback(MulticlassAccuracy(2))], eval_dataset=UNEVEN),
    )
    assert "was called inside an evaluation step" in in_evaluation[0], in_evaluation
    return (
        told(
            training(UNEVEN, [in_training]),
            training(UNEVEN, [at_the_end]),
            training(UNEVEN, [in_training], train_dataloader_kwargs={"drop_last": True}),
        )
        + in_evaluation[1:]
    )


@contextlib.contextmanager
def another_disk() -> Iterator[Path]:
    """The main process is in a folder that all see, the other one in a folder of its own."""
    shared, own = shared_folder(), Path(tempfile.mkdtemp())
    before = Path.cwd()
    os.chdir(shared if rank() == 0 else own)
    try:
        yield shared
    finally:
        os.chdir(before)


def hand_out() -> list[str]:
    def without_room() -> Any:
        before, tempfile.tempdir = tempfile.tempdir, "/dev/null" if rank() else tempfile.tempdir
        try:
            return train(num_epochs=2, resume_from="state")
        finally:
            tempfile.tempdir = before

    with another_disk() as shared:
        train().save_training_state(shared / "state")
        return told(
            without_room,
            training(num_epochs=2, resume_from="state"),
            training(num_epochs=2, resume_from=shared / "state"),
        )


# ---------------------------------------------------------------------- FSDP2


def set_engine(create: Callable[[], Accelerator], kind: DistributedType = DistributedType.MULTI_CPU) -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    create()


class CountsLater(Trainer):
    """Counts items from the second update on, or always."""

    always = False

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        counts = self.always or self.run_progress.updates_completed
        return {**output, "num_items_in_batch": 3 + rank()} if counts else output


class Counts(CountsLater):
    always = True


def counting_later() -> list[str]:
    set_engine(fsdp2)
    return told(training(kind=CountsLater), training(kind=Counts))


def loading(kind: type[nn.Module], partial: bool, path: Path) -> Trainer:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    if kind is not nn.Identity:
        model.append(kind(2, 2, dtype=torch.float64))
    trainer = tiny_trainer(model=model)
    trainer.load_partial_states = partial
    trainer.train(DATA, 1, per_device_batch_size=4, max_num_train_steps=1)
    trainer.load_checkpoint(path, load_optimizer=False)
    return trainer


def load_a_part() -> list[str]:
    folder = shared_folder()
    set_engine(fsdp2)
    train().save_checkpoint(folder / "model.pt")
    answers = told(
        lambda: loading(nn.Identity, True, folder / "model.pt"),
        lambda: loading(nn.Identity, False, folder / "model.pt"),
    )
    # With DDP a part is loaded, and what is exported there is loaded whole.
    set_engine(Accelerator)
    answers += told(
        lambda: loading(nn.Linear, True, folder / "model.pt").save_checkpoint(folder / "larger.pt")
    )
    set_engine(fsdp2)
    return answers + told(lambda: loading(nn.Linear, False, folder / "larger.pt"))


def shards_that_are_not_seen() -> list[str]:
    set_engine(fsdp2)
    with another_disk() as shared:
        train().save_training_state(shared / "state")
        resume = {"num_epochs": 2, "per_device_batch_size": 4}
        return told(training(resume_from="state", **resume), training(resume_from=shared / "state", **resume))


def saves_that_are_not_seen() -> list[str]:
    set_engine(fsdp2)
    with another_disk() as shared:
        return told(
            training(callbacks=[SaveTrainingStateCallback("states")]),
            training(callbacks=[SaveTrainingStateCallback(shared / "states")]),
        )


def trial() -> list[str]:
    set_engine(fsdp2)
    answers = told(lambda: find_batch_size(tiny_trainer(), DATA, 4))
    set_engine(Accelerator)
    return answers + told(lambda: find_batch_size(tiny_trainer(), DATA, 4))


# ---------------------------------------------------------------------- tensor parallelism


def in_parallel(data: Any, callbacks: Any = (), **kwargs: Any) -> Trainer:
    mesh = Accelerator().torch_device_mesh["tp"]
    model = tiny_network()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    trainer = tiny_trainer(callbacks=callbacks, model=model, loss_func=loss)
    trainer.train(data(trainer.data_group), 1, per_device_batch_size=4, **kwargs)
    return trainer


def first_batches() -> list[str]:
    set_engine(tensor_parallel)
    return told(
        lambda: in_parallel(lambda group: Subset(DATA, [(index + rank()) % 16 for index in range(16)])),
        lambda: in_parallel(lambda group: DATA),
        lambda: in_parallel(
            lambda group: Subset(DATA, range(group.index, 16, group.size)), data_is_sharded=True
        ),
    )


def save_in_background() -> list[str]:
    def saver(in_background: bool) -> SaveTrainingStateCallback:
        return SaveTrainingStateCallback(folder, in_background=in_background, if_other_run="set_aside")

    folder = shared_folder() / "states"
    set_engine(tensor_parallel)
    answers = told(
        lambda: in_parallel(lambda group: DATA, [saver(True)]),
        lambda: in_parallel(lambda group: DATA, [saver(False)]),
    )
    set_engine(fsdp2)
    return answers + told(training(DATA, [saver(True)]))


ON_PROCESSES = {
    "{} is {} on the {} processes, but must be the same on all.": different_arguments,
    "{} was called inside {}": gather_in_a_step,
    "and could not be handed out to them": hand_out,
    "The batch_size that calculate_train_batch_loss returned differs from the samples": counting_later,
    "shards the model and loads whole states only. Set it to False": load_a_part,
    "'{}' has sharded files, and the processes {} do not see it. {}": shards_that_are_not_seen,
    "save_dir is '{}', where the processes {} do not see what the main one writes.": saves_that_are_not_seen,
    "{} trains a copy of the model, but {} spreads the model over the processes": trial,
    "The first batch differs between the {} processes that hold one copy of the model": first_batches,
    "in_background is True, but {} spreads the model over the processes": save_in_background,
}
CASES = {text: lambda batch_size, case=case: case() for text, case in ON_PROCESSES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("text", ON_PROCESSES)
def test_what_an_error_on_two_processes_says_instead_works(outcome: Any, text: str) -> None:
    for said in outcome.of(text):
        check_told(text, said)


if __name__ == "__main__":
    run_as_script(CASES)
