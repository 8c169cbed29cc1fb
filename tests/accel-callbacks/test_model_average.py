"""The mean of weights is that of torch, has statistics of its own, is evaluated, resumes, and leaves training alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    EarlyStoppingCallback,
    MetricsCallback,
    ModelAverageCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
)
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import keep_in_eval_mode
from case_runner import run_as_script
from tiny import SaveAt, Stream, assert_same_tensors, tiny_data, tiny_network, tiny_trainer, weights_of

METRIC = "average_model_eval_loss_epoch"


def normed(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(5).double(), nn.Dropout(dropout), tiny_network())


def train(
    *callbacks: Any, model: nn.Module | None = None, epochs: int = 3, data: Any = None, **kwargs: Any
) -> Trainer:
    """Ten updates an epoch."""
    trainer = tiny_trainer(callbacks=callbacks, model=normed() if model is None else model)
    kwargs = {"eval_dataset": tiny_data(13), "per_device_batch_size": 4, **kwargs}
    trainer.train(tiny_data(40) if data is None else data, epochs, **kwargs)
    return trainer


class Keep(TrainerCallback):
    """Keeps a copy of the model after each update."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.models.append(copy.deepcopy(trainer.get_model()))


def expected_average(models: list[nn.Module]) -> nn.Module:
    """What torch gives for them."""
    averaged = AveragedModel(models[0])
    for model in models:
        averaged.update_parameters(model)
    return averaged.module


def assert_close(one: Any, other: Any) -> None:
    # AveragedModel counts in a tensor of float32.
    torch.testing.assert_close(parameters_of(one), parameters_of(other), rtol=1e-5, atol=1e-7)


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


# ---------------------------------------------------------------------- the average


