"""A folder that looks after itself: damaged states, other runs, failing disks, many states, and races with other processes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas
import pytest
import torch

from accel_callbacks import SaveTrainingStateCallback, StepBasedEvaluationCallback
from accel_core import (
    AccelWarning,
    CheckpointError,
    ConfigurationError,
    RunInterrupted,
    Trainer,
    TrainerCallback,
    best_checkpoint,
    latest_checkpoint,
)
from accel_core.extending import KnownStates
from accel_core.state import files
from launching import launch
from states import STATE_FILE, edit, flip_bit
from tiny import RecordWanted, tiny_data, tiny_trainer, weights_of

DATA = tiny_data(24)


def train(folder, num_epochs=2, callbacks=(), resume_from=None, seed=3, **kwargs):
    """Three updates an epoch."""
    trainer = tiny_trainer(callbacks=[*callbacks, SaveTrainingStateCallback(folder, **kwargs)], seed=seed)
    trainer.train(DATA, num_epochs, eval_dataset=DATA, resume_from=resume_from)
    return trainer


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "run_card.json")


class TestRestart:
    @pytest.mark.parametrize(
        "damage", ["a bit of the weights", "a bit of the json", "no json", "an empty json", "a file less"]
    )
    def test_a_restart_goes_on_before_a_damaged_state_and_saves_in_the_same_folder(
        self, damage, tmp_path, caplog
    ):
        expected = train(tmp_path / "whole", 3, save_every_n_updates=2)
        train(tmp_path / "states", 2, save_every_n_updates=2)
        newest = tmp_path / "states" / "update_00000006"
        if damage == "a bit of the weights":
            flip_bit(newest / "model.safetensors", random.Random(0))
        elif damage == "a bit of the json":
            flip_bit(newest / STATE_FILE, random.Random(0))
        elif damage == "no json":
            (newest / STATE_FILE).unlink()
        elif damage == "an empty json":
            (newest / STATE_FILE).write_bytes(b"")
        else:
            (newest / "optimizer.pt").unlink()
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").rglob("*")}
        latest = latest_checkpoint(tmp_path / "states")
        assert latest == tmp_path / "states" / "update_00000004"
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "states").rglob("*")} == before
        told = [record.getMessage() for record in caplog.records if "update_00000006" in record.getMessage()]
        assert len(told) == 1 and "skipped" in told[0]
        resumed = train(tmp_path / "states", 3, save_every_n_updates=2, resume_from=latest)
        assert sum("skipped" in record.getMessage() for record in caplog.records) == 1
        assert torch.equal(weights_of(resumed), weights_of(expected))
        assert resumed.run_history.to_records() == expected.run_history.to_records()
        assert "damaged_update_00000006" in names_in(tmp_path / "states")
        assert latest_checkpoint(tmp_path / "states").name == "update_00000009"

    def test_without_asking_for_digests_damage_is_found_while_loading_and_the_next_start_goes_on(
        self, tmp_path
    ):
        train(tmp_path, 2, save_every_n_updates=2)
        flip_bit(tmp_path / "update_00000006" / "optimizer.pt", random.Random(0))
        assert latest_checkpoint(tmp_path, verify=False).name == "update_00000006"
        with pytest.raises(CheckpointError, match=r"optimizer\.pt.*damaged_update_00000006"):
            train(tmp_path, 3, resume_from=latest_checkpoint(tmp_path, verify=False))
        assert latest_checkpoint(tmp_path, verify=False).name == "update_00000004"
        train(tmp_path, 3, resume_from=latest_checkpoint(tmp_path, verify=False))
        assert latest_checkpoint(tmp_path).name == "update_00000009"

    def test_where_only_damaged_states_stand_it_says_which_and_how_to_start_afresh(self, tmp_path):
        train(tmp_path, 1)
        state = tmp_path / "update_00000003"
        flip_bit(state / "extra.pt", random.Random(0))
        for name in ("update_00000003", "damaged_update_00000003"):
            with pytest.raises(
                CheckpointError, match=rf"{name}' .*start afresh.*(move|delete).*another folder"
            ):
                latest_checkpoint(tmp_path)
            if state.exists():
                state.rename(tmp_path / "damaged_update_00000003")

    def test_states_of_other_libraries_are_no_states(self, tmp_path):
        (tmp_path / "checkpoint-500").mkdir()
        (tmp_path / "checkpoint-500" / STATE_FILE).write_text(
            json.dumps({"global_step": 500, "log_history": []})
        )
        (tmp_path / "model.pt.incomplete").mkdir()
        assert latest_checkpoint(tmp_path) is None

    def test_a_state_that_is_copied_alone_resumes_with_its_whole_history(self, tmp_path):
        first = train(tmp_path / "states", 2, save_every_n_updates=2)
        shutil.copytree(tmp_path / "states" / "update_00000006", tmp_path / "copy")
        shutil.rmtree(tmp_path / "states")
        resumed = train(tmp_path / "new", 3, resume_from=tmp_path / "copy")
        assert (
            resumed.run_history.to_records()[: len(first.run_history.to_records())]
            == first.run_history.to_records()
        )


WRITER = """
    import os, sys, time
    from pathlib import Path
    from accel_core.state.housekeeping import remove_checkpoint
    sys.path[:0] = sys.argv[2:]
    from test_training_state import save

    os.fsync = lambda _: None
    folder, give_up, updates = Path(sys.argv[1]), time.monotonic() + 6, 1
    save(folder / "update_1", 1)
    print("stands", flush=True)
    while time.monotonic() < give_up:
        updates += 1
        save(folder / f"update_{updates}", updates)
        remove_checkpoint(folder / f"update_{updates - 1}")
