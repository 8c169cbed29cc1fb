"""TrackerCallback with tensorboard, mlflow and trackio against local stores: what was sent is read back from them.

On two processes: test_measuring_on_two_processes.py.
"""

import importlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from accel_callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback, TrackerCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
from tiny import tiny_data, tiny_network, tiny_trainer, weights_of

Values = dict[str, dict[int, float]]


class Store:
    """Where a tracker writes on this machine, and how to read it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def callback(self, **kwargs: Any) -> TrackerCallback:
        kwargs = {"log_every_n_updates": 2, "config": {"note": "first", "model": {"width": 8}}, **kwargs}
        return TrackerCallback(self.name, "project", logging_dir=self.folder / "logs", **kwargs)

    def runs(self) -> dict[str, tuple[Values, dict[str, Any]]]:
        """Of each run its values by name and step, and its hyper-parameters."""
        return getattr(self, f"_read_{self.name}")()  # type: ignore[no-any-return]

    def only_run(self) -> tuple[Values, dict[str, Any]]:
        (run,) = self.runs().values()
        return run

    def _read_tensorboard(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        runs = {}
        for folder in (self.folder / "logs" / "project").iterdir():
            events = EventAccumulator(str(folder)).Reload()
            tags = events.Tags()["scalars"]
            values = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
            (parameters,) = folder.glob("*/hparams.yml")
            day, clock, run_id = folder.name.split("_")
            time.strptime(f"{day} {clock}", "%Y-%m-%d %H-%M-%S")
            runs[run_id] = (
                values,
                dict(line.split(": ", 1) for line in parameters.read_text().splitlines()),
            )
        return runs

    def _read_mlflow(self) -> Any:
        import mlflow

        client, runs = mlflow.MlflowClient(), {}
        (experiment,) = client.search_experiments(filter_string="name = 'project'")
        for run in client.search_runs([experiment.experiment_id]):
            assert run.info.status == "FINISHED"
            names = run.data.metrics
            values = {
                n: {m.step: m.value for m in client.get_metric_history(run.info.run_id, n)} for n in names
            }
            runs[run.info.run_name] = (values, run.data.params)
        return runs

    def _read_trackio(self) -> Any:
        runs: dict[str, Any] = {}
        with sqlite3.connect(self.folder / "trackio" / "project.db") as store:
            for run, config in store.execute("select run_name, config from configs"):
                runs[run] = ({}, json.loads(config))
            for run, step, metrics in store.execute("select run_name, step, metrics from metrics"):
                for name, value in json.loads(metrics).items():
                    runs[run][0].setdefault(name, {})[step] = float(value)
        return runs


@pytest.fixture(params=["tensorboard", "mlflow", "trackio"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param not in LoggerType.list() or LoggerType(request.param) not in get_available_trackers():
        pytest.skip(f"this Accelerate knows no {request.param}, or it is not installed")
    if request.param == "mlflow":
        # Without this, mlflow wants a database, and packages that it needs for one.
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    if request.param == "trackio":
        importlib.import_module("trackio")
        # It reads the environment variable TRACKIO_DIR only when it is imported.
        for module in [
            m
            for name, m in sys.modules.items()
            if name.split(".")[0] == "trackio" and hasattr(m, "TRACKIO_DIR")
        ]:
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return Store(request.param, tmp_path)


class Stops(TrainerCallback):
    def __init__(self, at: int, how: Callable[[Trainer], None]) -> None:
        self.at, self.how = at, how

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.at:
            self.how(trainer)


def train(*callbacks: Any, **kwargs: Any) -> Trainer:
    """Two epochs of five updates each."""
    trainer = tiny_trainer(callbacks=callbacks)
    trainer.train(tiny_data(40), num_epochs=2, eval_dataset=tiny_data(8), per_device_batch_size=8, **kwargs)
    return trainer


def steps(values: Values) -> dict[str, list[int]]:
    return {name: list(by_step) for name, by_step in values.items() if "/" not in name}


def test_names_steps_values_and_hyper_parameters_are_those_of_the_run(store: Store) -> None:
    trainer = train(store.callback(), StepBasedEvaluationCallback(3))
    values, parameters = store.only_run()
    assert list(store.runs()) == [trainer.run_id]
    assert steps(values) == {
        "train_loss": [2, 4, 6, 8, 10],
        "learning_rate": [2, 4, 6, 8, 10],
        "train_loss_epoch": [5, 10],
        "eval_loss_epoch": [5, 10],
        "intermediate_eval_loss_epoch": [3, 6, 9],
    }
    for record in trainer.run_history.get_records():
        assert values[record["name"]][record["update"]] == pytest.approx(record["value"], rel=1e-6)
    assert str(parameters["train_per_device_batch_size"]) == "8"
    assert str(parameters["note"]) == "first"
    assert str(parameters["model.width"]) == "8"


def test_the_running_loss_is_the_mean_since_the_value_before_it(store: Store) -> None:
    losses = []

    class Losses(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, batch: Any, batch_output: Any, step: int) -> None:
            losses.append(batch_output["loss"].item())

    train(store.callback(log_every_n_updates=2), Losses())
    values, _ = store.only_run()
    # The third value is of the first update of the second epoch: sums begin anew with an epoch.
    expected = {2: losses[0:2], 4: losses[2:4], 6: losses[5:6], 8: losses[6:8], 10: losses[8:10]}
    assert values["train_loss"] == {
        step: pytest.approx(sum(part) / len(part), rel=1e-5) for step, part in expected.items()
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_all_is_written_and_finished(store: Store, error: type[BaseException]) -> None:
    def fail(trainer: Trainer) -> None:
        trainer.run_history.update_metric("last_words", 7.0)
        raise error

    callback = store.callback(log_every_n_updates=2)
    with pytest.raises(error):
        train(callback, Stops(3, fail))
    assert callback.tracker is None
    values, _ = store.only_run()
    assert steps(values) == {"train_loss": [2], "learning_rate": [2], "last_words": [3]}


def test_evaluate_goes_on_in_the_same_run(store: Store) -> None:
    callback = store.callback()
    trainer = train(callback)
    metrics = trainer.evaluate(tiny_data(8))
    values, parameters = store.only_run()
    assert values["evaluation_loss"] == {10: pytest.approx(metrics["evaluation_loss"])}
    assert values["train_loss_epoch"].keys() == {5, 10}
    assert str(parameters["note"]) == "first"
    assert callback.tracker is None


def test_a_second_run_has_a_place_of_its_own(store: Store) -> None:
    trainer = train(store.callback())
    trainer.train(tiny_data(40), num_epochs=1, per_device_batch_size=8)
    assert len(store.runs()) == 2
    values, _ = store.runs()[str(trainer.run_id)]
    assert values["train_loss_epoch"].keys() == {5}


def test_a_later_stage_goes_on_in_the_same_place_on_the_same_axis(store: Store) -> None:
    trainer = train(store.callback())
    trainer.train(tiny_data(40), num_epochs=1, per_device_batch_size=8, reset_run_history=False)
    values, _ = store.only_run()
    assert values["train_loss_epoch"].keys() == {5, 10, 15}


@pytest.mark.parametrize("stop_at", [3, 5, 6])
def test_a_resumed_run_goes_on_in_the_same_place_on_the_same_axis(
    store: Store, stop_at: int, tmp_path: Path
) -> None:
    """It was killed two updates after its state was saved: what it sent meanwhile is not there twice."""

    def fail(trainer: Trainer) -> None:
        raise KeyboardInterrupt

    def save(trainer: Trainer) -> None:
        trainer.save_training_state(tmp_path / "state")

    class SavesAndFails(Stops):
        order = 1000

    reference = train(store.callback())
    expected, _ = store.only_run()
    with pytest.raises(KeyboardInterrupt):
        train(store.callback(), SavesAndFails(stop_at, save), SavesAndFails(stop_at + 2, fail))
    resumed = train(store.callback(config={"note": "other"}), resume_from=tmp_path / "state")
    assert torch.equal(weights_of(resumed), weights_of(reference))
    runs = store.runs()
    assert set(runs) == {reference.run_id, resumed.run_id}
    values, parameters = runs[str(resumed.run_id)]
    assert steps(values) == steps(expected)
    assert all(values[name] == pytest.approx(expected[name]) for name in steps(expected))
    assert str(parameters["note"]) == ("other" if store.name == "trackio" else "first")


def test_a_tracker_added_on_resuming_gets_the_history_so_far(store: Store, tmp_path: Path) -> None:
    saver = SaveTrainingStateCallback(tmp_path / "states", save_every_n_epochs=1)
    train(saver, Stops(7, lambda trainer: trainer.request_stop("enough")))
    train(store.callback(), saver, resume_from=latest_checkpoint(tmp_path / "states"))
    assert store.only_run()[0]["train_loss_epoch"].keys() == {5, 10}


def test_a_loss_that_is_not_finite_is_sent_too(store: Store) -> None:
    trainer = tiny_trainer(
        callbacks=[store.callback(), Stops(2, lambda t: t.run_history.update_metric("odd", float("nan")))]
    )
    trainer.train(tiny_data(16), num_epochs=1, per_device_batch_size=8)
    assert str(store.only_run()[0]["odd"][2]) == "nan"


def test_arguments_for_the_tracker_itself_win(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    callback = TrackerCallback(
        "tensorboard", "project", logging_dir=folder, init_kwargs={"filename_suffix": ".mine"}
    )
    trainer = train(callback)
    assert list((folder / "project").glob(f"*_{trainer.run_id}/*.mine"))


def test_a_tracker_of_ones_own_goes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    sent: list[Any] = []

    class Mine(tracking.GeneralTracker):
        name, requires_logging_directory, main_process_only = "mine", False, False
        tracker = None

        def __init__(self, project_name: str) -> None:
            super().__init__()
            sent.append(project_name)

        def store_init_configuration(self, values: Any) -> None:
            sent.append(values["num_epochs"])

        def log(self, values: Any, step: int | None = None, **kwargs: Any) -> None:
            sent.append((step, sorted(values)))

        def finish(self) -> None:
            sent.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    train(TrackerCallback("mine", "project"))
    epoch = ["eval_loss_epoch", "train_loss_epoch"]
    assert sent == ["project", 2, (5, epoch), (10, epoch), "finished"]


def test_training_is_the_same_with_and_without(store: Store) -> None:
    assert torch.equal(weights_of(train(store.callback(log_every_n_updates=1))), weights_of(train()))


def test_loading_and_predicting_open_nothing(store: Store, tmp_path: Path) -> None:
    callback = store.callback()
    trainer = tiny_trainer(callbacks=[callback], model=tiny_network())
    trainer.predict(torch.utils.data.TensorDataset(tiny_data(8).tensors[0]))
    assert callback.tracker is None and not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tensorbord", r"name is 'tensorbord'.*Accelerate.*\['aim', .*Did you mean 'tensorboard'"),
        (None, r"name is None.*\['aim', "),
        ("aim", r"TrackerCallback\('aim', \.\.\.\) .*'aim'.*pip install aim"),
        ("comet", r"TrackerCallback\('comet', \.\.\.\) .*'comet_ml'.*pip install comet-ml"),
    ],
)
def test_a_name_that_cannot_be_used_is_reported(name: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        TrackerCallback(name, "project")


def test_a_period_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"log_every_n_updates is 0.*at least 1.*Use 1 "):
        TrackerCallback("tensorboard", "project", log_every_n_updates=0)


def test_importing_the_callbacks_imports_no_tracker() -> None:
    script = "import sys, accel_callbacks; print([n for n in ('tensorboard', 'mlflow', 'trackio', 'wandb') if n in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert finished.stdout.strip() == "[]"
