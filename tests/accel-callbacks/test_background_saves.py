"""SaveTrainingStateCallback(in_background=True): what a thread writes is what stood at the safe point, complete or absent."""

import subprocess
import sys
import textwrap
import threading
import time
import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback, run_folder
from accel_core import (
    AccelWarning,
    CheckpointError,
    ConfigurationError,
    RunInterrupted,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.extending import KnownStates
from accel_core.state import save as save_module
from accel_core.state.digests import hashes_beside
from accel_core.state.housekeeping import remove_checkpoint
from accel_core.state.snapshot import Snapshots
from launching import launch

# On a machine with much else to do any of these saves may be slow.
pytestmark = pytest.mark.filterwarnings("ignore:A save is due")

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(POINTS, POINTS.sum(1, keepdim=True))
SECONDS = 30
"""Longer than any of these trainings takes, on a machine with much else to do."""


class Gate:
    """Stands before the writing of a save: holds it up, or lets it fail."""

    def __init__(self, monkeypatch, failures=0):
        self.may_write = threading.Event()
        self.failures = failures
        self.threads = []
        self._write = save_module.write_contents
        monkeypatch.setattr(save_module, "write_contents", self)

    def __call__(self, *args):
        self.threads.append(threading.current_thread())
        self.hashes_beside = hashes_beside.get()
        assert self.may_write.wait(SECONDS)
        if self.failures > 0:
            self.failures -= 1
            raise OSError("no space left")
        return self._write(*args)


class Watch(TrainerCallback):
    """Notes what was told as saved after which update, and acts at some of them."""

    order = 2000

    def __init__(self, **actions):
        self.told = []
        self.updates = []
        self.actions = {int(name.removeprefix("at_")): action for name, action in actions.items()}

    def on_checkpoint_saved(self, trainer, path):
        self.told.append((path.name, trainer.run_progress.updates_completed))

    def on_optimizer_step_end(self, trainer):
        update = trainer.run_progress.updates_completed
        self.updates.append((update, trainer.last_checkpoint))
        if update in self.actions:
            self.actions[update](trainer)


def create_trainer(*callbacks):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=1)


def train(trainer, num_epochs=2, **kwargs):
    """Six updates an epoch."""
    return trainer.train(DATA, num_epochs, per_device_batch_size=4, **kwargs)


def background(folder, updates=None, **kwargs):
    return SaveTrainingStateCallback(folder, save_every_n_updates=updates, in_background=True, **kwargs)


