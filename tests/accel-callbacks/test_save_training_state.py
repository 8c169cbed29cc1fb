"""SaveTrainingStateCallback: when it saves, what it keeps, and what a signal does."""

import os
import re
import signal
import threading

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import SaveBestModelCallback, SaveTrainingStateCallback
from accel_core import (
    AccelWarning,
    CheckpointError,
    ConfigurationError,
    RunInterrupted,
    TerminateOnNaNCallback,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
)
from accel_core.state.files import read_json
from launching import start, wait_until
from tiny import linear_of_constants

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(POINTS, POINTS.sum(1, keepdim=True))


def create_trainer(*callbacks):
    model = linear_of_constants(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=1)


def train(trainer, num_epochs=2, **kwargs):
    """Six updates an epoch."""
    return trainer.train(DATA, num_epochs, per_device_batch_size=4, **kwargs)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "run_card.json")


class At(TrainerCallback):
    """Acts once, after the update of a number."""

    def __init__(self, update, action):
        self.update = update
        self.action = action

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == self.update:
            self.action(trainer)


class Seen(TrainerCallback):
    def __init__(self):
        self.saved = []

    def on_checkpoint_saved(self, trainer, path):
        self.saved.append(path.name)


class TestWhen:
    def test_updates_count_from_the_beginning_of_the_run_and_the_end_is_saved(self, tmp_path):
        train(create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=5)))
        assert names_in(tmp_path) == ["update_00000005", "update_00000010", "update_00000012"]

    def test_a_resumed_run_goes_on_in_the_same_rhythm_and_overwrites_nothing(self, tmp_path):
        train(create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=5)), num_epochs=1)
        before = {path.name: path.stat().st_ino for path in tmp_path.glob("update_*")}
        saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=5)
        train(create_trainer(saver), resume_from=latest_checkpoint(tmp_path))
        assert names_in(tmp_path) == [
            "update_00000005",
            "update_00000006",
            "update_00000010",
            "update_00000012",
        ]
        assert {name: (tmp_path / name).stat().st_ino for name in before} == before

    def test_epochs_are_saved_when_their_evaluation_is_done(self, tmp_path):
        saver = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=2, save_at_end=False)
        train(create_trainer(saver), num_epochs=3, eval_dataset=DATA)
        assert names_in(tmp_path) == ["update_00000012"]
        again = create_trainer()
        train(again, 2, eval_dataset=DATA, resume_from=tmp_path / "update_00000012")
        assert len(again.run_history.get_metric_values("eval_loss_epoch")) == 2

    def test_an_epoch_that_a_limit_cuts_is_no_epoch(self, tmp_path):
        saver = SaveTrainingStateCallback(tmp_path, save_every_n_epochs=1, save_at_end=False)
        train(create_trainer(saver), None, max_num_train_steps=8)
        assert names_in(tmp_path) == ["update_00000006"]

    def test_minutes_begin_anew_with_each_save(self, tmp_path, monkeypatch):
        now = 0.0
        monkeypatch.setattr("accel_callbacks.periodic.time.monotonic", lambda: now)

        class Clock(TrainerCallback):
            def on_train_step_start(self, trainer, batch):
                nonlocal now
                now += 20

        train(
            create_trainer(
                Clock(), SaveTrainingStateCallback(tmp_path, save_every_n_minutes=1, save_at_end=False)
            )
        )
        # Passed at update 3, so due after update 4, from which the next minute counts.
        assert names_in(tmp_path) == ["update_00000004", "update_00000008", "update_00000012"]

    def test_nothing_is_saved_in_the_middle_if_nothing_was_asked_for(self, tmp_path):
        train(create_trainer(SaveTrainingStateCallback(tmp_path / "states")))
        assert names_in(tmp_path / "states") == ["update_00000012"]

    def test_two_triggers_at_one_update_save_once(self, tmp_path):
        seen = Seen()
        train(
            create_trainer(
                seen, SaveTrainingStateCallback(tmp_path, 1), SaveTrainingStateCallback(tmp_path, 1)
            ),
            1,
        )
        assert seen.saved == ["update_00000006"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"save_every_n_updates": 0}, "save_every_n_updates is 0.*at least 1.*Use None"),
            ({"save_every_n_epochs": 1.5}, "save_every_n_epochs is 1.5.*whole number.*Use None"),
            ({"save_every_n_minutes": 0}, "save_every_n_minutes is 0.*above 0.*Use None"),
            ({"keep_last": 0}, "keep_last is 0.*at least 1.*Use None"),
            ({"keep_best": -1}, "keep_best is -1.*at least 1.*Use None"),
            ({"save_on_signals": ("SIGTREM",)}, "save_on_signals.*'SIGTREM'.*'SIGTERM'"),
            ({"save_on_signals": ("SIGKILL",)}, "save_on_signals.*'SIGKILL'.*Use 'SIGTERM'"),
        ],
    )
    def test_arguments_that_cannot_be_used_are_named(self, arguments, message):
        with pytest.raises(ConfigurationError, match=message):
            SaveTrainingStateCallback(**arguments)