"""


@pytest.mark.seconds
def test_a_state_is_found_at_every_moment_while_another_process_saves_and_removes(tmp_path):
    """Whatever it finds stood a moment ago, and never nothing."""
    script = textwrap.dedent(WRITER)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, tmp_path, tests, tests / "accel-core"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "stands\n"
        questions = 0
        while writer.poll() is None:
            assert latest_checkpoint(tmp_path, verify=questions % 2 == 0) is not None
            questions += 1
    assert writer.returncode == 0 and questions > 50


class CountWork(TrainerCallback):
    """Counts for each save: files opened, bytes of JSON encoded, bytes hashed, and times that `folder` was listed."""

    def __init__(self, monkeypatch, folder):
        self.opened = self.encoded = self.hashed = self.listed = 0
        self.saves = []
        dumps, sha256 = json.dumps, hashlib.sha256

        def hook(event, args):
            self.opened += event == "open"
            self.listed += event == "os.scandir" and str(args[0]) == str(folder)

        # It cannot be taken away again, so it counts into what is there.
        sys.addaudithook(hook)

        def counted(*args, **kwargs):
            text = dumps(*args, **kwargs)
            self.encoded += len(text)
            return text

        counter = self

        class Counted:
            def __init__(self, data=b""):
                self.inner = sha256()
                self.hexdigest = self.inner.hexdigest
                self.update(data)

            def update(self, data):
                counter.hashed += memoryview(data).nbytes
                self.inner.update(data)

        monkeypatch.setattr(json, "dumps", counted)
        monkeypatch.setattr(hashlib, "sha256", Counted)

    def on_train_step_end(self, trainer, batch, batch_output, step):
        trainer.run_history.update_metric("noise", 1 / (1 + trainer.run_progress.updates_completed))
        if self.opened:
            self.saves.append((self.opened, self.encoded, self.hashed, self.listed))
        self.opened = self.encoded = self.hashed = self.listed = 0


class CountCalls(SaveTrainingStateCallback):
    """Counts the Python functions that each save calls."""

    def save(self, trainer, is_last=False):
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            super().save(trainer, is_last)
        finally:
            sys.setprofile(None)
        self.calls = [*getattr(self, "calls", []), calls]


class TestCost:
    def test_a_late_save_calls_no_more_functions_than_the_second(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda _: None)
        saver = CountCalls(tmp_path, save_every_n_updates=1, save_at_end=False)
        tiny_trainer(callbacks=[saver]).train(DATA, max_num_train_steps=60)
        # Names of folders get a few more characters; each state that is there may cost none.
        assert saver.calls[55] < saver.calls[4] + 25

    @pytest.mark.parametrize("keep_last", [None, 2])
    def test_a_late_save_opens_no_more_files_and_encodes_and_hashes_no_more_than_the_second(
        self, keep_last, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(os, "fsync", lambda _: None)
        counter = CountWork(monkeypatch, tmp_path)
        trainer = tiny_trainer(
            callbacks=[
                counter,
                SaveTrainingStateCallback(tmp_path, save_every_n_updates=1, keep_last=keep_last),
            ]
        )
        trainer.train(DATA, max_num_train_steps=60)
        # An epoch has three updates: compared are saves at the same place in it.
        opened, encoded, hashed, _ = counter.saves[4]
        opened_late, encoded_late, hashed_late, listed_late = counter.saves[55]
        assert opened_late == opened
        assert encoded_late <= encoded + 40  # digits of counters
        assert hashed_late <= hashed + 400  # the same, in several files
        # Before a save, and once more to see which of the states need not be kept.
        assert listed_late == (1 if keep_last is None else 2)

    def test_the_history_is_lines_that_pandas_reads(self, tmp_path):
        trainer = train(tmp_path, 2, [RecordWanted(float("nan"), float("inf"))])
        frame = pandas.read_json(tmp_path / "update_00000006" / "history.jsonl", lines=True)
        expected = trainer.run_history.to_dataframe()
        pandas.testing.assert_frame_equal(frame, expected)
        resumed = train(tmp_path / "more", 2, resume_from=tmp_path / "update_00000006")
        assert repr(resumed.run_history.to_records()) == repr(trainer.run_history.to_records())

    def test_a_deletion_writes_the_lines_anew(self, tmp_path):
        class Delete(TrainerCallback):
            def on_training_run_epoch_end(self, trainer):
                if trainer.run_history.current_epoch == 2:
                    trainer.run_history.delete_metric("train_loss_epoch")

        trainer = train(tmp_path, 2, [Delete()], save_every_n_epochs=1)
        for name, number in (("update_00000003", 2), ("update_00000006", 2)):
            lines = (tmp_path / name / "history.jsonl").read_text().splitlines()
            assert len(lines) == number
        assert [json.loads(line) for line in lines] == trainer.run_history.to_records()


class TestBest:
    def test_a_state_is_saved_where_the_metric_is_recorded_and_the_best_is_found(self, tmp_path):
        recorded = RecordWanted(3.0, 1.0, 2.0, 4.0)
        train(
            tmp_path, 4, [recorded], save_every_n_updates=2, keep_best=2, keep_last=1, watch_metric="wanted"
        )
        assert names_in(tmp_path) == ["update_00000006", "update_00000009", "update_00000012"]
        assert best_checkpoint(tmp_path, "wanted").name == "update_00000006"
        assert best_checkpoint(tmp_path, "wanted", greater_is_better=True).name == "update_00000012"
        assert best_checkpoint(tmp_path, "unheard_of") is None
        assert best_checkpoint(tmp_path / "missing") is None
        flip_bit(tmp_path / "update_00000006" / "extra.pt", random.Random(0))
        assert best_checkpoint(tmp_path, "wanted").name == "update_00000009"

    def test_a_metric_of_mid_epoch_has_its_states_too(self, tmp_path):
        evaluation = StepBasedEvaluationCallback(2)
        watched = {"keep_best": 5, "watch_metric": "intermediate_eval_loss_epoch"}
        train(tmp_path, 2, [evaluation], save_at_end=False, **watched)
        assert {"update_00000002", "update_00000004", "update_00000006"} == set(names_in(tmp_path))

    def test_states_of_the_format_before_have_values_too(self):
        past = Path(__file__).parents[1] / "past" / "format_1" / "one_process"
        assert best_checkpoint(past, "train_loss_epoch") == past / "before_evaluation"


class TestKnownStates:
    def test_only_what_is_new_is_checked_unless_another_run_or_an_earlier_place_is_asked_for(self, tmp_path):
        run_id = train(tmp_path, save_every_n_updates=2).run_id
        known = KnownStates(tmp_path)
        known.refresh()
        known.check(run_id, 6)
        known.check(run_id, 8)
        with pytest.raises(CheckpointError, match="6 updates of this run, which has gone on from 5"):
            known.check(run_id, 5)
        with pytest.raises(CheckpointError, match="this is the run 'another'"):
            known.check("another", 8)
        known.check(run_id, 8)
        shutil.copytree(tmp_path / "update_00000006", tmp_path / "update_00000009")
        edit(tmp_path / "update_00000009", "run_id", value="another")
        known.refresh()
        # It is refused each time, until it is gone.
        for _ in range(2):
            with pytest.raises(CheckpointError, match="update_00000009' is a state of the run 'another'"):
                known.check(run_id, 9)
        shutil.rmtree(tmp_path / "update_00000009")
        known.refresh()
        known.check(run_id, 9)


class FailingDisk:
    """Lets saves fail as long as it is broken; a save is known by the name of what it writes first."""

    def __init__(self, monkeypatch, broken):
        self.attempts = 0
        make_staging = files.make_staging

        def make(path):
            self.attempts += 1
            if self.attempts in broken:
                raise OSError(28, "No space left on device")
            make_staging(path)

        monkeypatch.setattr(files, "make_staging", make)


class TestFailingSaves:
    def test_a_failed_save_is_told_once_and_tried_again_with_growing_distance(
        self, tmp_path, monkeypatch, capsys
    ):
        disk = FailingDisk(monkeypatch, {2, 3, 4})
        with pytest.warns(AccelWarning, match=r"No space left.*tried again") as warned:
            train(tmp_path, 4, save_every_n_updates=1, on_error="retry", save_at_end=False)
        assert len(warned) == 1
        # The second fails at update 2, so that 3, 5 and 9 are tried; between them nothing is.
        assert names_in(tmp_path) == [f"update_{update:08d}" for update in (1, 9, 10, 11, 12)]
        assert disk.attempts == 1 + 3 + 4
        assert "could be saved again" in capsys.readouterr().out

    def test_five_in_a_row_end_the_run(self, tmp_path, monkeypatch):
        disk = FailingDisk(monkeypatch, range(1, 99))
        with pytest.warns(AccelWarning), pytest.raises(CheckpointError, match="No space left") as caught:
            train(tmp_path, 9, save_every_n_updates=1, on_error="retry")
        assert disk.attempts == 5
        assert "5 saves in a row" in caught.value.__notes__[0]

    @pytest.mark.parametrize("save_at_end", [True, False])
    def test_one_at_the_end_ends_the_run(self, save_at_end, tmp_path, monkeypatch):
        FailingDisk(monkeypatch, range(2, 99))
        with pytest.warns(AccelWarning), pytest.raises(CheckpointError, match="No space left"):
            train(tmp_path, 1, save_every_n_updates=1, on_error="retry", save_at_end=save_at_end)

    def test_without_the_option_the_first_ends_the_run(self, tmp_path, monkeypatch):
        disk = FailingDisk(monkeypatch, {1})
        with pytest.raises(CheckpointError, match="No space left"):
            train(tmp_path, 2, save_every_n_updates=1)
        assert disk.attempts == 1

    def test_another_run_in_the_folder_is_no_failure_that_passes(self, tmp_path):
        train(tmp_path, 1)
        with pytest.raises(CheckpointError, match="another folder"):
            train(tmp_path, 1, seed=4, on_error="retry")

    @pytest.mark.slow
    def test_processes_retry_together(self, tmp_path):
        launch(Path(__file__), args=[tmp_path], env={"PYTHONPATH": str(Path(__file__).parents[1])})
        assert names_in(tmp_path) == ["update_00000001", "update_00000003", "update_00000004"]

    def test_what_cannot_be_removed_is_logged_once(self, tmp_path, monkeypatch, caplog):
        stuck, remove = tmp_path / "update_00000001", files.rename

        def rename(source, target):
            if source == stuck:
                raise OSError(16, "Device or resource busy")
            remove(source, target)

        monkeypatch.setattr(files, "rename", rename)
        train(tmp_path, 3, save_every_n_updates=1, keep_last=1)
        assert names_in(tmp_path) == ["update_00000001", "update_00000009"]
        assert (
            len([record for record in caplog.records if "could not be removed" in record.getMessage()]) == 1
        )

    def test_what_could_not_be_removed_goes_with_a_later_save(self, tmp_path, monkeypatch):
        remove, refused = files.remove_folder, []

        def remove_folder(path):
            if len(refused) < 3:
                refused.append(path)
                raise OSError(16, "Device or resource busy")
            remove(path)

        monkeypatch.setattr(files, "remove_folder", remove_folder)
        train(tmp_path, 3, save_every_n_updates=1, keep_last=1)
        assert len(refused) == 3
        assert names_in(tmp_path) == ["update_00000009"]


class TestOtherRun:
    def test_the_error_says_how_to_start_again(self, tmp_path):
        train(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"delete '.*' to start again.*if_other_run='set_aside'"):
            train(tmp_path, 1, seed=4)

    def test_its_states_are_set_aside_if_wanted(self, tmp_path, capsys):
        first = train(tmp_path, 2, save_every_n_epochs=1)
        flip_bit(tmp_path / "update_00000003" / "extra.pt", random.Random(0))
        (tmp_path / "notes").mkdir()
        second = train(tmp_path, 1, seed=4, if_other_run="set_aside")
        assert names_in(tmp_path) == sorted(["notes", f"other_run_{first.run_id}", "update_00000003"])
        assert f"other_run_{first.run_id}" in capsys.readouterr().out
        content = json.loads((latest_checkpoint(tmp_path) / STATE_FILE).read_text())
        assert content["run_id"] == second.run_id
        aside = tmp_path / f"other_run_{first.run_id}"
        assert latest_checkpoint(aside) == aside / "update_00000006"
        third = train(tmp_path, 2, seed=4, if_other_run="set_aside", resume_from=latest_checkpoint(tmp_path))
        assert third.run_id == second.run_id
        assert names_in(tmp_path) == sorted(["notes", aside.name, "update_00000003", "update_00000006"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_error": "ignore"}, r"on_error is 'ignore'.*'raise', 'retry'"),
        ({"if_other_run": "delete"}, r"if_other_run is 'delete'.*'raise', 'set_aside'"),
        ({"save_dir": ""}, r"save_dir is ''.*Pass"),
        ({"save_dir": "a" * 5000}, r"save_dir .*5000.*Pass"),
        ({"save_dir": 3}, r"save_dir is 3.*path.*Pass"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        SaveTrainingStateCallback(**arguments)


SIGNALLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = sys.argv[3:]
    from accel_callbacks import SaveTrainingStateCallback, find_learning_rate
    from accel_core import Trainer, TrainerCallback
    from tiny import tiny_data, tiny_trainer

    where, folder = sys.argv[1], Path(sys.argv[2])

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    class Killed(Trainer):
        calculate_train_batch_loss = kill

    if where == "find_learning_rate":
        find_learning_rate(tiny_trainer(Killed), tiny_data(), 4)
    else:
        # Before the saver, as a tracker that uploads.
        callback = type("Kill", (TrainerCallback,), {"order": 850, where: kill})()
        trainer = tiny_trainer(callbacks=[callback, SaveTrainingStateCallback(folder)])
        trainer.evaluate(tiny_data()) if "eval" in where else trainer.train(tiny_data(24), 1)
    print("the script goes on")
"""