def test_training_goes_on_while_a_thread_writes_and_the_state_is_told_once_it_stands(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    watch = Watch(at_5=lambda trainer: gate.may_write.set())
    train(create_trainer(background(tmp_path, 3, save_at_end=False), watch), 1, max_num_train_steps=5)
    assert [found for found in watch.updates if found[0] < 5] == [(update, None) for update in (1, 2, 3, 4)]
    assert watch.told == [("update_00000003", 5)]
    assert gate.threads[0] is not threading.main_thread()
    assert not gate.hashes_beside and hashes_beside.get()  # The training needs the other core.
    assert verify_checkpoint(tmp_path) == {tmp_path / "update_00000003": None}


def test_it_holds_what_stood_at_the_safe_point_and_not_what_training_made_of_it(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    watch = Watch(at_11=lambda trainer: gate.may_write.set())
    train(create_trainer(background(tmp_path / "a", 7, save_at_end=False), watch), max_num_train_steps=11)
    whole = create_trainer()
    train(whole)
    resumed = create_trainer()
    train(resumed, resume_from=tmp_path / "a" / "update_00000007")
    assert resumed.run_history.to_records() == whole.run_history.to_records()
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_save_that_is_due_earlier_waits_and_says_so_once(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    gate.may_write.set()
    real = gate._write

    def slow(*args):
        time.sleep(0.05)
        return real(*args)

    gate._write = slow
    watch = Watch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(create_trainer(background(tmp_path, 1), watch))
    said = [str(warning.message) for warning in caught if "still being written" in str(warning.message)]
    assert len(said) == 1
    assert "update_00000001" in said[0]
    # The last one again at the end, when the epoch is closed.
    assert list(dict.fromkeys(name for name, _ in watch.told)) == [
        f"update_{update:08d}" for update in range(1, 13)
    ]


def test_a_writer_that_fails_ends_the_run_at_the_next_safe_point(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    gate.may_write.set()
    train(create_trainer(background(tmp_path, 3, save_at_end=False)), 1, max_num_train_steps=4)
    gate.failures = 1
    trainer = create_trainer(background(tmp_path, 5, save_at_end=False))
    with pytest.raises(CheckpointError, match=r"update_00000005' in the background.*OSError: no space left"):
        train(trainer, resume_from=latest_checkpoint(tmp_path))
    assert [path.name for path in tmp_path.glob("update_*")] == ["update_00000003"]
    assert 5 < trainer.run_progress.updates_completed < 12


def test_a_writer_that_fails_once_is_tried_again(monkeypatch, tmp_path):
    gate = Gate(monkeypatch, failures=1)
    gate.may_write.set()
    watch = Watch()
    with pytest.warns(AccelWarning, match=r"no space left.*tried again"):
        train(create_trainer(background(tmp_path, 4, on_error="retry", save_at_end=False), watch))
    assert [name for name, _ in watch.told][-1] == "update_00000012"
    assert set(verify_checkpoint(tmp_path).values()) == {None}


def test_a_writer_that_fails_for_ever_ends_the_run(monkeypatch, tmp_path):
    gate = Gate(monkeypatch, failures=1000)
    gate.may_write.set()
    trainer = create_trainer(background(tmp_path, 1, on_error="retry"))
    with pytest.warns(AccelWarning, match="no space left"), pytest.raises(CheckpointError, match="no space"):
        train(trainer, 20)
    assert not list(tmp_path.iterdir())


def test_an_error_of_training_waits_for_the_save_on_its_way(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)

    def fail(trainer):
        threading.Timer(0.2, gate.may_write.set).start()
        raise ValueError("mine")

    trainer = create_trainer(background(tmp_path, 3), Watch(at_4=fail))
    with pytest.raises(ValueError, match="mine"):
        train(trainer)
    assert trainer.last_checkpoint == tmp_path / "update_00000003"
    assert verify_checkpoint(tmp_path) == {tmp_path / "update_00000003": None}


def test_a_stop_by_a_signal_saves_after_the_save_on_its_way(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)

    def stop(trainer):
        threading.Timer(0.2, gate.may_write.set).start()
        trainer.request_stop("a signal", 15)

    trainer = create_trainer(background(tmp_path, 3), Watch(at_4=stop))
    with pytest.raises(RunInterrupted) as stopped:
        train(trainer)
    assert stopped.value.checkpoint == latest_checkpoint(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("update_*"))] == ["update_00000003", "update_00000005"]


def test_what_cannot_be_saved_is_refused_at_the_safe_point(tmp_path):
    class Unsaveable(TrainerCallback):
        def state_dict(self):
            return {"f": print}

    trainer = create_trainer(background(tmp_path, 3), Unsaveable())
    with pytest.raises(ConfigurationError, match=r"process_00000\.pt.*'callbacks\.Unsaveable\.f' is a"):
        train(trainer)
    assert trainer.run_progress.updates_completed == 3
    assert not list(tmp_path.iterdir())


def test_rotation_comes_after_the_new_state_stands(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    gate.may_write.set()
    there = []

    class Look(TrainerCallback):
        def on_checkpoint_saved(self, trainer, path):
            there.append(sorted(each.name for each in tmp_path.glob("update_*")))

    train(create_trainer(background(tmp_path, 4, keep_last=1), Look()))
    assert [path.name for path in tmp_path.glob("update_*")] == ["update_00000012"]
    assert there[1] == ["update_00000004", "update_00000008"]


def test_what_need_not_be_kept_is_removed_while_training_goes_on(monkeypatch, tmp_path):
    may_remove, removed = threading.Event(), []

    def remove(path):
        assert may_remove.wait(SECONDS)
        removed.append((path.name, threading.current_thread().name))
        remove_checkpoint(path)

    def wait_until_it_stands(trainer):
        saver._saver.background.writer.wait()

    def look(trainer):
        assert not removed
        assert (tmp_path / "update_00000004").is_dir()
        may_remove.set()

    monkeypatch.setattr(run_folder, "remove_checkpoint", remove)
    saver = background(tmp_path, 4, keep_last=1)
    train(create_trainer(saver, Watch(at_4=wait_until_it_stands, at_8=wait_until_it_stands, at_11=look)))
    assert removed == [("update_00000004", "accel-save"), ("update_00000008", "MainThread")]
    assert [path.name for path in tmp_path.glob("update_*")] == ["update_00000012"]


def test_a_folder_that_the_writer_cannot_list_is_left_to_the_next_save(monkeypatch, tmp_path):
    refresh, failed = KnownStates.refresh, []

    def fail_beside(known):
        if threading.current_thread() is not threading.main_thread():
            failed.append(1)
            raise CheckpointError("cannot be listed")
        refresh(known)

    def wait_until_it_stands(trainer):
        saver._saver.background.writer.wait()

    monkeypatch.setattr(KnownStates, "refresh", fail_beside)
    saver = background(tmp_path, 4, keep_last=1)
    train(create_trainer(saver, Watch(at_4=wait_until_it_stands, at_8=wait_until_it_stands)))
    assert failed
    assert [path.name for path in tmp_path.glob("update_*")] == ["update_00000012"]


def test_an_engine_that_communicates_while_it_writes_is_refused(monkeypatch, tmp_path):
    trainer = create_trainer(background(tmp_path))
    monkeypatch.setattr(type(trainer.engine), "writes_in_background", False)
    with pytest.raises(ConfigurationError, match=r"in_background is True.*Leave in_background out"):
        train(trainer)


def test_another_value_than_true_or_false_is_refused():
    with pytest.raises(ConfigurationError, match="in_background is 'yes'"):
        SaveTrainingStateCallback(in_background="yes")


def test_a_save_of_your_own_beside_the_one_on_its_way_leaves_that_alone(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)

    def save(trainer):
        # The second call of the gate comes from the main thread.
        gate.may_write.set()
        trainer.save_training_state(tmp_path / "mine")

    held = threading.Event()
    write = gate._write

    def write_when_mine_stands(folder, *args):
        if "update" in folder.name:
            assert held.wait(SECONDS)
        return write(folder, *args)

    gate._write = write_when_mine_stands
    watch = Watch(at_4=save, at_5=lambda trainer: held.set())
    train(create_trainer(background(tmp_path, 3, save_at_end=False), watch), max_num_train_steps=5)
    assert set(verify_checkpoint(tmp_path)) == {tmp_path / "mine", tmp_path / "update_00000003"}


def test_workers_that_are_forked_while_a_thread_writes_read_on(monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    watch = Watch(at_8=lambda trainer: gate.may_write.set())
    saver = background(tmp_path, 5, save_at_end=False)
    loader = {"num_workers": 2, "persistent_workers": False, "multiprocessing_context": "fork"}
    train(create_trainer(saver, watch), max_num_train_steps=9, train_dataloader_kwargs=loader)
    assert watch.told[0][0] == "update_00000005"


def test_python_ends_after_the_save_on_its_way(tmp_path):
    script = """
        import sys, time
        from pathlib import Path
        from accel_core.state import background, digests, files
        writer = background.BackgroundWriter()

        def write():
            time.sleep(0.5)
            # Larger than what is hashed by a thread of its own, which Python at its end does not start.
            files.write_bytes(Path(sys.argv[1]), bytes(4 * digests.SMALL))

        writer.start(write)
    """
    path = tmp_path / "file"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=True, timeout=60)
    assert path.stat().st_size == 4 * (1 << 16)


def test_memory_of_copies_is_used_again_and_told():
    snapshots, tensor = Snapshots(), torch.arange(6.0)
    shared = {"a": tensor, "b": {"c": tensor, "d": [tensor[:2], 5, "x"]}}
    first = snapshots.take(shared)
    place, nbytes = first["a"].data_ptr(), snapshots.nbytes
    tensor.add_(1)
    assert first["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["b"]["c"] is first["a"]
    second = snapshots.take(shared)
    assert second["a"].data_ptr() == place
    assert second["b"]["d"][0].tolist() == [1, 2]
    assert nbytes == snapshots.nbytes == 4 * 8
    snapshots.take({"a": torch.zeros(1)})
    assert snapshots.nbytes == 4


def test_describe_tells_what_a_background_save_takes_in_memory(tmp_path):
    trainer = create_trainer(background(tmp_path))
    assert "0.0 MB" in trainer.describe() and "in the background" in trainer.describe()
    big = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.AdamW(big.parameters())
    described = Trainer(big, torch.nn.functional.mse_loss, optimizer, [background(tmp_path)])
    assert "copies of 4.0 MB" in described.describe()
    big(torch.zeros(1, 1000)).sum().backward()
    optimizer.step()
    assert "copies of 12.0 MB" in described.describe()


TWO = """
    import sys
    from pathlib import Path
    import torch
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveTrainingStateCallback, run_folder
    from accel_core import CheckpointError, Trainer, TrainerCallback, verify_checkpoint
    from accel_core.state import files, save

    folder, fails = Path(sys.argv[1]), sys.argv[2] == "fails"

    class Watch(TrainerCallback):
        order = 2000
        told = []
        def on_checkpoint_saved(self, trainer, path):
            self.told.append((path.name, trainer.run_progress.updates_completed))
        def state_dict(self):
            return {"index": trainer.accelerator.process_index}

    create = files.create
    def only_on_main(*args, **kwargs):
        assert trainer.is_main_process
        if fails:
            raise OSError("no space left")
        return create(*args, **kwargs)
    files.create = only_on_main

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    saver = SaveTrainingStateCallback(folder, save_every_n_updates=3, in_background=sys.argv[3] == "background")
    trainer = Trainer(model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters()), [saver, Watch], seed=1)
    data = TensorDataset(torch.randn(48, 3), torch.zeros(48, 1))
    try:
        trainer.train(data, 1, per_device_batch_size=4)
    except CheckpointError as error:
        assert fails and "no space left" in str(error), error
        assert not list(folder.glob("*"))
        print("raised on", trainer.accelerator.process_index)
        sys.exit()
    for path in folder.glob("update_*"):
        for index in range(2):
            state = files.read_object(path / f"process_{index:05d}.pt")
            assert state["callbacks"]["Watch"] == {"index": index}, state["callbacks"]
    assert set(verify_checkpoint(folder).values()) == {None}
    print("told", trainer.accelerator.process_index, Watch.told)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["background", "blocking"])
def test_of_two_processes_the_main_one_writes_all_and_both_hear_of_it_at_the_same_update(how, tmp_path):
    finished = launch(TWO, processes=2, args=[tmp_path, "works", how])
    told = [line.split(" ", 2)[2] for line in finished.stdout.splitlines() if line.startswith("told")]
    assert len(told) == 2 and told[0] == told[1]
    assert "update_00000003" in told[0] and "update_00000006" in told[0]


@pytest.mark.slow
def test_what_fails_in_the_background_is_raised_on_both_processes(tmp_path):
    finished = launch(TWO, processes=2, args=[tmp_path, "fails", "background"])
    assert "raised on 0" in finished.stdout and "raised on 1" in finished.stdout
