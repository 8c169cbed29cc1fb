"""verify_checkpoint and best_checkpoint of addresses: what stands in a store is checked and found where it is."""

import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
from accel_core import (
    CheckpointError,
    ConfigurationError,
    Trainer,
    TrainerCallback,
    best_checkpoint,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.extending import OtherRunError
from accel_core.state import copying, fetch
from accel_core.state.folder import inode_of
from accel_core.state.mirrored import name_in_mirror
from states import flip_last_bit
from stores import Unreliable, s3_server

pytestmark = pytest.mark.usefixtures("store")

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(POINTS, POINTS.sum(1, keepdim=True))
RUN = "unreliable://run"


class Record(TrainerCallback):
    """Records values of a metric after every fourth update."""

    def __init__(self, *values):
        self.values = values

    def on_optimizer_step_end(self, trainer):
        number, rest = divmod(trainer.run_progress.updates_completed, 4)
        if not rest:
            trainer.run_history.update_metric("value", self.values[number - 1])


def train(path, *values, mirror=RUN, **arguments):
    """States after updates 4, 8 and 12, each with its value."""
    model = torch.nn.Linear(3, 1)
    saver = SaveTrainingStateCallback(path, save_every_n_updates=4, mirror=mirror, **arguments)
    callbacks = [Record(*values)] if values else []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, [*callbacks, saver])
    trainer.train(DATA, 2, per_device_batch_size=4)
    return trainer


def address_of(store, number):
    return f"{RUN}/{store.states()[number]}"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, which is empty again at the end."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert not list(place.glob("accel_*"))


def test_all_in_a_mirror_is_checked_without_a_copy_that_stays(tmp_path, store, temporary):
    trainer = train(tmp_path / "a")
    trainer.save_checkpoint(f"{RUN}/good.pt")
    trainer.save_checkpoint(f"{RUN}/flipped.safetensors")
    names = store.states()
    store.flip_last_bit(f"/run/{names[0]}/optimizer.pt")
    del store.store[f"/run/{names[1]}/model.safetensors"]
    store.flip_last_bit("/run/flipped.safetensors")
    # What nobody has saved, and what was not written to its end.
    for name in ("notes.pt", "notes/a.txt", "update_00000004-0a0a0a0a/optimizer.pt"):
        Unreliable().pipe_file(f"/run/{name}", b"x")
    found = verify_checkpoint(RUN)
    flipped = found.pop(f"{RUN}/flipped.safetensors")
    assert f"'{RUN}/flipped.safetensors' is damaged" in flipped
    # A file that torch cannot read at all may be a damaged export.
    assert f"'{RUN}/notes.pt'" in found.pop(f"{RUN}/notes.pt")
    assert found == {
        f"{RUN}/{names[0]}": "is damaged: optimizer.pt is not what was written, since its digest differs",
        f"{RUN}/{names[1]}": "is damaged: model.safetensors is not there",
        f"{RUN}/{names[2]}": None,
        f"{RUN}/good.pt": None,
    }


def test_a_single_state_or_export_in_a_store_is_checked(tmp_path, store, temporary):
    trainer = train(tmp_path / "a")
    trainer.save_checkpoint(f"{RUN}/model.safetensors")
    for address in (address_of(store, 0), f"{RUN}/model.safetensors"):
        assert verify_checkpoint(address) == {address: None}
        assert verify_checkpoint(f"{address}/") == {address: None}
    store.flip_last_bit(f"/run/{store.states()[0]}/trainer_state.json")
    store.flip_last_bit("/run/model.safetensors")
    for address, part in (
        (address_of(store, 0), "trainer_state.json"),
        (f"{RUN}/model.safetensors", "is damaged"),
    ):
        assert part in verify_checkpoint(address)[address]
        assert part in verify_checkpoint(RUN)[address]


def test_a_folder_that_somebody_has_copied_to_a_store_is_checked(tmp_path, store, temporary):
    train(tmp_path / "a", mirror=None)
    Unreliable().put(str(tmp_path / "a" / "update_00000004"), "/copied/update_00000004", recursive=True)
    assert verify_checkpoint("unreliable://copied") == {"unreliable://copied/update_00000004": None}


def test_what_was_set_aside_in_a_mirror_is_told_as_in_a_folder(tmp_path, store, temporary):
    train(tmp_path / "a")
    newest = address_of(store, -1)
    store.flip_last_bit(f"/run/{store.states()[-1]}/model.safetensors")
    found = latest_checkpoint(RUN, cache=tmp_path / "b")
    trainer = Trainer(
        model := torch.nn.Linear(3, 1),
        torch.nn.functional.mse_loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        [SaveTrainingStateCallback(tmp_path / "b", save_at_end=False, mirror=RUN)],
    )
    trainer.train(DATA, 2, per_device_batch_size=4, max_num_train_steps=9, resume_from=found)
    assert verify_checkpoint(RUN)[newest] == "was set aside, since damage was found while it was loaded"
    assert verify_checkpoint(newest) == {newest: verify_checkpoint(RUN)[newest]}