class TestRotation:
    def test_the_newest_stay(self, tmp_path):
        train(create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=2, keep_last=2)))
        assert names_in(tmp_path) == ["update_00000010", "update_00000012"]

    def test_the_old_one_goes_only_after_the_new_one_is_complete(self, tmp_path):
        there = []

        class Look(TrainerCallback):
            def on_checkpoint_saved(self, trainer, path):
                there.append(names_in(tmp_path))

        train(create_trainer(Look(), SaveTrainingStateCallback(tmp_path, 1, keep_last=1)), num_epochs=3)
        assert there == [
            ["update_00000006"],
            ["update_00000006", "update_00000012"],
            ["update_00000012", "update_00000018"],
        ]

    def test_the_best_stay_besides_the_newest_and_are_known_again_after_a_resume(self, tmp_path):
        losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: float("nan"), 6: 4.0}

        class Record(TrainerCallback):
            def on_training_run_epoch_end(self, trainer):
                trainer.run_history.update_metric("wanted", losses[trainer.run_history.current_epoch])

        def saver():
            return SaveTrainingStateCallback(tmp_path, 1, keep_best=2, watch_metric="wanted")

        train(create_trainer(Record(), saver()), num_epochs=4)
        assert names_in(tmp_path) == ["update_00000012", "update_00000018", "update_00000024"]
        train(create_trainer(Record(), saver()), num_epochs=6, resume_from=latest_checkpoint(tmp_path))
        assert names_in(tmp_path) == ["update_00000012", "update_00000018", "update_00000036"]

    def test_a_state_is_not_credited_with_a_metric_of_earlier_weights(self, tmp_path):
        saver = SaveTrainingStateCallback(
            tmp_path, save_every_n_updates=4, keep_best=1, watch_metric="train_loss_epoch"
        )
        train(create_trainer(saver))
        # The metric was recorded at the updates 6 and 12 only.
        assert names_in(tmp_path) == ["update_00000012"]

    def test_greater_may_be_better(self, tmp_path):
        saver = SaveTrainingStateCallback(
            tmp_path, 1, keep_best=1, watch_metric="train_loss_epoch", greater_is_better=True
        )
        train(create_trainer(saver), num_epochs=3)
        assert names_in(tmp_path) == ["update_00000006", "update_00000018"]

    def test_folders_of_other_names_are_left_alone(self, tmp_path):
        saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=2, keep_last=1)
        (tmp_path / "notes").mkdir()
        train(create_trainer(At(3, lambda trainer: trainer.save_training_state(tmp_path / "mine")), saver))
        assert names_in(tmp_path) == ["mine", "notes", "update_00000012"]

    def test_a_watched_metric_that_is_not_there_is_reported_before_an_epoch_is_spent(self, tmp_path):
        with pytest.raises(
            ConfigurationError,
            match=r"SaveTrainingStateCallback.*'eval_loss_epoch'.*eval_dataset.*watch_metric='train_loss_epoch'",
        ):
            train(create_trainer(SaveTrainingStateCallback(tmp_path, 1, keep_best=1)))