@pytest.mark.parametrize(
    ("kwargs", "updates"),
    [
        ({}, range(1, 31)),
        ({"start_update": 12}, range(13, 31)),
        ({"every_n_updates": 10}, (10, 20, 30)),
        ({"start_update": 5, "every_n_updates": 10}, (15, 25)),
        ({"average": "latest", "num_latest": 3, "every_n_updates": 5}, (20, 25, 30)),
        ({"average": "latest", "num_latest": 9, "every_n_updates": 10}, (10, 20, 30)),
        ({"average": "latest", "num_latest": 2, "start_update": 27}, (29, 30)),
    ],
)
def test_the_average_is_that_of_torch_over_the_weights_that_are_taken(kwargs: Any, updates: Any) -> None:
    average, keep = ModelAverageCallback(**kwargs, save_path=None), Keep()
    train(average, keep, model=tiny_network(), eval_dataset=None)
    expected = expected_average([keep.models[update - 1] for update in updates])
    assert_close(average.average_model, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_statistics_of_batch_norm_are_those_of_update_bn_over_the_training_data(dropout: float) -> None:
    average, keep = ModelAverageCallback(save_path=None), Keep()
    trainer = train(average, keep, model=normed(dropout))
    norm: Any = average.average_model[0]  # type: ignore[index]
    batches = DataLoader(tiny_data(40), batch_size=4)
    # The first layer sees the data itself, so the order decides nothing but the batches.
    whole = expected_average(keep.models)
    update_bn(batches, whole)
    assert_close(average.average_model, whole)
    assert int(norm.num_batches_tracked) == 10
    assert torch.allclose(norm.running_mean, whole[0].running_mean, rtol=1e-12)  # type: ignore[index]
    assert not torch.equal(norm.running_mean, trainer.model[0].running_mean)  # type: ignore[index]
    assert norm.momentum == 0.1
    assert not any(module.training for module in average.average_model.modules())  # type: ignore[union-attr]


def test_statistics_of_frozen_batch_norm_are_kept() -> None:
    models = [nn.Sequential(nn.BatchNorm1d(5).double(), nn.BatchNorm1d(5).double(), tiny_network())]
    models.append(copy.deepcopy(models[0]))
    keep_in_eval_mode([models[0][0]])
    models[1][0].eval()
    for model in models:
        average = ModelAverageCallback(save_path=None)
        train(average, model=model)
        frozen, free = list(average.average_model.children())[:2]  # type: ignore[union-attr]
        assert torch.equal(frozen.running_var, torch.ones(5)), "as at the beginning"
        # The first layer hands on its input as it is, so that the second sees it.
        assert int(free.num_batches_tracked) == 10
        assert not torch.equal(free.running_var, torch.ones(5))


def test_without_update_batch_norm_the_statistics_are_those_of_the_model() -> None:
    average = ModelAverageCallback(save_path=None, update_batch_norm=False)
    trainer = train(average)
    assert_same_tensors(dict(average.average_model.named_buffers()), dict(trainer.model.named_buffers()))  # type: ignore[union-attr]


def test_synchronised_batch_norm_waits_for_nobody() -> None:
    """Its own forward needs a GPU, and as many batches on every process."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(normed())
    average = ModelAverageCallback(save_path=None)
    average.on_optimizer_step_end = lambda trainer: None  # type: ignore[method-assign]

    class Complete(TrainerCallback):
        def on_training_run_start(self, trainer: Trainer) -> None:
            average.num_updates = 1
            average.complete(trainer, average.average_model)  # type: ignore[arg-type]
            assert "forward" not in vars(average.average_model[0])  # type: ignore[index]
            trainer.request_stop("enough")

        order = 30

    train(average, Complete(), model=model)
    assert int(average.average_model[0].num_batches_tracked) == 10  # type: ignore[index]


@pytest.mark.parametrize("kind", ["tensors", "ready batches", "iterable", "by workers"])
def test_training_is_not_changed_by_one_bit(kind: str) -> None:
    def outcome(*callbacks: Any) -> tuple[Any, ...]:
        data: Any = tiny_data(40)
        if kind == "ready batches":
            data = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2))
        if kind == "iterable":
            data = Stream(data)
        workers = {"num_workers": 2 if kind == "by workers" else 0}
        kwargs = {} if kind == "ready batches" else {"train_dataloader_kwargs": workers}
        trainer = train(*callbacks, model=normed(0.5), data=data, **kwargs)
        records = [r for r in trainer.run_history.to_records() if "average_model" not in r["name"]]
        return records, trainer.model.state_dict(), torch.get_rng_state().tolist()

    plain, averaged = outcome(), outcome(ModelAverageCallback(save_path=None, every_n_updates=3))
    assert averaged[0] == plain[0]
    assert_same_tensors(averaged[1], plain[1])
    assert averaged[2] == plain[2]


# ---------------------------------------------------------------------- evaluation and export


def test_it_is_evaluated_with_the_same_metrics_on_every_set_once_there_is_one() -> None:
    metrics = MetricsCallback({"accuracy": MulticlassAccuracy(2).double()})
    average = ModelAverageCallback(start_update=10, every_n_updates=5, save_path=None)
    sets = {"": tiny_data(13), "shifted": tiny_data(7)}
    trainer = train(average, metrics, eval_dataset=sets, eval_at_start=True)
    records = trainer.run_history.to_records()
    for name in (METRIC, "average_model_accuracy", f"shifted_{METRIC}", "shifted_average_model_accuracy"):
        assert [r["epoch"] for r in records if r["name"] == name] == [2, 3], name
    latest = trainer.run_history.get_latest_metric(METRIC)
    trainer.model = average.average_model  # type: ignore[assignment]
    assert trainer.evaluate(tiny_data(13), 4)["evaluation_loss"] == latest


def test_who_watches_an_average_waits_for_it_and_a_wrong_name_is_still_told(tmp_path: Path) -> None:
    stop = EarlyStoppingCallback(1, 100.0, METRIC)
    average = ModelAverageCallback(start_update=15, save_path=tmp_path / "average.pt")
    trainer = train(average, stop, epochs=5)
    assert trainer.run_progress.epochs_completed == 3, "two evaluations of the average"
    assert torch.load(tmp_path / "average.pt")[METRIC] == average.best_metric
    with pytest.raises(ConfigurationError, match="EarlyStoppingCallback watches 'average_model_los'"):
        train(ModelAverageCallback(save_path=None), EarlyStoppingCallback(watch_metric="average_model_los"))


@pytest.mark.parametrize("kwargs", [{"eval_dataset": None}, {}])
def test_where_it_is_not_evaluated_it_is_exported_at_the_end_with_its_statistics(
    tmp_path: Path, kwargs: Any
) -> None:
    path = tmp_path / "average.safetensors"
    average = ModelAverageCallback(evaluate_during_training=not kwargs, save_path=path)
    if not kwargs:
        average.evaluate_during_training = False
    train(average, **kwargs)
    trainer = tiny_trainer(model=normed())
    trainer.load_checkpoint(path)
    assert_same_tensors(trainer.model.state_dict(), average.average_model.state_dict())  # type: ignore[union-attr]
    assert int(trainer.model[0].num_batches_tracked) == 10  # type: ignore[index]


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("update", [7, 13, 20])
@pytest.mark.parametrize("kind", ["mean", "latest"])
def test_a_resumed_run_has_the_same_averages_and_metrics_to_the_bit(
    tmp_path: Path, update: int, kind: str
) -> None:
    def average(name: str) -> ModelAverageCallback:
        return ModelAverageCallback(
            kind, start_update=8, every_n_updates=2, num_latest=3, save_path=tmp_path / name
        )

    first, second = average("whole.pt"), average("resumed.pt")
    whole = train(first, SaveAt(update, tmp_path / "state"), model=normed(0.5), epochs=4)
    resumed = train(second, model=normed(0.5), epochs=4, resume_from=tmp_path / "state")
    assert resumed.run_history.to_records() == whole.run_history.to_records()
    assert_same_tensors(
        second.average_model.state_dict(),  # type: ignore[union-attr]
        first.average_model.state_dict(),  # type: ignore[union-attr]
    )
    assert (second.num_updates, second.best_metric) == (first.num_updates, first.best_metric)


def test_a_state_from_after_the_evaluation_exports_with_its_statistics(tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    whole = ModelAverageCallback(save_path=None)
    train(whole, saver, epochs=2)
    resumed = ModelAverageCallback(save_path=None)
    train(resumed, epochs=2, resume_from=tmp_path / "states" / "update_00000020")
    assert_same_tensors(resumed.average_model.state_dict(), whole.average_model.state_dict())  # type: ignore[union-attr]


def test_fewer_of_the_latest_keep_the_newest_of_a_state(tmp_path: Path) -> None:
    keep = Keep()
    first = ModelAverageCallback("latest", num_latest=5, save_path=None)
    train(first, keep, SaveAt(20, tmp_path / "state"), model=tiny_network(), epochs=3)
    second = ModelAverageCallback("latest", num_latest=2, save_path=None)
    train(second, model=tiny_network(), max_num_train_steps=21, epochs=None, resume_from=tmp_path / "state")
    expected = expected_average([keep.models[19], keep.models[20]])
    assert_close(second.average_model, expected)


def test_each_stage_begins_with_an_average_of_its_own() -> None:
    average, keep = ModelAverageCallback(start_update=5, save_path=None), Keep()
    trainer = tiny_trainer(callbacks=[average, keep])
    trainer.train(tiny_data(40), 1, per_device_batch_size=4)
    trainer.train(tiny_data(40), 1, per_device_batch_size=4, reset_run_history=False)
    expected = expected_average(keep.models[15:])
    assert_close(average.average_model, expected)


def test_another_model_of_a_partial_state_begins_the_latest_anew(tmp_path: Path) -> None:
    train(
        ModelAverageCallback("latest", save_path=None),
        SaveAt(10, tmp_path / "state"),
        model=tiny_network(),
        epochs=1,
    )
    average = ModelAverageCallback("latest", save_path=None)
    other = nn.Sequential(*tiny_network()[:2], nn.Linear(8, 3).double())  # type: ignore[index]
    trainer = tiny_trainer(callbacks=[average], model=other)
    trainer.load_partial_states = True
    trainer.train(tiny_data(40), 2, per_device_batch_size=4, resume_from=tmp_path / "state")
    assert torch.isfinite(torch.cat([p.flatten() for p in average.average_model.parameters()])).all()  # type: ignore[union-attr]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"average": "mea"}, ("average is 'mea'", "Did you mean 'mean'")),
        ({"start_update": -1}, ("start_update is -1", "Use 0")),
        ({"start_update": 1.5}, ("start_update is 1.5", "Use 0")),
        ({"every_n_updates": 0}, ("every_n_updates is 0", "Use 1")),
        ({"num_latest": 0}, ("num_latest is 0", "Use 5")),
    ],
)
def test_arguments_are_checked(kwargs: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        ModelAverageCallback(**kwargs)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_a_run_that_is_too_short_is_told_before_it_begins_and_the_way_out_works() -> None:
    average = ModelAverageCallback(start_update=25, every_n_updates=10, save_path=None)
    before = weights_of(tiny_trainer())
    trainer = tiny_trainer(callbacks=[average])
    with pytest.raises(ConfigurationError, match=r"after update 35, but the run has 30.*of at most 20"):
        trainer.train(tiny_data(40), 3, per_device_batch_size=4)
    assert torch.equal(weights_of(trainer), before)
    shorter = ModelAverageCallback(start_update=20, every_n_updates=10, save_path=None)
    train(shorter)
    assert shorter.num_updates == 1


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"average": "latest"}, ("average is 'latest'", "Pass average='mean'")),
        ({}, ("statistics of batch norm", "update_batch_norm=False")),
        ({"update_batch_norm": False}, ("ModelAverageCallback", "DEEPSPEED", "Use DDP or FSDP2")),
    ],
)
def test_what_a_sharded_model_does_not_allow_is_refused(kwargs: Any, parts: Any) -> None:
    trainer = tiny_trainer(model=normed())
    # Before the trainer has an engine, which it keeps.
    trainer.accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ConfigurationError) as raised:
        ModelAverageCallback(**kwargs).on_training_run_start(trainer)
    assert all(part in str(raised.value) for part in parts), raised.value


@pytest.mark.parametrize("kind", [ModelAverageCallback, ModelEmaCallback])
def test_two_of_a_kind_record_under_one_name_unless_one_is_not_evaluated(kind: Any, tmp_path: Path) -> None:
    first, second = kind(save_path=None), kind(save_path=None)
    with pytest.raises(ConfigurationError, match="evaluate_during_training=False"):
        train(first, second)
    second.evaluate_during_training = False
    train(first, second)
    assert_same_tensors(dict(first.averaged_model.named_parameters()), parameters_of(second.averaged_model))


def test_an_exponential_and_a_plain_average_go_together(tmp_path: Path) -> None:
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt")
    plain = ModelAverageCallback(save_path=tmp_path / "plain.pt")
    names = train(ema, plain).run_history.get_metric_names()
    assert {METRIC, "ema_model_eval_loss_epoch"} <= set(names)


# ---------------------------------------------------------------------- processes


def average_on_processes(batch_size: int) -> dict[str, Any]:
    """61 samples are uneven on two processes and three."""
    average = ModelAverageCallback("latest", num_latest=3, every_n_updates=2, save_path=None)
    trainer = train(average, data=tiny_data(61), per_device_batch_size=batch_size)
    model: Any = average.average_model
    return {"state": dict(model.state_dict()), "records": trainer.run_history.to_records()}


def resumed_on_processes(batch_size: int) -> list[Any]:
    folder = Path(FOLDER) / str(batch_size)
    runs = []
    for kwargs in ({}, {"resume_from": folder / "state"}):
        average = ModelAverageCallback("latest", num_latest=3, save_path=None)
        more = [] if kwargs else [SaveAt(7, folder / "state")]
        trainer = train(average, *more, model=normed(0.5), per_device_batch_size=batch_size, **kwargs)
        model: Any = average.average_model
        runs.append((dict(model.state_dict()), trainer.run_history.to_records()))
    return runs


FOLDER = ""
CASES = {"average": average_on_processes, "resumed": resumed_on_processes}


@pytest.mark.slow
def test_processes_have_one_average_with_the_statistics_of_all_their_batches(outcome: Any) -> None:
    first, second = outcome.of("average")
    assert_same_tensors(first["state"], second["state"])
    assert first["records"] == second["records"]
    # Eight batches of four on each of both; the mean over all samples is that of the data but for the short
    # ones.
    assert int(first["state"]["0.num_batches_tracked"]) == 16
    mean = tiny_data(61).tensors[0].mean(0)
    assert torch.allclose(first["state"]["0.running_mean"], mean, atol=0.05)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(outcome: Any) -> None:
    for whole, resumed in outcome.of("resumed"):
        assert_same_tensors(resumed[0], whole[0])
        assert resumed[1] == whole[1]


if __name__ == "__main__":
    import sys

    FOLDER = sys.argv[2]
    run_as_script(CASES)
