"""Each way out that an error of accel_callbacks names works: the mistake is made, then what the message says instead."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    ConvertSyncBatchNormCallback,
    EarlyStoppingCallback,
    HistoryFileCallback,
    MaxTimeCallback,
    MetricsCallback,
    ModelAverageCallback,
    ModelEmaCallback,
    ModelFreezer,
    OptunaPruningCallback,
    PredictionMetricsCallback,
    ProfileCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrackerCallback,
    TrainingStatisticsCallback,
    UnfreezeCallback,
    find_batch_size,
    find_learning_rate,
    plot_history,
    tracker,
)
from accel_core import Trainer
from case_runner import run_as_script
from layouts import fsdp2
from sharding import set_type
from tiny import tiny_data, tiny_network, tiny_trainer
from ways_out import (
    Row,
    check_every_error_is_known,
    check_every_way_out_is_known,
    check_told,
    make_mistake_and_ways_out,
    name_of,
    told,
    without,
)

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
    """Four layer groups, one of them without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.act = nn.Linear(5, 6), nn.Tanh()
        self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.double()

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.head(self.middle(self.act(self.encoder(inputs))))


def track(**kwargs: Any) -> Trainer:
    return train(TrackerCallback("tensorboard", "project", logging_dir="logs", **kwargs))


def track_without_packages() -> None:
    # Accelerate has looked for the packages when it was imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "get_available_trackers", list)
        track()


def with_batch_norm() -> nn.Module:
    """The second layer group is a batch norm."""
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()


def folder() -> Path:
    """One that is there."""
    Path("models").mkdir(exist_ok=True)
    return Path("models")


def flat() -> Any:
    """A test of learning rates whose loss rises."""
    return find_learning_rate(tiny_trainer(), DATA, min_lr=50.0, max_lr=1e4, num_updates=5)


def prediction_metrics(collect: Any = None, **kwargs: Any) -> Trainer:
    return train(PredictionMetricsCallback({"size": lambda a, b: float(len(a))}, collect, **kwargs))


def of_varying_size(batch: Any, output: Any) -> Any:
    """As many boxes for each sample as the batch has samples."""
    return torch.ones(len(batch[0]), len(batch[0])), batch[1]


def padded(batch: Any, output: Any) -> Any:
    boxes, targets = of_varying_size(batch, output)
    return nn.functional.pad(boxes, (0, 4 - len(boxes))), targets


def unfreeze(schedule: Any, **kwargs: Any) -> Trainer:
    return train(UnfreezeCallback(schedule, **kwargs), model=Network(), num_epochs=3)


def add_late() -> Trainer:
    trainer = tiny_trainer(model=Network())
    trainer.train(DATA, 1)
    trainer.callbacks.add_callback(UnfreezeCallback({2: 0}))
    trainer.train(DATA, 1)
    return trainer


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
        lambda: train(SaveBestModelCallback(folder())),
        (lambda: train(SaveBestModelCallback(folder() / "model.pt")),),
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
        tuple(
            functools.partial(lambda warmup: train(ModelEmaCallback(warmup=warmup)), warmup)
            for warmup in (True, False, "timm")
        ),
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
        lambda: ModelFreezer(Network()).freeze(4),
        (
            lambda: ModelFreezer(Network()).freeze(2),
            lambda: ModelFreezer(Network()).freeze_parameters("encoder.*"),
            lambda: ModelFreezer(Network()).unfreeze_parameters("encoder.*"),
        ),
    ),
    Row(
        "{} is {}, but must be a whole number from {} to ",
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
        (search,),
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
            lambda: prediction_metrics(
                lambda batch, output: (list(of_varying_size(batch, output)[0]), batch[1])
            ),
            lambda: prediction_metrics(padded),
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
        (track,),
    ),
    Row(
        " which is not installed. Install it with: pip install ",
        track_without_packages,
        (track,),
        says='pip install "accel-callbacks[tensorboard]"',
    ),
    Row(
        "but must be a dictionary of parts by epoch.",
        lambda: UnfreezeCallback([2, 3]),  # type: ignore[arg-type]
        (lambda: unfreeze({2: -2, 3: {"encoder.*": 1e-5}}),),
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
        "but it holds no parameters that could be frozen.",
        lambda: train(UnfreezeCallback({2: 1}), model=with_batch_norm()),
        (lambda: train(UnfreezeCallback({2: 1}, freeze_batch_norms=True), model=with_batch_norm()),),
        says="batch norms count with freeze_batch_norms=True.",
    ),
    Row(
        "but must have the index of a layer group or the name of parameters.",
        lambda: UnfreezeCallback({2: 0.5}),  # type: ignore[dict-item]
        (lambda: unfreeze({2: 0}), lambda: unfreeze({2: -2, 3: {"encoder.*": 1e-5}})),
    ),
)