class TestOneRunAFolder:
    def test_another_run_in_the_folder_is_refused_before_training(self, tmp_path):
        first = create_trainer(SaveTrainingStateCallback(tmp_path))
        train(first)
        second = create_trainer(SaveTrainingStateCallback(tmp_path))
        with pytest.raises(CheckpointError, match=f"'{first.run_id}'") as caught:
            train(second)
        message = str(caught.value)
        assert (
            re.search(r"this is the run '\w+'", message)
            and "another folder" in message
            and "resume_from=" in message
        )
        assert second.run_progress.updates_completed == 0
        assert names_in(tmp_path) == ["update_00000012"]

    def test_of_two_runs_that_begin_in_one_folder_at_once_the_second_to_save_is_refused(self, tmp_path):
        """Though they save at different updates, and the folder was empty when both began."""
        other = create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=2))
        begin_another = At(1, lambda trainer: train(other))
        with pytest.raises(
            CheckpointError, match=r"the run '\w+'.* the run '\w+'.*another folder.*resume_from="
        ):
            train(create_trainer(begin_another, SaveTrainingStateCallback(tmp_path, save_every_n_updates=3)))
        assert {read_json(path / "trainer_state.json")["run_id"] for path in tmp_path.glob("update_*")} == {
            other.run_id
        }

    def test_going_on_from_an_earlier_state_is_refused_where_the_later_ones_would_be_taken_for_newer(
        self, tmp_path
    ):
        train(create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=4)))
        earlier = tmp_path / "update_00000004"
        trainer = create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=5, keep_last=1))
        with pytest.raises(CheckpointError, match=r"update_\d+' .*\d+ updates.* from 4\b.*Remove it"):
            train(trainer, resume_from=earlier)
        assert trainer.run_progress.updates_completed == 4
        assert names_in(tmp_path) == ["update_00000004", "update_00000008", "update_00000012"]
        saver = SaveTrainingStateCallback(tmp_path / "branch", keep_last=1)
        train(create_trainer(saver), resume_from=earlier)
        assert names_in(tmp_path / "branch") == ["update_00000012"]

    def test_a_state_that_a_crash_left_under_a_second_name_is_rotated_with_the_others(self, tmp_path):
        train(create_trainer(SaveTrainingStateCallback(tmp_path)), num_epochs=1)
        (tmp_path / "update_00000006").rename(tmp_path / "update_00000006.replaced")
        saver = SaveTrainingStateCallback(tmp_path, 1, keep_last=1)
        train(create_trainer(saver), num_epochs=2, resume_from=latest_checkpoint(tmp_path))
        assert names_in(tmp_path) == ["update_00000012"]


class TestStops:
    def test_an_agreed_stop_saves_the_state_of_the_safe_point(self, tmp_path):
        class Closing(TrainerCallback):
            """Does what callbacks do that close an epoch."""

            epochs_closed = 0

            def on_train_epoch_end(self, trainer):
                self.epochs_closed += 1

            def state_dict(self):
                return {"epochs_closed": self.epochs_closed}

            def load_state_dict(self, state):
                self.epochs_closed = state["epochs_closed"]

        stop = At(9, lambda trainer: trainer.request_stop("enough"))
        stopped = create_trainer(Closing(), stop, SaveTrainingStateCallback(tmp_path))
        train(stopped)
        assert stopped.stop_reason == "enough"
        assert names_in(tmp_path) == ["update_00000010"]
        closing = Closing()
        resumed = create_trainer(closing, SaveTrainingStateCallback(tmp_path))
        train(resumed, resume_from=latest_checkpoint(tmp_path))
        expected = create_trainer()
        train(expected)
        assert closing.epochs_closed == 2
        assert torch.equal(resumed.model.weight, expected.model.weight)
        assert resumed.run_history.to_records() == expected.run_history.to_records()

    def test_save_at_end_is_false_for_a_stop_too(self, tmp_path):
        stop = At(9, lambda trainer: trainer.request_stop("enough"))
        train(create_trainer(stop, SaveTrainingStateCallback(tmp_path, 1, save_at_end=False)))
        assert names_in(tmp_path) == ["update_00000006"]

    def test_a_nan_is_never_saved_over_a_good_state(self, tmp_path):
        def poison(trainer):
            with torch.no_grad():
                trainer.model.weight.fill_(float("nan"))

        saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=4, keep_last=1)
        trainer = create_trainer(At(7, poison), TerminateOnNaNCallback(), saver)
        with pytest.warns(AccelWarning, match="'weight' is not finite.*not saved.*lower learning rate"):
            train(trainer)
        assert trainer.stop_reason.startswith("the loss is nan")
        assert names_in(tmp_path) == ["update_00000004"]
        assert trainer.last_checkpoint.name == "update_00000004"

    def test_the_best_weights_are_not_saved_in_place_of_last_ones_that_are_not_finite(self, tmp_path):
        def poison(trainer):
            with torch.no_grad():
                trainer.model.weight.fill_(float("nan"))

        best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch")
        trainer = create_trainer(At(12, poison), best, SaveTrainingStateCallback(tmp_path / "states", 1))
        with pytest.warns(AccelWarning, match="is not finite"):
            train(trainer)
        assert torch.isfinite(trainer.model.weight).all()
        assert names_in(tmp_path / "states") == ["update_00000006"]

    def test_the_state_at_the_end_has_the_last_weights_not_the_best(self, tmp_path):
        class Worse(TrainerCallback):
            def on_training_run_epoch_end(self, trainer):
                trainer.run_history.update_metric("wanted", trainer.run_history.current_epoch)

        best = SaveBestModelCallback(tmp_path / "best.pt", watch_metric="wanted")
        trainer = create_trainer(best, Worse(), SaveTrainingStateCallback(tmp_path / "states"))
        train(trainer)
        plain = create_trainer()
        train(plain)
        resumed = create_trainer()
        train(resumed, resume_from=latest_checkpoint(tmp_path / "states"))
        assert torch.equal(resumed.model.weight, plain.model.weight)
        assert not torch.equal(trainer.model.weight, plain.model.weight)


