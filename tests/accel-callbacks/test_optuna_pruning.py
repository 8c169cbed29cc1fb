"""OptunaPruningCallback: reports, stops all processes, and raises when all is closed."""

import sys
from pathlib import Path

import optuna
import pytest

from accel_callbacks import OptunaPruningCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from launching import launch, start, wait_until
from tiny import EvaluateInMidEpoch, RecordWanted, tiny_data, tiny_trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "20_search_with_optuna.py"


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=2.0))


class Closed(TrainerCallback):
    """Notes that the run was closed."""

    order = 3000
    is_closed = False

    def on_run_close(self, trainer: Trainer) -> None:
        self.is_closed = True


def test_each_epoch_is_reported_by_its_update(study: optuna.Study) -> None:
    trial = study.ask()
    callbacks = [OptunaPruningCallback(trial, "wanted"), RecordWanted(1.0, None, 0.5)]
    tiny_trainer(callbacks=callbacks).train(tiny_data(), num_epochs=3)
    study.tell(trial, 0.5)
    assert study.trials[0].intermediate_values == {5: 1.0, 15: 0.5}


def test_evaluations_in_mid_epoch_are_reported_too(study: optuna.Study) -> None:
    trial = study.ask()
    callbacks = [OptunaPruningCallback(trial, "intermediate_eval_loss_epoch"), EvaluateInMidEpoch()]
    tiny_trainer(callbacks=callbacks).train(tiny_data(), num_epochs=1, eval_dataset=tiny_data(5))
    study.tell(trial, 0.5)
    assert list(study.trials[0].intermediate_values) == [1, 2, 3, 4, 5]


def test_a_bad_trial_is_stopped_and_raises_when_all_is_closed(study: optuna.Study) -> None:
    trial, closed = study.ask(), Closed()
    trainer = tiny_trainer(
        callbacks=[OptunaPruningCallback(trial, "wanted"), RecordWanted(1.0, 3.0, 1.0), closed]
    )
    with pytest.raises(optuna.TrialPruned, match=r"trial 0: wanted is 3 after update 10"):
        trainer.train(tiny_data(), num_epochs=3)
    assert closed.is_closed
    assert trainer.run_progress.epochs_completed == 2
    trainer.evaluate(tiny_data(5))


def test_what_cannot_be_used_is_refused(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="trial is 3"):
        OptunaPruningCallback(3)
    with pytest.raises(ConfigurationError, match="trial is None on the main process"):
        tiny_trainer(callbacks=[OptunaPruningCallback(None)]).train(tiny_data(), 1, tiny_data(5))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"accel-callbacks\[optuna\]"):
        OptunaPruningCallback(None)


@pytest.mark.slow
def test_all_of_two_processes_stop_and_raise() -> None:
    finished = launch(
        """
        import optuna, torch
        from torch.utils.data import TensorDataset
        from accel_callbacks import OptunaPruningCallback
        from accel_core import Trainer
        model = torch.nn.Linear(4, 1)
        data = TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[])
        trial = None
        if trainer.is_main_process:
            trial = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=-1.0)).ask()
        trainer.callbacks.add_callback(OptunaPruningCallback(trial))
        try:
            trainer.train(data, 5, data)
        except optuna.TrialPruned:
            print(f"pruned on {trainer.data_group.index} in epoch {trainer.run_progress.epochs_completed}")
        """
    )
    for process in (0, 1):
        assert f"pruned on {process} in epoch 1" in finished.stdout


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"

    def num_finished() -> int:
        try:
            study = optuna.load_study(study_name="digits", storage=storage)
        except Exception:
            return 0
        return sum(trial.state.is_finished() for trial in study.trials)

    with start(EXAMPLE, 1, ["--storage", storage]) as running:
        wait_until(lambda: num_finished() >= 2, running)
        running.kill()
    before = num_finished()
    assert "6 trials" in launch(EXAMPLE, 1, ["--storage", storage]).stdout
    assert 2 <= before <= num_finished() == 6
