"""Each way out that an error about the state of a run names works: saving, resuming, stages, seen samples."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from accel_callbacks import SaveTrainingStateCallback
from accel_core import Trainer, TrainerCallback, latest_checkpoint, samples_of, updates_of
from states import edit, flip_bit
from tiny import Stream, tiny_data, tiny_network, tiny_trainer
from ways_out import Row, make_mistake_and_ways_out, name_of

DATA = tiny_data(16)
FOLDER = Path("checkpoints")
LOSS = nn.functional.cross_entropy


def train(trainer: Trainer | None = None, data: Any = DATA, callbacks: Any = (), **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=callbacks) if trainer is None else trainer
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    return trainer


def saver(every: int = 2) -> SaveTrainingStateCallback:
    return SaveTrainingStateCallback(
        FOLDER, save_every_n_updates=every, keep_last=9, if_other_run="set_aside"
    )


def saved(**kwargs: Any) -> Path:
    """The newest of two states of one epoch, in `FOLDER`."""
    train(callbacks=[saver()], **kwargs)
    return newest()


def newest() -> Path:
    folder = latest_checkpoint(FOLDER)
    assert folder is not None
    return folder


def resume(folder: Path | str | None = None, trainer: Trainer | None = None, **kwargs: Any) -> Trainer:
    trainer = train(trainer, **{"num_epochs": 2, "resume_from": folder or newest(), **kwargs})
    assert trainer.run_progress.updates_completed == 8
    return trainer


# ---------------------------------------------------------------------- damages


def resume_damaged(is_old: bool) -> None:
    folder = saved()
    if is_old:
        # A state of an older version, whose files have no digests.
        edit(folder, "digests", value={})
    path = folder / "optimizer.pt"
    if is_old:
        path.write_bytes(bytes(path.stat().st_size))
    else:
        flip_bit(path, random.Random(0))
    resume(folder)


# ---------------------------------------------------------------------- attributes and stages


class WithHead(Trainer):
    """Trains a module beside the model."""

    head: nn.Module

    def create_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.head(self.model(batch[0]))
        return {"loss": LOSS(outputs, batch[1]), "batch_size": len(outputs)}

    calculate_train_batch_loss = create_batch_loss


def with_head(size: int = 2, callbacks: Any = ()) -> Trainer:
    model, head = tiny_network(), nn.Linear(2, size, dtype=torch.float64)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    trainer = WithHead(model, LOSS, optimizer, callbacks=callbacks)
    trainer.head = head
    return trainer


def resume_without_its_head() -> None:
    train(with_head(callbacks=[saver()])).save_checkpoint("model.pt")
    resume()


def begin_from_the_export() -> None:
    trainer = tiny_trainer()
    trainer.load_checkpoint("model.pt", load_optimizer=False)
    train(trainer)


def second_stage(trainer: Trainer, **kwargs: Any) -> Trainer:
    return train(trainer, reset_run_history=False, **kwargs)


def two_stages(first: Path | None, second: Path | None, callbacks: Any = ()) -> Trainer:
    trainer = train(callbacks=callbacks, resume_from=first)
    return second_stage(trainer, resume_from=second)


def state_of_stage_two() -> Path:
    two_stages(None, None, callbacks=[saver()])
    return newest()


def lacking_its_weights() -> None:
    two_stages(state_of_stage_two(), None)


def resume_both() -> None:
    assert two_stages(newest(), newest()).run_progress.stage == 2


def with_another_run() -> None:
    """The state is of another run than the one that the trainer has trained."""
    folder = saved()
    second_stage(train(), resume_from=folder)


# ---------------------------------------------------------------------- when a state can be saved


def save_in(event: str) -> None:
    def act(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        trainer.save_training_state(f"{trainer.run_id}/state")

    train(callbacks=[type("Saves", (TrainerCallback,), {event: act})()])


# ---------------------------------------------------------------------- which samples were seen


def weighted() -> DataLoader[Any]:
    return DataLoader(DATA, 4, sampler=WeightedRandomSampler(torch.ones(16), 16))


def replay(data: Any = DATA, **kwargs: Any) -> Any:
    return tiny_trainer().replay(data, 1, update=3, folder=FOLDER, **kwargs)


def of_an_older_version() -> Path:
    folder = saved(num_epochs=1)
    for each in FOLDER.glob("update_*"):
        edit(each, "launches")
    return folder


def indices_of_replay() -> None:
    assert len(replay(per_device_batch_size=4).indices) == 4


ROWS: tuple[Row, ...] = (
    Row(
        "'{}' {}. {}",
        lambda: resume_damaged(is_old=False),
        (lambda: resume(newest()),),
        says="so that latest_checkpoint gives the state before it.",
    ),
    Row(
        "{} {}",
        lambda: resume_damaged(is_old=True),
        (lambda: resume(newest()),),
        says="so that latest_checkpoint gives the state before it.",
    ),
    Row(
        "which {}. Give the trainer the modules, optimizers and schedulers of the run that was saved, or begin",
        resume_without_its_head,
        (lambda: resume(trainer=with_head()), begin_from_the_export),
    ),
    Row(
        "'{}' holds the state of another module than trainer.{}: {} Make trainer.{} as it was in the run",
        lambda: (train(with_head(callbacks=[saver()])), resume(trainer=with_head(size=3))),
        (lambda: resume(trainer=with_head()),),
    ),
    Row(
        "resume_from is None, but the call of train before did nothing, since the state that it was given is",
        lacking_its_weights,
        (resume_both,),
    ),
    Row(
        "Pass the same resume_from to all calls of train, or leave out reset_run_history=False to resume",
        with_another_run,
        (lambda: two_stages(newest(), newest()), lambda: resume(trainer=train())),
    ),
    Row(
        "save_training_state was called before training, so there is no run to resume. Use save_checkpoint",
        lambda: tiny_trainer().save_training_state("state"),
        (lambda: tiny_trainer().save_checkpoint("model.pt"),),
    ),
    Row(
        "save_training_state was called in the middle of an update, but gradients are not part of the state.",
        lambda: save_in("on_train_step_end"),
        (lambda: save_in("on_optimizer_step_end"), lambda: save_in("on_train_epoch_end")),
    ),
    Row(
        "update is {}, but the state was saved after update {}. Pass a later state.",
        lambda: samples_of(saved() and FOLDER / "update_00000002", 3),
        (lambda: samples_of(FOLDER / "update_00000004", 3),),
    ),
    Row(
        "sample is {}, but must be an index of the data set, from 0.",
        lambda: updates_of(saved(), -1),
        (lambda: updates_of(FOLDER, 0),),
    ),
    Row(
        "sample is {}, but the data of the run had {}, counted from 0.",
        lambda: updates_of(saved(), 16),
        (lambda: updates_of(FOLDER, 15),),
    ),
    Row(
        "'{}' holds no complete training state. {}",
        lambda: samples_of("nothing", 1),
        (lambda: samples_of(saved(), 1), lambda: samples_of(FOLDER, 1)),
    ),
    Row(
        "'{}' does not say how its run has read the data, since an older version began it. Replay the update",
        lambda: samples_of(of_an_older_version(), 3),
        (indices_of_replay,),
    ),
    Row(
        "'{}' does not know which samples were seen: {}. Replay the update: its result has the batch.",
        lambda: samples_of(saved(data=Stream(DATA)), 3),
        (lambda: replay(Stream(DATA), per_device_batch_size=4).batch,),
    ),
    Row(
        "'{}' does not know which samples were seen",
        lambda: samples_of(saved(data=weighted()), 3),
        (lambda: replay(weighted()).batch,),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_an_error_about_a_state_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
