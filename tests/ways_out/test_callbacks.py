"""Each way out that an error of accel_callbacks names works: the mistake is made, then what the message says instead."""

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import SGD, Adam
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    ConvertSyncBatchNormCallback,
    MetricsCallback,
    ModelAverageCallback,
    ModelEmaCallback,
    ModelFreezer,
    OptunaPruningCallback,
    PredictionMetricsCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrackerCallback,
    UnfreezeCallback,
    find_batch_size,
    find_learning_rate,
    plot_history,
)
from accel_core import ConfigurationError, InMemoryRunHistory, Trainer
from accel_core.run.trial import trial_of
from case_runner import run_as_script
from tiny import tiny_data, tiny_network, tiny_trainer
from ways_out import Row, check_every_error_is_known, make_mistake_and_ways_out, name_of

DATA, OTHER = tiny_data(16), tiny_data(7)


def train(*callbacks: Any, model: Any = None, **kwargs: Any) -> Trainer:
    """Two epochs of four updates."""
    trainer = tiny_trainer(callbacks=callbacks, model=model)
    trainer.train(DATA, **{"num_epochs": 2, "eval_dataset": OTHER, "per_device_batch_size": 4, **kwargs})
    return trainer


def with_rate(lr: float | None) -> Trainer:
    """A trainer whose optimizer chooses its rate itself if it is given none, as Adafactor does."""
    trainer = tiny_trainer()
    trainer.optimizer.param_groups[0]["lr"] = lr
    return trainer


def without(package: str, act: Callable[[], Any]) -> Callable[[], Any]:
    """What `act` does where a package is not installed."""

    def acting() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            return act()

    return acting


class Memory(nn.Module):
    """The tiny network on a device that has memory for `most` samples in a step."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.network, self.most = tiny_network(), most

    def forward(self, inputs: torch.Tensor) -> Any:
        if len(inputs) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.network(inputs)


class Lazy(nn.Module):
    """Learns how many inputs it has from its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(2, dtype=torch.float64)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.layer(inputs)


def called_once() -> nn.Module:
    model = Lazy()
    model(DATA.tensors[0])
    return model


class Held(nn.Module):
    """Holds a generator, which deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.names = tiny_network(), (name for name in "ab")

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.network(inputs)


class HeldWithCopy(Held):
    """Says how it is copied."""

    def __deepcopy__(self, memo: Any) -> nn.Module:
        copied = HeldWithCopy()
        copied.network = copy.deepcopy(self.network, memo)
        return copied


class Network(nn.Module):
    """Three layer groups, one of them without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.act, self.head = nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)
        self.double()

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.head(self.act(self.encoder(inputs)))


def flat() -> Any:
    """A test of learning rates whose loss rises."""
    return find_learning_rate(tiny_trainer(), DATA, min_lr=50.0, max_lr=1e4, num_updates=5)


def prediction_metrics(collect: Any = None, **kwargs: Any) -> Trainer:
    return train(PredictionMetricsCallback({"size": lambda a, b: float(len(a))}, collect, **kwargs))


def of_varying_size(batch: Any, output: Any) -> Any:
    return torch.ones(len(batch[0]), len(batch[0])), batch[1]


def unfreeze(schedule: Any, **kwargs: Any) -> Trainer:
    return train(UnfreezeCallback(schedule, **kwargs), model=Network(), num_epochs=3)


def add_late() -> Trainer:
    trainer = tiny_trainer(model=Network())
    trainer.train(DATA, 1)
    trainer.callbacks.add_callback(UnfreezeCallback({2: 0}))
    trainer.train(DATA, 1)
    return trainer


def trial() -> optuna.Trial:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study().ask()


