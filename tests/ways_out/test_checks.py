"""Each way out that an error about an argument names works: the arguments of a trainer and of its methods.

The checks of `checks/values.py` are given the way out by their callers, so these are read and executed too.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import StepLR

from accel_callbacks import SaveTrainingStateCallback
from accel_core import (
    InMemoryRunHistory,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
    samples_of,
)
from tiny import Stream, tiny_network, tiny_trainer
from ways_out import (
    ABOUT_EVALUATION,
    DATA,
    Row,
    check_every_error_is_known,
    make_mistake_and_ways_out,
    name_of,
    train,
    training,
    ways_out_of_checks,
)

SGD, LOSS = torch.optim.SGD, nn.functional.cross_entropy
STORE = "memory://ways-out/run"


def made(model: Any = None, loss_func: Any = LOSS, optimizer: Any = SGD, **kwargs: Any) -> Trainer:
    """A trainer; an optimizer that is a function gets the parameters of the model."""
    model = tiny_network() if model is None else model
    optimizer = optimizer(model.parameters()) if optimizer is SGD else optimizer
    return Trainer(model, loss_func, optimizer, callbacks=(), **kwargs)


def saved(**kwargs: Any) -> Path:
    """A folder with a training state of update 4."""
    train(callbacks=[SaveTrainingStateCallback("checkpoints", save_every_n_updates=4)], **kwargs)
    folder = latest_checkpoint("checkpoints")
    assert folder is not None
    return folder


def frozen() -> nn.Module:
    return tiny_network().requires_grad_(False)


def unfrozen() -> nn.Module:
    model = frozen()
    for parameter in model[2].parameters():  # type: ignore[index]
        parameter.requires_grad_(True)
    return model


def moved_afterwards() -> Trainer:
    trainer = made()
    trainer.model = tiny_network()
    return trainer


def own_loss(self: Trainer, batch: Any) -> dict[str, Any]:
    outputs = self.model(batch[0])
    return {"loss": LOSS(outputs, batch[1]), "batch_size": len(outputs)}


def without_loss(**methods: Any) -> Trainer:
    kind = type("OwnTrainer", (Trainer,), methods)
    model = tiny_network()
    trainer: Trainer = kind(model, None, SGD(model.parameters()), callbacks=())
    return trainer


def naming_its_model() -> Trainer:
    trainer = made()
    trainer.net = trainer.model  # type: ignore[attr-defined]
    return trainer


def naming_it_no_more() -> Trainer:
    trainer = naming_its_model()
    del trainer.net  # type: ignore[attr-defined]
    return trainer


def step_at_end(**kwargs: Any) -> Trainer:
    def on_optimizer_step_end(self: Any, trainer: Trainer) -> None:
        trainer.step_optimizer(trainer.further, **kwargs)  # type: ignore[attr-defined]

    kind = type("Steps", (TrainerCallback,), {"on_optimizer_step_end": on_optimizer_step_end})
    trainer = tiny_trainer(callbacks=[kind()])
    trainer.further = SGD([nn.Parameter(torch.ones(1))])  # type: ignore[attr-defined]
    return train(trainer)


def through_a_store() -> None:
    train(
        callbacks=[SaveTrainingStateCallback("checkpoints", save_every_n_updates=4, mirror=STORE)]
    ).save_checkpoint("memory://ways-out/model.pt")
    assert latest_checkpoint(STORE, cache="elsewhere") is not None


def exported(path: Any) -> Trainer:
    trainer = train()
    trainer.save_checkpoint(path)
    trainer.load_checkpoint(path)
    return trainer


class WithoutIndex(Stream):
    """Samples that have no index."""


PARTS: tuple[Row, ...] = (
    Row(
        "model is {}, but must be an instance of torch.nn.Module. Create it first: model = Net().",
        lambda: Trainer(nn.Identity, LOSS, None),  # type: ignore[arg-type]
        (lambda: train(made(nn.Sequential(nn.Linear(5, 2, dtype=torch.float64)))),),
    ),
    Row(
        "loss_func is the class {}, but must be an instance or a function. Create it: {}().",
        lambda: made(loss_func=nn.CrossEntropyLoss),
        (lambda: train(made(loss_func=nn.CrossEntropyLoss())),),
    ),
    Row(
        "Pass a function such as torch.nn.functional.cross_entropy, or a module.",
        lambda: made(loss_func="cross_entropy"),
        (
            lambda: train(made(loss_func=torch.nn.functional.cross_entropy)),
            lambda: train(made(loss_func=nn.CrossEntropyLoss())),
        ),
    ),
    Row(
        "optimizer is the class {}, but must be an instance. Create it with the model's parameters: {}(",
        lambda: made(optimizer=torch.optim.Adam),
        (lambda: train(made(optimizer=SGD)),),
    ),
    Row(
        "optimizer is {}, but must be an instance of torch.optim.Optimizer. Create one, for example",
        lambda: made(optimizer="sgd"),
        (lambda: train(tiny_trainer(lr=0.1)),),
    ),
    Row(
        "{} is {}, but must be an instance of {}. Pass {}={}(), or leave it out.",
        lambda: made(run_history={}),
        (lambda: train(made(run_history=InMemoryRunHistory())), training()),
    ),
    Row(
        "Pass {}={}(), or leave it out.",
        lambda: made(accelerator="cpu"),
        (lambda: train(made(accelerator=Accelerator())), training()),
    ),
    Row(
        "seed is {}, but must be a whole number from 0 to 2^63 - 1. Use None to seed nothing.",
        lambda: made(seed=-1),
        tuple(functools.partial(lambda seed: train(made(seed=seed)), seed) for seed in (0, 2**63 - 1, None)),
    ),
    Row(
        "so there is nothing to train. Unfreeze some of it: parameter.requires_grad_(True).",
        lambda: train(made(frozen())),
        (lambda: train(made(unfrozen())),),
    ),
    Row(
        "Replace layers, copy and move the model first, and create the optimizer from its parameters",
        lambda: train(moved_afterwards()),
        (lambda: train(made(tiny_network())),),
    ),
    Row(
        "loss_func is None, but {} needs it. Pass a loss function, or override {}.",
        lambda: train(without_loss()),
        (training(), lambda: train(without_loss(calculate_train_batch_loss=own_loss))),
    ),
    Row(
        "trainer.{} is the model itself, but must not be",
        lambda: train(naming_its_model()),
        (lambda: train(naming_it_no_more()),),
    ),
)

TRAINING: tuple[Row, ...] = (
    Row(
        "num_epochs and max_num_train_steps are both None, but one must say when to end.",
        lambda: train(num_epochs=None),
        (training(num_epochs=1), training(num_epochs=None, max_num_train_steps=1)),
    ),
    Row(
        "{} is {}, but must be a whole number of at least {}. {}",
        lambda: train(num_epochs=1.5),
        (training(num_epochs=2),),
    ),
    Row("{} is {}, but must be at least {}. {}", lambda: train(num_epochs=0), (training(num_epochs=1),)),
    Row("Use 1 for a single pass over the data.", lambda: train(num_epochs=0), (training(num_epochs=1),)),
    Row(
        "Use 1 for single samples.",
        lambda: train(per_device_batch_size=0),
        (training(per_device_batch_size=1),),
    ),
    Row(
        "It counts updates; use 1 for a single one.",
        lambda: train(max_num_train_steps=0),
        (training(max_num_train_steps=1),),
    ),
    Row(
        "Use 1 to update after every batch.",
        lambda: train(gradient_accumulation_steps=0),
        (training(gradient_accumulation_steps=1),),
    ),
    Row(
        "Use None to leave gradients as they are.",
        lambda: train(gradient_clip_value="1"),
        (training(gradient_clip_value=None), training(gradient_clip_norm=None)),
    ),
    Row(
        "{} is {}, but must be a number above 0. {}",
        lambda: train(gradient_clip_norm=0),
        (training(gradient_clip_norm=0.5),),
    ),
    Row(
        "Use None not to clip.",
        lambda: step_at_end(gradient_clip_norm=-1),
        (lambda: step_at_end(gradient_clip_norm=None, gradient_clip_value=None),),
    ),
    Row(
        "{} is {}, but must be a number of at least 0. {}",
        lambda: SaveTrainingStateCallback(mirror=STORE, mirror_wait_seconds=-1),
        (training(callbacks=[SaveTrainingStateCallback("states", mirror=STORE, mirror_wait_seconds=60)]),),
    ),
    Row(
        "{} is {}, but must be one of {}.{}",
        lambda: train(scheduler_step_every="epochs"),
        (training(scheduler_step_every="epoch"), training(scheduler_step_every="update")),
    ),
    Row(
        "{} is {}, but must be a function. {}",
        lambda: train(create_scheduler_fn="step"),
        (training(create_scheduler_fn=functools.partial(StepLR, step_size=1)),),
    ),
    Row(
        "Pass a function from an optimizer to a scheduler.",
        lambda: train(create_scheduler_fn=3),
        (training(create_scheduler_fn=lambda optimizer: StepLR(optimizer, 1)),),
    ),
    Row(
        "{} is a {}, which is a scheduler, but must be a function from an optimizer to one.",
        lambda: train(create_scheduler_fn=StepLR(SGD([nn.Parameter(torch.ones(1))]), 1)),
        (training(create_scheduler_fn=functools.partial(StepLR, step_size=1)),),
    ),
    Row(
        "seed_each_sample is True, but the samples of {} have no index to seed them by.",
        lambda: train(data=WithoutIndex(DATA), seed_each_sample=True),
        (training(data=WithoutIndex(DATA)), training(seed_each_sample=True)),
    ),
    Row(
        "Leave it out to take per_device_batch_size.",
        lambda: train(eval_dataset=DATA, eval_per_device_batch_size=0),
        (training(eval_dataset=DATA),),
    ),
    Row(
        "Pass a function of the outputs of one batch, or leave it out.",
        lambda: tiny_trainer().predict(DATA, outputs="argmax"),  # type: ignore[arg-type]
        (
            lambda: tiny_trainer().predict(DATA, outputs=lambda logits: logits.argmax(1)),
            lambda: tiny_trainer().predict(DATA),
        ),
    ),
)

PATHS: tuple[Row, ...] = (
    Row("{} is {}, but must be a path. {}", lambda: exported(3), (lambda: exported("model.pt"),)),
    Row(
        "Pass the name of a file, such as 'model.pt'.",
        lambda: exported(""),
        (lambda: exported("model.pt"),),
    ),
    Row("{} is {}, but must name something. {}", lambda: exported("."), (lambda: exported("model.pt"),)),
    Row(
        "bytes, none of which is zero. Use a shorter name without",
        lambda: exported("n" * 300),
        (lambda: exported("n" * 255 + "/model.pt"),),
    ),
    Row(
        "Pass the file that save_checkpoint wrote.",
        lambda: tiny_trainer().load_checkpoint(None),  # type: ignore[arg-type]
        (lambda: exported("model.pt"),),
    ),
    Row(
        "Pass the name of a folder.",
        lambda: train().save_training_state(3),  # type: ignore[arg-type]
        (lambda: train().save_training_state("state"),),
    ),
    Row(
        "Pass the name of a file, such as 'history.csv'.",
        lambda: train().run_history.to_csv(3),  # type: ignore[arg-type]
        (lambda: train().run_history.to_csv("history.csv"),),
    ),
    Row(
        "Pass the folder of a training state, as latest_checkpoint gives it.",
        lambda: tiny_trainer().load_training_state(3),  # type: ignore[arg-type]
        (lambda: tiny_trainer().load_training_state(saved()),),
    ),
    Row(
        "Pass the folder of a training state, such as latest_checkpoint('checkpoints') gives it, which is "
        "None, to start afresh, if there is none yet.",
        lambda: train(resume_from=3),
        (
            lambda: train(resume_from=latest_checkpoint("none")),
            lambda: train(resume_from=saved(), num_epochs=2),
        ),
    ),
    Row(
        "Pass a training state, or the folder in which they are saved.",
        lambda: samples_of(3, 1),  # type: ignore[arg-type]
        (lambda: samples_of(saved(), 1), lambda: samples_of("checkpoints", 1)),
    ),
    Row(
        "Updates are counted from 1.", lambda: samples_of(saved(), 0), (lambda: samples_of("checkpoints", 1),)
    ),
    Row(
        "{} is '{}', an address of a store, but must be a path of this machine. {} To keep training states",
        lambda: SaveTrainingStateCallback(STORE),
        (through_a_store,),
    ),
    Row(
        "{} is Path('{}'), an address of a store, which loses a slash as a Path. Pass it as text.",
        lambda: exported(Path("memory://ways-out/model.pt")),
        (lambda: exported("memory://ways-out/model.pt"),),
    ),
    Row(
        "{} is '{}', {}. {}",
        lambda: exported("memory:/ways-out/model.pt"),
        (lambda: exported("memory://ways-out/model.pt"),),
        says="in which one slash follows the scheme, but must have two.",
    ),
)

ROWS = PARTS + TRAINING + PATHS


CHECKED = [f"accel-core/src/accel_core/{part}" for part in ("checks", "run/train_arguments.py")]


def test_every_error_about_an_argument_has_a_row() -> None:
    given = set(ways_out_of_checks("accel-core/src/accel_core"))
    check_every_error_is_known(*CHECKED, rows=[row.text for row in ROWS if row.text not in given])


def test_every_way_out_that_a_check_is_given_has_a_row() -> None:
    texts = set(ways_out_of_checks("accel-core/src/accel_core/run", "accel-core/src/accel_core/checks"))
    texts = {text for text in texts if not ABOUT_EVALUATION.search(text)}
    assert len(texts) >= 16
    assert [text for text in texts if not any(row.text == text for row in ROWS)] == []


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_an_error_about_an_argument_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