def test_a_transfer_that_breaks_off_is_no_flaw(tmp_path, store, monkeypatch, temporary):
    train(tmp_path / "a")
    seen = set()
    get = Unreliable.get_file

    def cut_once(self, rpath, lpath, **kwargs):
        get(self, rpath, lpath, **kwargs)
        if rpath not in seen:
            seen.add(rpath)
            with open(lpath, "r+b") as file:
                file.truncate(10)

    monkeypatch.setattr(Unreliable, "get_file", cut_once)
    assert set(verify_checkpoint(RUN).values()) == {None} and seen


def test_a_store_that_does_not_answer_is_no_flaw_of_a_state(tmp_path, store, monkeypatch):
    train(tmp_path / "a").save_checkpoint(f"{RUN}/model.pt")

    def fail(self, *args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(Unreliable, "get_file", fail)
    for address in (f"{RUN}/model.pt", address_of(store, 0)):
        with pytest.raises(CheckpointError, match="TimeoutError: no answer"):
            verify_checkpoint(address)
    monkeypatch.setattr(Unreliable, "info", fail)
    with pytest.raises(CheckpointError, match=rf"'{RUN}' could not be read: TimeoutError"):
        verify_checkpoint(RUN)


def test_a_folder_without_states_has_no_flaws_as_a_path_or_as_an_address(tmp_path):
    assert verify_checkpoint(tmp_path) == verify_checkpoint(f"file://{tmp_path}") == {}


def test_an_address_with_nothing_or_that_nothing_knows_is_told(store):
    with pytest.raises(
        CheckpointError, match=r"'unreliable://missing' does not exist\. Pass a training state"
    ):
        verify_checkpoint("unreliable://missing")
    with pytest.raises(ConfigurationError, match=r"path is 'nowhere://run'.*pass another address"):
        verify_checkpoint("nowhere://run")


@pytest.mark.slow
def test_the_command_takes_an_address_of_a_real_server(tmp_path, monkeypatch):
    with s3_server(monkeypatch):
        train(tmp_path / "a", 2.0, 1.0, 3.0, mirror="s3://bucket/run")
        best = best_checkpoint("s3://bucket/run", "value", cache=tmp_path / "b")
        assert best == tmp_path / "b" / "update_00000008"
        found = verify_checkpoint("s3://bucket/run")
        assert len(found) == 3 and set(found.values()) == {None}
        state = next(iter(found))
        assert verify_checkpoint(state) == {state: None}
        with pytest.raises(CheckpointError, match="does not exist"):
            verify_checkpoint("s3://bucket/other")
        command = [sys.executable, "-m", "accel_core.verify"]
        finished = subprocess.run([*command, "s3://bucket/run"], capture_output=True, text=True, timeout=120)
        assert (finished.returncode, finished.stdout) == (0, "".join(f"{each}: good\n" for each in found))
        import s3fs

        s3fs.S3FileSystem().pipe_file(f"{state}/model.safetensors", b"x")
        finished = subprocess.run([*command, state], capture_output=True, text=True, timeout=120)
        assert finished.returncode == 1
        assert finished.stdout == f"{state}: is damaged: model.safetensors has another size\n"


def test_the_best_of_a_mirror_is_downloaded_once(tmp_path, store, monkeypatch):
    train(tmp_path / "a", 2.0, 1.0, 3.0)
    cache = tmp_path / "b"
    assert best_checkpoint(RUN, "value", cache=cache) == cache / "update_00000008"
    assert set(verify_checkpoint(cache).values()) == {None}
    assert best_checkpoint(RUN, "value", True, cache=cache) == cache / "update_00000012"
    assert best_checkpoint(RUN, "unheard_of", cache=cache) is None
    assert not (cache / "update_00000004").exists()

    def fail(self, *args, **kwargs):
        raise AssertionError("downloaded again")

    monkeypatch.setattr(Unreliable, "get_file", fail)
    assert best_checkpoint(RUN, "value", cache=cache) == cache / "update_00000008"
    assert best_checkpoint("unreliable://missing", "value", cache=cache) == cache / "update_00000008"
    assert best_checkpoint("unreliable://missing", cache=tmp_path / "c") is None


def test_the_best_may_stand_in_the_cache_alone(tmp_path, store):
    train(tmp_path / "a", 2.0, 1.0, 0.5)
    for path in [path for path in store.store if store.states()[-1] in path]:
        del store.store[path]
    assert best_checkpoint(RUN, "value", cache=tmp_path / "a") == tmp_path / "a" / "update_00000012"
    assert best_checkpoint(RUN, "value", cache=tmp_path / "b") == tmp_path / "b" / "update_00000008"


def test_a_best_state_that_is_damaged_here_comes_from_the_mirror_and_else_the_next_best(
    tmp_path, store, caplog
):
    train(tmp_path / "a", 2.0, 1.0, 3.0)
    best, cache = tmp_path / "a" / "update_00000008", tmp_path / "a"
    flip_last_bit(best / "optimizer.pt")
    assert best_checkpoint(RUN, "value", cache=cache) == best
    assert verify_checkpoint(best) == {best: None}
    flip_last_bit(best / "optimizer.pt")
    store.flip_last_bit(f"/run/{store.states()[1]}/optimizer.pt")
    caplog.clear()
    assert best_checkpoint(RUN, "value", cache=cache) == cache / "update_00000004"
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(told) == 2 and f"'{best}'" in told[0] and f"'{address_of(store, 1)}'" in told[1]


def test_an_older_state_of_the_mirror_replaces_no_newer_one_of_the_same_update(tmp_path, store, monkeypatch):
    # The state of the last update is saved after it, and again when the epoch is closed.
    monkeypatch.setattr(copying, "remove_state", lambda store, name: None)
    train(tmp_path / "a", 2.0, 1.0, 0.5)
    here = tmp_path / "a" / "update_00000012"
    last = name_in_mirror(here)
    assert len(store.states()) == 4 and last in store.states()
    for path in [path for path in store.store if last in path]:
        del store.store[path]
    assert best_checkpoint(RUN, "value", cache=tmp_path / "a") == here
    assert name_in_mirror(here) == last


def test_a_damaged_newer_state_gives_way_to_that_of_the_mirror_but_not_its_place(
    tmp_path, store, monkeypatch
):
    monkeypatch.setattr(copying, "remove_state", lambda store, name: None)
    train(tmp_path / "a", 1.0, 2.0, 0.5)
    here = tmp_path / "a" / "update_00000012"
    last = name_in_mirror(here)
    for path in [path for path in store.store if last in path]:
        del store.store[path]
    flip_last_bit(here / "optimizer.pt")
    # What is left of update 12 in the mirror is of the moment before the epoch was closed.
    assert latest_checkpoint(RUN, cache=tmp_path / "a") == here
    assert verify_checkpoint(here) == {here: None} and name_in_mirror(here) != last
    assert (tmp_path / "a" / "damaged_update_00000012").is_dir()


def test_what_the_cache_has_under_another_name_is_not_downloaded(tmp_path, monkeypatch):
    train(tmp_path / "a")
    newest, replaced = (tmp_path / "a" / name for name in ("update_00000012", "update_00000012.replaced"))
    newest.rename(replaced)  # A crash between two renames leaves it.
    monkeypatch.setattr(fetch, "_download", None)
    assert latest_checkpoint(RUN, cache=tmp_path / "a") == replaced


def test_a_cache_that_cannot_be_made_says_to_pass_another(tmp_path):
    train(tmp_path / "a")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"could not be made: .*Pass another folder as cache"):
        latest_checkpoint(RUN, cache=tmp_path / "file" / "cache")