CHECKS: tuple[Row, ...] = (
    Row(
        "Use 1 to average after each update.",
        lambda: ModelEmaCallback(every_n_updates=0),
        (lambda: train(ModelEmaCallback(every_n_updates=1)),),
    ),
    Row(
        "Pass the name of a file, or None to export nothing.",
        lambda: ModelEmaCallback(save_path=3),  # type: ignore[arg-type]
        (
            lambda: train(ModelEmaCallback(save_path="ema.pt")),
            lambda: train(ModelEmaCallback(save_path=None)),
        ),
    ),
    Row(
        "Use 2 to have the optimizer's memory in use.",
        lambda: find_batch_size(tiny_trainer(), DATA, 4, num_updates=0),
        (lambda: find_batch_size(tiny_trainer(), DATA, 4, num_updates=2),),
    ),
    Row(
        "Use 0.0 to count every better value as an improvement.",
        lambda: EarlyStoppingCallback(early_stopping_threshold=-1.0),
        (lambda: train(EarlyStoppingCallback(early_stopping_threshold=0.0)),),
    ),
    Row(
        "Use 0 to stop at any time.",
        lambda: EarlyStoppingCallback(min_epochs=-1),
        (lambda: train(EarlyStoppingCallback(min_epochs=0)),),
    ),
    Row(
        "Pass the name of a folder, such as 'run'.",
        lambda: HistoryFileCallback(3),  # type: ignore[arg-type]
        (lambda: train(HistoryFileCallback("run")),),
    ),
    Row(
        "Use 1e-7 for a rate at which nothing is learned.",
        lambda: find_learning_rate(tiny_trainer(), DATA, min_lr=0.0),
        (lambda: find_learning_rate(tiny_trainer(), DATA, min_lr=1e-7, num_updates=3),),
    ),
    Row(
        "Use 10.0 for a rate at which training fails.",
        lambda: find_learning_rate(tiny_trainer(), DATA, max_lr=-1.0),
        (lambda: find_learning_rate(tiny_trainer(), DATA, max_lr=10.0, num_updates=3),),
    ),
    Row(
        "Use 4.0 to stop at four times the lowest loss.",
        lambda: find_learning_rate(tiny_trainer(), DATA, stop_factor=0),
        (lambda: find_learning_rate(tiny_trainer(), DATA, stop_factor=4.0, num_updates=3),),
    ),
    Row(
        "Use 100 for a curve that can be read.",
        lambda: find_learning_rate(tiny_trainer(), DATA, num_updates=0),
        (lambda: find_learning_rate(tiny_trainer(), DATA, num_updates=100),),
    ),
    Row(
        "Leave the callback out to set no limit.",
        lambda: MaxTimeCallback(0),
        (train,),
    ),
    Row(
        "Pass an address such as 's3://bucket/run1', or a folder of another disk.",
        lambda: SaveTrainingStateCallback("states", mirror=3),  # type: ignore[arg-type]
        (
            lambda: train(SaveTrainingStateCallback("states", mirror="memory://bucket/run1")),
            lambda: train(SaveTrainingStateCallback("other", mirror="disk")),
        ),
    ),
    Row(
        "Use 0 to average from the beginning.",
        lambda: ModelAverageCallback(start_update=-1),
        (lambda: train(ModelAverageCallback(start_update=0)),),
    ),
    Row(
        "Use 5 for the mean of the last five.",
        lambda: ModelAverageCallback("latest", num_latest=0),
        (lambda: train(ModelAverageCallback("latest", num_latest=5)),),
    ),
    Row(
        "Leave it out for the warm-up of timm.",
        lambda: ModelEmaCallback(warmup="timm", warmup_gamma=0.0),
        (lambda: train(ModelEmaCallback(warmup="timm")),),
    ),
    Row(
        "Use None where this is not wanted.",
        lambda: SaveTrainingStateCallback("states", save_every_n_updates=0),
        (lambda: train(SaveTrainingStateCallback("states", save_every_n_updates=None)),),
    ),
    Row(
        "Pass the name of a picture, such as 'history.png'.",
        lambda: plot_history(train().run_history, 3),  # type: ignore[arg-type]
        (lambda: plot_history(train().run_history, "history.png"),),
    ),
    Row(
        "Pass collect=lambda batch, batch_output: ..., or leave it out.",
        lambda: prediction_metrics("labels"),
        (lambda: prediction_metrics(lambda batch, batch_output: (batch[1], batch[1])), prediction_metrics),
    ),
    Row(
        "Pass the name of a folder, such as 'profile'.",
        lambda: ProfileCallback(3),  # type: ignore[arg-type]
        (lambda: train(ProfileCallback("profile")),),
    ),
    Row(
        "Use 0 to begin at once.",
        lambda: ProfileCallback("profile", wait=-1),
        (lambda: train(ProfileCallback("profile", wait=0)),),
    ),
    Row(
        "Use 1, since the first update under a profiler is slow.",
        lambda: ProfileCallback("profile", warmup=-1),
        (lambda: train(ProfileCallback("profile", warmup=1)),),
    ),
    Row(
        "Use 1 to profile one update.",
        lambda: ProfileCallback("profile", active=0),
        (lambda: train(ProfileCallback("profile", active=1)),),
    ),
    Row(
        "Pass the name of a file, such as 'best_model.pt'.",
        lambda: SaveBestModelCallback(3),  # type: ignore[arg-type]
        (lambda: train(SaveBestModelCallback("best_model.pt")),),
    ),
    Row(
        "Use 1 to keep the best model only.",
        lambda: SaveBestModelCallback(keep=0),
        (lambda: train(SaveBestModelCallback(keep=1)),),
    ),
    Row(
        "Pass the name of a folder, such as 'checkpoints'.",
        lambda: SaveTrainingStateCallback(None),  # type: ignore[arg-type]
        (lambda: train(SaveTrainingStateCallback("checkpoints")),),
    ),
    Row(
        "Use None to keep all.",
        lambda: SaveTrainingStateCallback("states", keep_last=0),
        (lambda: train(SaveTrainingStateCallback("states", keep_last=None)),),
    ),
    Row(
        "Use 0 to wait for nothing.",
        lambda: SaveTrainingStateCallback("states", mirror_wait_seconds=-1.0),
        (lambda: train(SaveTrainingStateCallback("states", mirror_wait_seconds=0)),),
    ),
    Row(
        "Use 1 to send the loss of every update.",
        lambda: TrackerCallback("tensorboard", "project", log_every_n_updates=0),
        (lambda: track(log_every_n_updates=1),),
    ),
    Row(
        "Use 1 to record at every update.",
        lambda: TrainingStatisticsCallback(record_every_n_updates=0),
        (lambda: train(TrainingStatisticsCallback(record_every_n_updates=1)),),
    ),
    Row(
        "Pass {2: -2, 4: {'encoder.*': 1e-5}}, for example.",
        lambda: UnfreezeCallback({"2": -2}),  # type: ignore[dict-item]
        (lambda: unfreeze({2: -2, 3: {"encoder.*": 1e-5}}),),
    ),
)