def search(num_trials: int = 1) -> None:
    """An objective passes the trial on that Optuna gives it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(given: optuna.Trial) -> float:
        history = train(OptunaPruningCallback(given)).run_history
        return history.get_latest_metric("eval_loss_epoch")

    optuna.create_study().optimize(objective, n_trials=num_trials)


def names_of_groups() -> None:
    """The names that the message asks for."""
    names = [name for name, _ in Network().named_parameters()]
    assert names[0] == "encoder.weight"
    ModelFreezer(Network()).freeze_parameters(names[0])
    ModelFreezer(Network()).freeze_parameters("encoder.*")


ROWS: tuple[Row, ...] = (
    Row(
        "so find_batch_size could try no other. {}, and pass per_device_batch_size.",
        lambda: find_batch_size(tiny_trainer(), torch.utils.data.DataLoader(DATA, batch_size=2), 4),
        (lambda: find_batch_size(tiny_trainer(), DATA, 4),),
    ),
    Row(
        "so find_batch_size could try no other. {}, and pass per_device_batch_size.",
        lambda: find_batch_size(tiny_trainer(), DATA, 4, train_dataloader_kwargs={"batch_size": 2}),
        (lambda: find_batch_size(tiny_trainer(), DATA, 4, train_dataloader_kwargs={}),),
    ),
    Row(
        "but not even one sample fits into the memory ",
        lambda: find_batch_size(tiny_trainer(model=Memory(0)), DATA, 2),
        (lambda: find_batch_size(tiny_trainer(model=Memory(1)), DATA, 2),),
    ),
    Row(
        "decay is {}, but must be a number from 0 to below 1.",
        lambda: ModelEmaCallback(1.0),
        (lambda: train(ModelEmaCallback(0.999)),),
    ),
    Row(
        "which is a folder, but an export is a file. Pass ",
        lambda: train(SaveBestModelCallback(".")),
        (lambda: train(SaveBestModelCallback("./model.pt")),),
    ),
    Row(
        "so each would overwrite what the other has saved.",
        lambda: train(SaveBestModelCallback("model.pt"), ModelEmaCallback(save_path="model.pt")),
        (lambda: train(SaveBestModelCallback("model.pt"), ModelEmaCallback(save_path="ema.pt")),),
    ),
    Row(
        "but min_lr must be below max_lr, stop_factor above 1 and num_updates at least 3.",
        lambda: find_learning_rate(tiny_trainer(), DATA, min_lr=1.0, max_lr=0.1),
        (lambda: find_learning_rate(tiny_trainer(), DATA),),
    ),
    Row(
        "has none to find. Give the optimizer a number as lr, or do not call find_learning_rate.",
        lambda: find_learning_rate(with_rate(None), DATA),
        (lambda: find_learning_rate(with_rate(0.1), DATA, num_updates=5),),
    ),
    Row(
        "none can be suggested. Look at plot(path), and try another min_lr",
        lambda: flat().suggestion,
        (
            lambda: flat().plot("rates.png"),
            lambda: find_learning_rate(tiny_trainer(), DATA, min_lr=1e-3, num_updates=30).suggestion,
        ),
    ),
    Row(
        "prefix is {}, but must be a string. Pass 'test_'",
        lambda: MetricsCallback(MulticlassAccuracy(2), prefix=None),  # type: ignore[arg-type]
        (lambda: train(MetricsCallback(MulticlassAccuracy(2), prefix="test_")),),
    ),
    Row(
        "prefix is {}, but must be a string. Pass 'test_'",
        lambda: prediction_metrics(prefix=3),
        (lambda: prediction_metrics(prefix="test_"),),
    ),
    Row(
        "first weights would be averaged after update {}, but the run has {} updates.",
        lambda: train(ModelAverageCallback(start_update=7, every_n_updates=4)),
        (
            lambda: train(ModelAverageCallback(start_update=4, every_n_updates=4)),
            lambda: train(ModelAverageCallback(start_update=7)),
        ),
    ),
    Row(
        "first weights would be averaged after update {}, but the run has {} updates.",
        lambda: train(ModelAverageCallback(every_n_updates=9)),
        (lambda: train(ModelAverageCallback(every_n_updates=8, start_update=0)),),
    ),
    Row(
        " has no values before the first forward pass. Call the model once with a batch",
        lambda: train(ModelEmaCallback(), model=Lazy()),
        (lambda: train(ModelEmaCallback(), model=called_once()),),
    ),
    Row(
        " cannot be copied: {} Give it a __deepcopy__, or leave {} out.",
        lambda: train(ModelEmaCallback(), model=Held()),
        (lambda: train(ModelEmaCallback(), model=HeldWithCopy()), lambda: train(model=Held())),
    ),
    Row(
        "but must be True, False or 'timm'. Use True for a short warm-up.",
        lambda: ModelEmaCallback(warmup="short"),
        tuple(functools.partial(ModelEmaCallback, warmup=warmup) for warmup in (True, False, "timm")),
    ),
    Row(
        "but warmup_gamma and warmup_power belong to warmup='timm'.",
        lambda: ModelEmaCallback(warmup_power=0.75),
        (
            lambda: train(ModelEmaCallback(warmup="timm", warmup_power=0.75)),
            lambda: train(ModelEmaCallback(warmup=True)),
        ),
    ),
    Row(
        "model is {}, but must be a torch.nn.Module. Pass the model itself.",
        lambda: ModelFreezer(Network),  # type: ignore[arg-type]
        (lambda: ModelFreezer(Network()),),
    ),
    Row(
        "has the layer groups {}. Pass another index, or the names of ",
        lambda: ModelFreezer(Network()).freeze(3),
        (
            lambda: ModelFreezer(Network()).freeze(2),
            lambda: ModelFreezer(Network()).freeze_parameters("encoder.*"),
            lambda: ModelFreezer(Network()).unfreeze_parameters("encoder.*"),
        ),
    ),
    Row(
        "part is {}, but must be a whole number from ",
        lambda: unfreeze({2: 7}),
        (lambda: unfreeze({2: 0}), lambda: unfreeze({2: "encoder.*"})),
    ),
    Row(
        "The name {} matches no parameter of ",
        lambda: ModelFreezer(Network()).freeze_parameters("encodr.*"),
        (names_of_groups,),
    ),
    Row(
        "OptunaPruningCallback needs the package 'optuna', which is not installed.",
        without("optuna", lambda: OptunaPruningCallback(None)),
        (lambda: OptunaPruningCallback(trial()),),
    ),
    Row(
        "must be a trial of Optuna. Pass the one that Optuna gives to your objective.",
        lambda: OptunaPruningCallback(optuna.create_study()),
        (search,),
    ),
    Row(
        "trial is None on the main process",
        lambda: train(OptunaPruningCallback(None)),
        (search,),
    ),
    Row(
        " needs the package 'matplotlib', which is not installed.",
        without("matplotlib.figure", lambda: plot_history(train().run_history)),
        (lambda: plot_history(train().run_history),),
    ),
    Row(
        "run_history is empty. Pass trainer.run_history, or several of them.",
        lambda: plot_history([]),
        (
            lambda: plot_history(train().run_history),
            lambda: plot_history([train().run_history, train().run_history]),
        ),
    ),
    Row(
        "but must have run histories. Pass trainer.run_history, or several of them in a list or a dictionary.",
        lambda: plot_history(train()),  # type: ignore[arg-type]
        (
            lambda: plot_history(train().run_history),
            lambda: plot_history([train().run_history]),
            lambda: plot_history({"first": train().run_history}),
        ),
    ),
    Row(
        " has no values, so there is nothing to draw. Call plot_history after train.",
        lambda: plot_history(tiny_trainer().run_history),
        (lambda: plot_history(train().run_history),),
    ),
    Row(
        "but must be a tensor with a first dimension of samples, a list of one item a sample",
        lambda: prediction_metrics(lambda batch, output: (3.0, batch[1])),
        (
            lambda: prediction_metrics(lambda batch, output: (output["model_outputs"], batch[1])),
            lambda: prediction_metrics(lambda batch, output: (list(batch[0]), batch[1])),
            lambda: prediction_metrics(lambda batch, output: (({"rows": batch[0]}, batch[0]), batch[1])),
        ),
    ),
    Row(
        "but must return a tuple of outputs and targets. Return ",
        lambda: prediction_metrics(lambda batch, output: batch[1]),
        (lambda: prediction_metrics(lambda batch, batch_output: (batch_output["model_outputs"], batch[1])),),
    ),
    Row(
        " have samples of the shapes {}, which cannot be concatenated. Return lists of one item a sample",
        lambda: prediction_metrics(of_varying_size),
        (
            lambda: prediction_metrics(lambda batch, output: (list(batch[0]), batch[1])),
            lambda: prediction_metrics(
                lambda batch, output: (nn.functional.pad(batch[0], (0, 4 - len(batch[0]))), batch[1])
            ),
        ),
    ),
    Row(
        "and a store keeps one model. Use keep=1, or a path of this machine.",
        lambda: SaveBestModelCallback("memory://ways/best.pt", keep=2),
        (
            lambda: train(SaveBestModelCallback("memory://ways/best.pt", keep=1)),
            lambda: train(SaveBestModelCallback("best.pt", keep=2)),
        ),
    ),
    Row(
        ", which no process can handle. Use 'SIGTERM'.",
        lambda: SaveTrainingStateCallback("states", save_on_signals=["SIGKILL"]),
        (lambda: train(SaveTrainingStateCallback("states", save_on_signals=["SIGTERM"])),),
    ),
    Row(
        "but must have names of signals, such as 'SIGTERM'.",
        lambda: SaveTrainingStateCallback("states", save_on_signals=["TERM"]),
        (lambda: train(SaveTrainingStateCallback("states", save_on_signals="SIGTERM")),),
    ),
    Row(
        "but must be one of the trackers that Accelerate knows: ",
        lambda: TrackerCallback("tensorbord", "project"),
        (lambda: train(TrackerCallback("tensorboard", "project", logging_dir="logs")),),
    ),
    Row(
        " which is not installed. Install it with: pip install ",
        lambda: TrackerCallback("aim", "project"),
        (lambda: train(TrackerCallback("tensorboard", "project", logging_dir="logs")),),
    ),
    Row(
        "but must be a dictionary of parts by epoch.",
        lambda: UnfreezeCallback([2, 3]),  # type: ignore[arg-type]
        (lambda: UnfreezeCallback({2: -2, 4: {"encoder.*": 1e-5}}),),
    ),
    Row(
        "so there is nothing to train in the first epoch. Leave out what is to be trained from the beginning",
        lambda: unfreeze({2: "*"}),
        (lambda: unfreeze({2: 0}),),
    ),
    Row(
        "UnfreezeCallback was added after the trainer had prepared its model",
        add_late,
        (lambda: unfreeze({2: 0}),),
    ),
    Row(
        "for epoch 1, but all that schedule names is frozen in epoch 1. Begin with epoch 2",
        lambda: UnfreezeCallback({1: -1, 2: 0}),
        (lambda: unfreeze({2: 0}),),
    ),
    Row(
        "but it holds no parameters that could be frozen.",
        lambda: unfreeze({2: 0, 3: 1}),
        (lambda: ModelFreezer(Network()).get_layer_groups(), lambda: unfreeze({2: 0})),
    ),
    Row(
        "but must have the index of a layer group or the name of parameters.",
        lambda: UnfreezeCallback({2: 0.5}),  # type: ignore[dict-item]
        (lambda: unfreeze({2: 0}), lambda: unfreeze({2: -3, 3: {"encoder.*": 1e-5}})),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_an_error_of_a_callback_says_instead_works(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_mistake_and_ways_out(row)