def test_a_cache_of_another_run_has_no_best_state_of_this_one(tmp_path):
    train(tmp_path / "a", 2.0, 1.0, 3.0)
    train(tmp_path / "b", 2.0, 1.0, 3.0, mirror=None)
    with pytest.raises(OtherRunError, match="Pass an empty folder as cache"):
        best_checkpoint(RUN, "value", cache=tmp_path / "b")


def test_an_address_without_a_cache_is_refused_with_the_call_to_make():
    with pytest.raises(ConfigurationError, match=r"best_checkpoint\('s3://b/run', cache='checkpoints'\)"):
        best_checkpoint("s3://b/run")


def test_each_damaged_state_is_told_once(tmp_path, store, caplog):
    train(tmp_path / "a")
    for name in ("update_00000008", "update_00000012"):
        flip_last_bit(tmp_path / "a" / name / "optimizer.pt")
    for name in store.states()[1:]:
        store.flip_last_bit(f"/run/{name}/optimizer.pt")
    assert latest_checkpoint(RUN, cache=tmp_path / "a") == tmp_path / "a" / "update_00000004"
    told = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(told) == len(set(told)) == 4


def test_what_another_machine_has_downloaded_meanwhile_stays(tmp_path, store, monkeypatch):
    """On a shared disk its processes may read it already."""
    train(tmp_path / "a")
    cache = tmp_path / "b"
    path = cache / "update_00000012"
    fetch_file = fetch.fetch_file

    def slow(store, name, folder, state, relative):
        if relative == "trainer_state.json":
            shutil.copytree(tmp_path / "a" / "update_00000012", path)
            inodes.append(inode_of(path))
        return fetch_file(store, name, folder, state, relative)

    inodes = []
    monkeypatch.setattr(fetch, "fetch_file", slow)
    assert latest_checkpoint(RUN, cache=cache) == path
    assert [inode_of(path)] == inodes