# ---------------------------------------------------------------------- on two processes


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(5).double(), tiny_network())


def synchronise(batch_size: int) -> list[str]:
    return told(
        lambda: train(ConvertSyncBatchNormCallback(), model=normed()),
        lambda: train(model=normed()),
    )


def on_fsdp2(act: Callable[[], Any]) -> Callable[[], Any]:
    """What `act` does on FSDP2; afterwards trainers run on DDP again."""

    def acting() -> Any:
        accelerator = fsdp2()
        try:
            return act()
        finally:
            set_type(accelerator, DistributedType.MULTI_CPU)

    return acting


def average_latest(batch_size: int) -> list[str]:
    return told(
        on_fsdp2(lambda: train(ModelAverageCallback("latest", save_path=None))),
        on_fsdp2(lambda: train(ModelAverageCallback("mean", save_path=None))),
    )


def average_statistics(batch_size: int) -> list[str]:
    return told(
        on_fsdp2(lambda: train(ModelAverageCallback(save_path=None), model=normed())),
        on_fsdp2(
            lambda: train(ModelAverageCallback(save_path=None, update_batch_norm=False), model=normed())
        ),
        lambda: train(ModelAverageCallback(save_path=None), model=normed()),
    )


def freeze_all_along() -> Trainer:
    model = Network()
    ModelFreezer(model).freeze()
    return train(model=model)


def unfreeze_sharded(batch_size: int) -> list[str]:
    return told(on_fsdp2(lambda: unfreeze({2: 0})), lambda: unfreeze({2: 0}), on_fsdp2(freeze_all_along))


ON_PROCESSES = {
    "ConvertSyncBatchNormCallback needs an accelerator, but this run is on the CPU": synchronise,
    "average is 'latest', but ": average_latest,
    "but the statistics of batch norm cannot be computed for a model ": average_statistics,
    "UnfreezeCallback cannot unfreeze what ": unfreeze_sharded,
}
CASES = ON_PROCESSES
FACTS = {
    " cannot average a model that {} has sharded. ": "made with DeepSpeed in test_engines.py",
    "The averages are sharded, so there is no averaged model.": "no call reaches it: ema_model is None then",
}


# ---------------------------------------------------------------------- the tests


def test_every_error_of_a_callback_has_a_row() -> None:
    rows = [*(row.text for row in ROWS), *ON_PROCESSES]
    check_every_error_is_known("accel-callbacks", rows=rows, facts=FACTS)
    check_every_way_out_is_known("accel-callbacks", rows=(row.text for row in CHECKS))


@pytest.mark.parametrize("row", [*ROWS, *CHECKS], ids=name_of)
def test_what_an_error_of_a_callback_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


@pytest.mark.slow
@pytest.mark.parametrize("text", ON_PROCESSES)
def test_what_an_error_of_a_callback_on_two_processes_says_instead_works(outcome: Any, text: str) -> None:
    for said in outcome.of(text):
        check_told(text, said)


if __name__ == "__main__":
    run_as_script(CASES)
