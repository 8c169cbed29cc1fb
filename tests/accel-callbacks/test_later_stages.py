"""Callbacks in a second call of `train` that keeps the history: they count on, and keep the best values."""

from pathlib import Path
from typing import Any

import pytest
import torch

from accel_callbacks import (
    EarlyStoppingCallback,
    ModelEmaCallback,
    ProgressBarCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
    TrackerCallback,
    UnfreezeCallback,
    plot_history,
)
from accel_core import PrintProgressCallback, Trainer, TrainerCallback, latest_checkpoint
from accel_integrations.schedulers import WSDLrScheduler
from accel_integrations.schedulers.wsd_checkpoint import WSDCheckpointCallback
from tiny import RecordWanted, tiny_data, tiny_trainer

DATA = tiny_data(16)


def train(trainer: Trainer, num_epochs: int = 2, keep: bool = True, **arguments: Any) -> None:
    trainer.train(DATA, num_epochs=num_epochs, reset_run_history=not keep, **arguments)


def test_the_best_model_is_that_of_all_stages(tmp_path: Path) -> None:
    best = SaveBestModelCallback(tmp_path / "best.pt", "wanted", load_saved_checkpoint=False)
    trainer = tiny_trainer(callbacks=[RecordWanted(3.0, 1.0, 2.0, 0.5), best])
    train(trainer, keep=False)
    train(trainer, num_epochs=1)
    assert (best.best_metric, best.best_metric_epoch) == (1.0, 2)
    train(trainer, num_epochs=1)
    assert (best.best_metric, best.best_metric_epoch) == (0.5, 4)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["wanted"] == 0.5


def test_a_new_run_forgets_the_best_model(tmp_path: Path) -> None:
    best = SaveBestModelCallback(tmp_path / "best.pt", "wanted", load_saved_checkpoint=False)
    trainer = tiny_trainer(callbacks=[RecordWanted(3.0, 1.0), best])
    train(trainer)
    train(trainer, num_epochs=1, keep=False)
    assert (best.best_metric, best.best_metric_epoch) == (3.0, 1)


def test_early_stopping_keeps_the_best_value_and_has_its_whole_patience_again() -> None:
    patience = EarlyStoppingCallback(2, 0.0, "wanted")
    trainer = tiny_trainer(callbacks=[RecordWanted(1.0, 2.0, 2.0, 1.5, 1.5, 0.5), patience])
    train(trainer, num_epochs=9, keep=False)
    assert trainer.run_progress.epochs_completed == 3 and trainer.stop_reason is not None
    train(trainer, num_epochs=3)
    # Both values are better than the last one of the first stage, but not than its best.
    assert trainer.run_progress.epochs_completed == 5 and trainer.stop_reason is not None
    assert patience.best_metric == 1.0


def test_the_best_average_is_that_of_all_stages(tmp_path: Path) -> None:
    average = ModelEmaCallback(
        save_path=tmp_path / "ema.pt", watch_metric="wanted", evaluate_during_training=True
    )
    trainer = tiny_trainer(callbacks=[RecordWanted(1.0, 2.0, 3.0), average])
    train(trainer, keep=False, eval_dataset=DATA)
    train(trainer, num_epochs=1, eval_dataset=DATA)
    assert (average.best_metric, average.best_metric_epoch) == (1.0, 1)
    assert average.num_updates == 2


def test_a_tracker_goes_on_in_the_same_run_on_the_same_axis(tmp_path: Path) -> None:
    steps: list[int] = []

    class Listening(TrackerCallback):
        def _open(self, trainer: Trainer) -> None:
            was_open = self.tracker is not None
            super()._open(trainer)
            if not was_open:
                self.tracker.log = lambda values, step: steps.append(step)

    tracker = Listening("tensorboard", "p", logging_dir=tmp_path, log_every_n_updates=1)
    trainer = tiny_trainer(callbacks=[tracker])
    train(trainer, keep=False)
    train(trainer)
    (folder,) = (tmp_path / "p").iterdir()
    assert folder.name.endswith(f"_{trainer.run_id}")
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 9))


def test_a_picture_has_the_epochs_of_all_stages(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    train(trainer, keep=False, eval_dataset=DATA)
    trainer.train(DATA, max_num_train_steps=3, reset_run_history=False, eval_dataset=DATA)
    train(trainer, eval_dataset=DATA)
    figure = plot_history(trainer.run_history)
    for line in figure.axes[0].get_lines():
        places = list(line.get_xdata())
        assert places == sorted(places)
        if len(places) > 1:
            assert len(set(places)) == 6, places


@pytest.mark.parametrize(
    ("callback", "titles"),
    [
        (
            PrintProgressCallback,
            ["Epoch 1/2", "Epoch 2/2", "Epoch 3/5", "Epoch 4/5", "Epoch 5/5"],
        ),
        (ProgressBarCallback, ["Epoch 1/2", "Epoch 2/2", "Epoch 3/5", "Epoch 4/5", "Epoch 5/5"]),
    ],
)
def test_epochs_are_shown_through_all_stages(callback: Any, titles: list[str], capsys: Any) -> None:
    trainer = tiny_trainer(callbacks=[callback])
    train(trainer, keep=False)
    train(trainer, num_epochs=3)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")] == titles


def test_what_was_unfrozen_stays_so() -> None:
    trained: list[int] = []

    class Counting(TrainerCallback):
        def on_train_step_end(self, trainer: Trainer, **kwargs: Any) -> None:
            trained.append(sum(parameter.requires_grad for parameter in trainer.model.parameters()))

    trainer = tiny_trainer(callbacks=[UnfreezeCallback({2: 0}), Counting()])
    train(trainer, keep=False)
    train(trainer, num_epochs=1)
    train(trainer, num_epochs=1, keep=False)
    assert trained == [2, 2, 4, 4, 4, 4, 2, 2]


def test_a_saver_saves_a_later_stage_when_it_begins(tmp_path: Path) -> None:
    begun: list[Any] = []

    class Listening(TrainerCallback):
        def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
            begun.append((path.name, trainer.run_progress.stage))

    trainer = tiny_trainer(callbacks=[SaveTrainingStateCallback(tmp_path), Listening()])
    train(trainer, keep=False)
    train(trainer)
    assert begun == [("update_00000004", 1), ("update_00000004", 2), ("update_00000008", 2)]
    assert latest_checkpoint(tmp_path) == tmp_path / "update_00000008"


def test_the_states_of_a_schedule_with_decays_are_named_by_all_updates(tmp_path: Path) -> None:
    trainer = tiny_trainer(callbacks=[WSDCheckpointCallback(tmp_path)])
    schedule = WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0, decay_phase_ratio=0.5)
    for keep in (False, True):
        train(trainer, keep=keep, create_scheduler_fn=schedule)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint_2_wsd_pre_decay",
        "checkpoint_4_wsd_post_decay.pt",
        "checkpoint_6_wsd_pre_decay",
        "checkpoint_8_wsd_post_decay.pt",
        "run_card.json",
    ]