@pytest.mark.seconds
@pytest.mark.skipif(os.name == "nt", reason="the platform has no such signals")
@pytest.mark.parametrize(
    ("where", "saved"),
    [
        ("on_run_close", ["update_00000003"]),
        ("on_prepare_start", None),
        ("on_training_run_start", None),
        ("on_eval_step_start", None),
        ("find_learning_rate", None),
    ],
)
def test_a_signal_ends_the_script_whenever_it_comes(where, saved, tmp_path):
    """With the status of the signal, or by it, if there is nothing to save; never is it lost."""
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(SIGNALLED),
        where,
        tmp_path / "states",
        Path(__file__).parents[1],
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), finished.stderr
    assert "goes on" not in finished.stdout
    assert saved is None or names_in(tmp_path / "states") == saved


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the platform has no such signal")
class TestSignals:
    def test_one_while_callbacks_close_is_raised_after_the_handlers_are_back(self, tmp_path):
        class Upload(TrainerCallback):
            order = 850

            def on_run_close(self, trainer):
                os.kill(os.getpid(), signal.SIGUSR1)

        before = signal.getsignal(signal.SIGUSR1)
        with pytest.raises(RunInterrupted) as caught:
            train(tmp_path, 1, [Upload()])
        assert caught.value.signal_number == signal.SIGUSR1
        assert caught.value.checkpoint == tmp_path / "update_00000003"
        assert signal.getsignal(signal.SIGUSR1) is before

    def test_one_while_an_error_ends_the_run_stops_the_next_run_and_the_error_is_raised(self, tmp_path):
        class Failing(TrainerCallback):
            order = 850

            def on_optimizer_step_end(self, trainer):
                raise ValueError("mine")

            def on_run_close(self, trainer):
                os.kill(os.getpid(), signal.SIGUSR1)

        before = signal.getsignal(signal.SIGUSR1)
        with pytest.raises(ValueError, match="mine") as caught:
            train(tmp_path / "failed", 1, [Failing()])
        assert any("SIGUSR1 was received too" in note for note in caught.value.__notes__)
        assert signal.getsignal(signal.SIGUSR1) is before
        with pytest.raises(RunInterrupted) as interrupted:
            train(tmp_path / "retried", 2)
        assert interrupted.value.signal_number == signal.SIGUSR1
        assert interrupted.value.checkpoint.name < "update_00000006"
        # It is heeded once.
        assert train(tmp_path / "again", 1).run_progress.updates_completed == 3

    def test_one_while_an_error_ends_the_run_reaches_a_handler_of_the_programs_own(self, tmp_path):
        class Failing(TrainerCallback):
            def on_optimizer_step_end(self, trainer):
                os.kill(os.getpid(), signal.SIGUSR1)
                raise ValueError("mine")

        heard = []
        before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        try:
            with pytest.raises(ValueError, match="mine"):
                train(tmp_path / "failed", 1, [Failing()])
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert heard == [signal.SIGUSR1]
        assert train(tmp_path / "again", 1).run_progress.updates_completed == 3

    def test_one_in_an_evaluation_of_the_run_lets_it_finish_and_save(self, tmp_path):
        class Once(TrainerCallback):
            done = False

            def on_eval_step_start(self, trainer, batch):
                if not self.done:
                    self.done = True
                    os.kill(os.getpid(), signal.SIGUSR1)

        with pytest.raises(RunInterrupted):
            train(tmp_path, 3, [Once()])
        expected = train(tmp_path / "whole", 3)
        resumed = train(tmp_path, 3, resume_from=latest_checkpoint(tmp_path))
        assert torch.equal(weights_of(resumed), weights_of(expected))
        assert resumed.run_history.to_records() == expected.run_history.to_records()


def retry_on_two_processes(folder):
    """The second save fails on one process."""

    class Broken(Trainer):
        attempts = 0

        def state_dict(self):
            self.attempts += 1
            if self.attempts == 2 and not self.is_main_process:
                raise OSError(28, "No space left on device")
            return {}

    trainer = tiny_trainer(
        Broken,
        [SaveTrainingStateCallback(folder, save_every_n_updates=1, on_error="retry", save_at_end=False)],
    )
    trainer.train(tiny_data(64), 1, max_num_train_steps=4)
    assert trainer.accelerator.num_processes == 2


if __name__ == "__main__":
    retry_on_two_processes(Path(sys.argv[1]))