def send(number):
    return lambda trainer: os.kill(os.getpid(), number)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the platform has no such signal")
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_the_update_is_finished_saved_and_closed(self, tmp_path, number):
        closed = []

        class Closing(TrainerCallback):
            def on_run_close(self, trainer):
                closed.append(trainer.run_progress.updates_completed)

        trainer = create_trainer(
            Closing(), At(7, send(number)), SaveTrainingStateCallback(tmp_path, save_at_end=False)
        )
        with pytest.raises(RunInterrupted) as caught:
            train(trainer)
        assert closed == [8]
        assert caught.value.signal_number == number
        assert caught.value.code == 128 + number
        assert caught.value.checkpoint == tmp_path / "update_00000008" == latest_checkpoint(tmp_path)

    @pytest.mark.parametrize(
        "event",
        ["on_train_epoch_end", "on_eval_epoch_end", "on_training_run_epoch_end", "on_train_epoch_start"],
    )
    def test_whenever_it_comes_the_resumed_run_is_that_of_no_signal(self, tmp_path, event):
        def interrupt(self, trainer, **kwargs):
            if trainer.run_progress.epochs_completed == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        callback = type("Interrupt", (TrainerCallback,), {event: interrupt})()
        with pytest.raises(RunInterrupted):
            train(create_trainer(callback, SaveTrainingStateCallback(tmp_path)), 3, eval_dataset=DATA)
        resumed, expected = create_trainer(SaveTrainingStateCallback(tmp_path)), create_trainer()
        train(resumed, 3, eval_dataset=DATA, resume_from=latest_checkpoint(tmp_path))
        train(expected, 3, eval_dataset=DATA)
        assert torch.equal(resumed.model.weight, expected.model.weight)
        assert resumed.run_history.to_records() == expected.run_history.to_records()

    @pytest.mark.parametrize("event", ["on_training_run_end", "on_checkpoint_saved"])
    def test_one_that_comes_while_the_run_ends_is_not_lost(self, tmp_path, event):
        def interrupt(self, trainer, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

        callback = type("Interrupt", (TrainerCallback,), {event: interrupt})()
        with pytest.raises(RunInterrupted) as caught:
            train(create_trainer(callback, SaveTrainingStateCallback(tmp_path)))
        assert caught.value.checkpoint == tmp_path / "update_00000012"

    def test_the_handlers_of_the_user_come_back(self, tmp_path):
        def own(number, frame):
            raise AssertionError("must not be called")

        before = signal.signal(signal.SIGUSR1, own)
        try:
            savers = [SaveTrainingStateCallback(tmp_path / name) for name in "ab"]
            with pytest.raises(RunInterrupted):
                train(create_trainer(At(3, send(signal.SIGUSR1)), *savers))
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert names_in(tmp_path / "a") == names_in(tmp_path / "b") == ["update_00000004"]
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_the_handlers_come_back_after_an_error(self, tmp_path):
        def fail(trainer):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            train(create_trainer(At(3, fail), SaveTrainingStateCallback(tmp_path)))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_in_another_thread_training_works_without_handlers(self, tmp_path):
        failed, handlers = [], []

        def run():
            try:
                look = At(2, lambda trainer: handlers.append(signal.getsignal(signal.SIGTERM)))
                train(create_trainer(look, SaveTrainingStateCallback(tmp_path)))
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not failed
        assert handlers == [signal.SIG_DFL]

    def test_ctrl_c_closes_and_raises_unless_it_was_asked_to_save(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            train(create_trainer(At(3, send(signal.SIGINT)), SaveTrainingStateCallback(tmp_path)))
        assert names_in(tmp_path) == []
        saver = SaveTrainingStateCallback(tmp_path, save_on_signals=("SIGINT",))
        with pytest.raises(RunInterrupted) as caught:
            train(create_trainer(At(3, send(signal.SIGINT)), saver))
        assert caught.value.code == 130
        assert names_in(tmp_path) == ["update_00000004"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_signal_that_the_platform_lacks_is_left_out(self):
        assert SaveTrainingStateCallback(save_on_signals=("SIGTERM", "SIGBREAK")).signals.numbers == [
            signal.SIGTERM
        ]

    def test_a_process_ends_with_the_status_of_the_signal_and_a_second_one_ends_it_at_once(self, tmp_path):
        script = """
            import sys, time
            from pathlib import Path
            import torch
            from accel_callbacks import SaveTrainingStateCallback
            from accel_core import Trainer, TrainerCallback

            folder = Path(sys.argv[1])

            class Wait(TrainerCallback):
                def on_optimizer_step_end(self, trainer):
                    if trainer.run_progress.updates_completed == 3:
                        (folder / "waits").touch()
                        while "stop" not in trainer.agreement.flagged:
                            time.sleep(0.01)
                        (folder / "noticed").touch()
                        while not (folder / "go_on").exists():
                            time.sleep(0.01)

            data = [(torch.ones(3), torch.ones(1))] * 24
            model = torch.nn.Linear(3, 1)
            trainer = Trainer(
                model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01),
                [Wait, SaveTrainingStateCallback(folder / "states")],
            )
            trainer.train(data, 1, per_device_batch_size=4)
        """
        once, twice = tmp_path / "once", tmp_path / "twice"
        once.mkdir()
        twice.mkdir()
        with start(script, 1, [once]) as first, start(script, 1, [twice]) as second:
            wait_until((once / "waits").exists, first)
            wait_until((twice / "waits").exists, second)
            first.process.send_signal(signal.SIGTERM)
            second.process.send_signal(signal.SIGTERM)
            (once / "go_on").touch()
            wait_until((twice / "noticed").exists, second)
            second.process.send_signal(signal.SIGUSR1)
            finished = first.wait()
            assert second.wait().returncode == -signal.SIGUSR1
        assert finished.returncode == 128 + signal.SIGTERM
        assert "Traceback" not in finished.stderr
        assert names_in(once / "states") == ["update_00000004"]
        assert not (twice / "states").exists()

    def test_a_signal_to_the_whole_job_does_not_take_the_workers_of_the_data_away(self, tmp_path):
        script = """
            import sys, time
            from pathlib import Path
            import torch
            from accel_callbacks import SaveTrainingStateCallback
            from accel_core import Trainer, TrainerCallback

            folder = Path(sys.argv[1])

            class Slow(torch.utils.data.Dataset):
                def __len__(self):
                    return 200

                def __getitem__(self, index):
                    time.sleep(0.01)
                    return torch.ones(3), torch.ones(1)

            class Wait(TrainerCallback):
                def on_optimizer_step_end(self, trainer):
                    if trainer.run_progress.updates_completed == 3:
                        (folder / "waits").touch()
                        while "stop" not in trainer.agreement.flagged:
                            time.sleep(0.01)

            model = torch.nn.Linear(3, 1)
            trainer = Trainer(
                model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.01),
                [Wait, SaveTrainingStateCallback(folder / "states")],
            )
            trainer.train(Slow(), 1, per_device_batch_size=4, train_dataloader_kwargs={"num_workers": 2})
        """
        with start(script, 1, [tmp_path]) as running:
            wait_until((tmp_path / "waits").exists, running)
            os.killpg(running.process.pid, signal.SIGTERM)
            finished = running.wait()
            assert running.tree() == []
        assert finished.returncode == 128 + signal.SIGTERM, finished.stderr
        assert names_in(tmp_path / "states") == ["update_00000004"]
