"""SaveTrainingStateCallback(mirror=...): what stands on the disk comes to stand in a store, whatever the store does."""

import json
import logging
import pickle
import shutil
import threading
import time

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import SaveTrainingStateCallback
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
from accel_core.extending import Address, OtherRunError
from accel_core.state import copying as copying_module
from accel_core.state.checkpoint import STATE_FILE
from accel_core.state.mirrored import name_in_mirror
from stores import Unreliable, s3_server

pytestmark = pytest.mark.usefixtures("store")

POINTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(POINTS, POINTS.sum(1, keepdim=True))
RUN = "unreliable://run"
SECONDS = 60
"""Longer than any of these trainings takes, on a machine with much else to do."""


class At(TrainerCallback):
    """Acts after some updates."""

    def __init__(self, **actions):
        self.actions = {int(name.removeprefix("update_")): action for name, action in actions.items()}

    def on_optimizer_step_end(self, trainer):
        action = self.actions.get(trainer.run_progress.updates_completed)
        if action is not None:
            action(trainer)


def create_trainer(*callbacks):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=1)


def saver(folder, every=4, mirror=RUN, **arguments):
    return SaveTrainingStateCallback(folder, save_every_n_updates=every, mirror=mirror, **arguments)


def train(trainer, num_epochs=2, **arguments):
    trainer.train(DATA, num_epochs, per_device_batch_size=4, **arguments)


def names(states):
    return [name.rpartition("-")[0] for name in states]


def assert_equal_weights(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_state_stands_in_the_mirror_with_the_json_last(tmp_path, store):
    mine = saver(tmp_path)
    train(create_trainer(mine))
    assert names(store.states()) == ["update_00000004", "update_00000008", "update_00000012"]
    for name in store.states():
        files = [path for path in store.written if path.startswith(f"/run/{name}/")]
        assert files[-1].endswith("trainer_state.json")
        local = tmp_path / name.rpartition("-")[0]
        assert len(files) == len(list(local.iterdir()))
        for file in local.iterdir():
            assert store.store[f"/run/{name}/{file.name}"].getvalue() == file.read_bytes()
    assert not [path for path in store.store if path.endswith(".incomplete")]
    assert not (tmp_path / ".accel_mirror").exists()
    assert json.loads(store.store["/run/newest.json"].getvalue())["name"] == store.states()[-1]


def test_a_machine_that_is_gone_is_replaced_by_another_to_the_bit(tmp_path):
    lost = At(update_8=lambda trainer: trainer.request_stop("the machine", 15))
    with pytest.raises(RunInterrupted):
        train(create_trainer(saver(tmp_path / "old", 3), lost))
    shutil.rmtree(tmp_path / "old")
    newest = latest_checkpoint(RUN, cache=tmp_path / "new")
    assert newest == tmp_path / "new" / "update_00000009"
    assert set(verify_checkpoint(tmp_path / "new").values()) == {None}
    resumed, whole = create_trainer(saver(tmp_path / "new", 3)), create_trainer()
    train(resumed, 2, resume_from=newest)
    train(whole, 2)
    assert_equal_weights(resumed, whole)
    assert resumed.run_history.to_records() == whole.run_history.to_records()


def test_without_a_state_anywhere_a_run_begins(tmp_path):
    assert latest_checkpoint(RUN, cache=tmp_path / "cache") is None


def test_rotation_in_the_mirror_comes_after_the_new_state_stands(tmp_path, store, monkeypatch):
    there = []
    remove = copying_module.remove_state
    monkeypatch.setattr(
        copying_module, "remove_state", lambda *args: (there.append(store.states()), remove(*args))
    )
    waiting = {f"update_{n}": lambda trainer: wait_until(lambda: len(store.states()) == 1) for n in (6, 10)}
    train(create_trainer(saver(tmp_path, keep_last=1), At(**waiting)))
    assert names(store.states()) == ["update_00000012"]
    assert all(len(states) == 2 for states in there) and there
    assert not [path for path in store.store if "update_00000004" in path]


def wait_until(condition):
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_the_best_stays_in_the_mirror(tmp_path, store):
    values = iter([0.3, 0.1, 0.2, 0.4])

    class Record(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.run_progress.updates_completed % 3 == 0:
                trainer.run_history.update_metric("value", next(values))

    train(
        create_trainer(saver(tmp_path, None, keep_last=1, keep_best=1, watch_metric="value"), Record()),
    )
    local = sorted(path.name for path in tmp_path.glob("update_*"))
    assert names(store.states()) == local == ["update_00000006", "update_00000012"]


def test_a_state_that_is_saved_again_replaces_that_of_its_update(tmp_path, store):
    # The state of the last update is saved after it, and again when the epoch is closed.
    train(create_trainer(saver(tmp_path, 12)))
    assert names(store.states()) == ["update_00000012"]
    assert store.states()[0] in [path.split("/")[2] for path in store.written]
    assert len({path.split("/")[2] for path in store.written if "update" in path}) == 2


def test_a_slow_store_holds_training_up_at_the_end_only(tmp_path, store):
    store.gate = threading.Event()
    store.gate.set()
    seen = []

    def look(trainer):
        seen.append(store.states())

    actions = {"update_3": lambda trainer: store.gate.clear(), "update_10": look}
    actions["update_11"] = lambda trainer: store.gate.set()
    train(create_trainer(saver(tmp_path, 2, keep_last=2), At(**actions)))
    assert len(seen[0]) <= 1
    assert names(store.states()) == ["update_00000010", "update_00000012"]


def test_a_state_that_was_removed_meanwhile_is_still_copied_whole(tmp_path, store):
    store.gate = threading.Event()
    store.gate.set()
    actions = {"update_3": lambda trainer: store.gate.clear(), "update_9": lambda trainer: store.gate.set()}
    train(
        create_trainer(saver(tmp_path, 4, keep_last=1, save_at_end=False), At(**actions)),
        max_num_train_steps=11,
    )
    assert names(store.states()) == ["update_00000008"]
    shutil.rmtree(tmp_path)
    assert latest_checkpoint(RUN, cache=tmp_path).name == "update_00000008"


@pytest.mark.parametrize("n", [2, 5, 8, 13])
def test_a_write_that_fails_is_tried_again_and_told_once(n, tmp_path, store, caplog):
    store.fails_at = {n, n + 1}
    train(create_trainer(saver(tmp_path)))
    assert names(store.states()) == ["update_00000004", "update_00000008", "update_00000012"]
    told = [record for record in caplog.records if "could not be written" in record.message]
    assert len(told) == 1 and "ConnectionError" in told[0].message
    assert set(verify_checkpoint(latest_checkpoint(RUN, cache=tmp_path / "x").parent).values()) == {None}


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, PermissionError])
def test_a_store_that_fails_for_ever_never_ends_the_run(error, tmp_path, store, caplog):
    def fail(trainer):
        store.fails_at, store.error = {None}, error

    trainer = create_trainer(saver(tmp_path, mirror_wait_seconds=0.2), At(update_2=fail))
    with pytest.warns(
        AccelWarning, match=r"After 0\.2 seconds the mirror 'unreliable://run' does not have .*12"
    ):
        train(trainer)
    assert trainer.run_progress.updates_completed == 12
    assert store.states() == []
    assert latest_checkpoint(tmp_path).name == "update_00000012"
    assert len([record for record in caplog.records if "could not be written" in record.message]) == 1
    assert not (tmp_path / ".accel_mirror").exists()


def test_a_store_that_hangs_is_waited_for_no_longer_than_wanted(tmp_path, store):
    store.gate = threading.Event()
    store.gate.set()
    with pytest.warns(AccelWarning, match="After 0.1 seconds"):
        train(
            create_trainer(
                saver(tmp_path, mirror_wait_seconds=0.1), At(update_2=lambda trainer: store.gate.clear())
            )
        )
    assert store.states() == []
    store.gate.set()
    # What was on its way ends, and nothing follows.
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "accel-mirror"])
    assert store.states() == []


def test_a_store_that_is_away_at_the_start_is_looked_into_later(tmp_path, store, caplog):
    store.fails_at = {None}

    def mend(trainer):
        store.fails_at = frozenset()

    train(create_trainer(saver(tmp_path), At(update_6=mend)))
    assert names(store.states())[-1] == "update_00000012"
    assert "Training continues" in caplog.text


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_wrong_address_is_refused_before_the_first_update(error, tmp_path, store):
    store.fails_at, store.error = {None}, error
    trainer = create_trainer(saver(tmp_path))
    with pytest.raises(
        ConfigurationError, match=rf"mirror is 'unreliable://run'.*{error.__name__}.*Correct the address"
    ):
        train(trainer)
    assert trainer.run_progress.updates_completed == 0


def test_an_address_that_nothing_knows_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigurationError, match=r"mirror is 'nowhere://run'.*nowhere.*Or pass another"):
        saver(tmp_path, mirror="nowhere://run")
    with pytest.raises(ConfigurationError, match="mirror is 5, but must be a path"):
        saver(tmp_path, mirror=5)
    with pytest.raises(ConfigurationError, match="mirror_wait_seconds is -1"):
        saver(tmp_path, mirror_wait_seconds=-1)


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    import fsspec

    def fail(protocol):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", fail)
    with pytest.raises(ConfigurationError, match=r"Install s3fs.*pip install \"accel-core\[s3\]\""):
        saver(tmp_path, mirror="s3://bucket/run")


def test_states_of_another_run_are_refused_as_in_a_folder(tmp_path, store):
    train(create_trainer(saver(tmp_path / "a")), 1)
    before = dict(store.store)
    trainer = create_trainer(saver(tmp_path / "b"))
    with pytest.raises(
        OtherRunError, match=r"The mirror 'unreliable://run' has 'update_00000004-.*another mirror"
    ):
        train(trainer)
    assert trainer.run_progress.updates_completed == 0
    assert store.store.keys() == before.keys()


def test_states_of_another_run_are_set_aside_if_that_is_wanted(tmp_path, store):
    train(create_trainer(saver(tmp_path)), 1)
    old = store.states()
    train(create_trainer(saver(tmp_path, if_other_run="set_aside")), 1)
    assert not set(old) & set(store.states()) and len(store.states()) == 2
    aside = [path for path in store.store if "/other_run_" in path and path.endswith("trainer_state.json")]
    assert [path.split("/")[3] for path in sorted(aside)] == old


def test_another_run_that_is_found_late_ends_the_run_at_the_next_save(tmp_path, store):
    train(create_trainer(saver(tmp_path / "a")), 1)
    store.fails_at = {None}

    def mend(trainer):
        store.fails_at = frozenset()
        wait_until(lambda: mine._saver.mirrored.mirror._copying.refusal is not None)

    mine = saver(tmp_path / "b")
    trainer = create_trainer(mine, At(update_6=mend))
    with pytest.raises(OtherRunError, match="another mirror"):
        train(trainer)
    assert trainer.run_progress.updates_completed == 8


def test_a_run_that_goes_on_from_an_earlier_state_is_refused(tmp_path):
    train(create_trainer(saver(tmp_path / "a")))
    shutil.rmtree(tmp_path / "a" / "update_00000012")
    shutil.rmtree(tmp_path / "a" / "update_00000008")
    with pytest.raises(OtherRunError, match=r"with 8 updates of this run, which has gone on from 4"):
        train(create_trainer(saver(tmp_path / "a")), resume_from=latest_checkpoint(tmp_path / "a"))


def damage(store, name, file="model.safetensors"):
    store.flip_last_bit(f"/run/{name}/{file}")


@pytest.mark.parametrize("way", ["flipped", "missing", "json"])
def test_a_damaged_state_in_the_mirror_is_passed_over_and_marked(way, tmp_path, store, caplog):
    train(create_trainer(saver(tmp_path / "a", keep_last=3)))
    newest = store.states()[-1]
    if way == "missing":
        del store.store[f"/run/{newest}/model.safetensors"]
    else:
        damage(store, newest, "trainer_state.json" if way == "json" else "model.safetensors")
    found = latest_checkpoint(RUN, cache=tmp_path / "b")
    assert found.name == "update_00000008" and f"{newest}' is skipped" in caplog.text
    train(create_trainer(saver(tmp_path / "b", keep_last=3)), resume_from=found)
    assert names(store.states())[-1] == "update_00000012"
    assert latest_checkpoint(RUN, cache=tmp_path / "c").name == "update_00000012"


def test_if_all_are_damaged_nothing_begins_afresh(tmp_path, store):
    train(create_trainer(saver(tmp_path / "a")), 1)
    for name in store.states():
        damage(store, name)
    with pytest.raises(CheckpointError, match=r"'unreliable://run' has 2 training states, and none.*digest"):
        latest_checkpoint(RUN, cache=tmp_path / "b")
    assert latest_checkpoint(tmp_path / "b") is None


def test_a_listing_that_lacks_the_newest_is_no_reason_to_go_on_from_an_older_one(tmp_path, store):
    train(create_trainer(saver(tmp_path / "a")))
    store.old_listing = store.states()[:1]
    assert latest_checkpoint(RUN, cache=tmp_path / "b").name == "update_00000012"
    store.old_listing = []
    assert latest_checkpoint(RUN, cache=tmp_path / "c").name == "update_00000012"


def test_a_listing_with_what_was_removed_finds_what_is_there(tmp_path, store):
    train(create_trainer(saver(tmp_path / "a", keep_last=1)))
    store.old_listing = [*store.states(), "update_00000004-00000000", "update_00000020-00000000"]
    assert latest_checkpoint(RUN, cache=tmp_path / "b").name == "update_00000012"


def test_a_store_that_does_not_answer_is_no_reason_to_begin_afresh(tmp_path, store, monkeypatch):
    def fail(self, *args, **kwargs):
        raise TimeoutError("no answer")

    monkeypatch.setattr(Unreliable, "ls", fail)
    with pytest.raises(
        CheckpointError, match=r"'unreliable://run' could not be listed.*TimeoutError: no answer"
    ):
        latest_checkpoint(RUN, cache=tmp_path / "b")


def test_what_the_cache_has_is_not_downloaded_again(tmp_path, store, monkeypatch):
    train(create_trainer(saver(tmp_path)))
    read = []
    get = Unreliable.get_file
    monkeypatch.setattr(
        Unreliable, "get_file", lambda self, *args, **kwargs: (read.append(args), get(self, *args))
    )
    assert latest_checkpoint(RUN, cache=tmp_path) == tmp_path / "update_00000012"
    # The folder may be ahead of the mirror.
    name = store.states()[-1]
    for path in [path for path in store.store if name in path]:
        del store.store[path]
    assert latest_checkpoint(RUN, cache=tmp_path) == tmp_path / "update_00000012"
    assert not read


def test_a_cache_of_another_run_is_refused(tmp_path):
    train(create_trainer(saver(tmp_path / "a")), 1)
    train(create_trainer(SaveTrainingStateCallback(tmp_path / "b")), 1)
    with pytest.raises(OtherRunError, match="Pass an empty folder as cache"):
        latest_checkpoint(RUN, cache=tmp_path / "b")


def test_an_address_without_a_cache_is_refused_with_the_call_to_make():
    with pytest.raises(ConfigurationError, match=r"latest_checkpoint\('s3://b/run', cache='checkpoints'\)"):
        latest_checkpoint("s3://b/run")


def test_a_last_state_that_was_not_copied_is_copied_when_its_run_is_resumed(tmp_path, store):
    store.fails_at = frozenset()

    def fail(trainer):
        store.fails_at = {None}

    with pytest.warns(AccelWarning, match="After 0 seconds"):
        train(create_trainer(saver(tmp_path, mirror_wait_seconds=0), At(update_9=fail)))
    store.fails_at = frozenset()
    assert "update_00000012" not in names(store.states())
    train(create_trainer(saver(tmp_path)), resume_from=latest_checkpoint(tmp_path))
    assert names(store.states())[-1] == "update_00000012"


def test_what_a_killed_run_has_left_is_removed(tmp_path, store):
    (tmp_path / ".accel_mirror" / "update_00000004-0a0a0a0a").mkdir(parents=True)
    for name in ("update_00000004-0a0a0a0a/model.safetensors", "notes/a.txt"):
        Unreliable().pipe_file(f"/run/{name}", b"x")
    train(create_trainer(saver(tmp_path)))
    assert not [path for path in store.store if "0a0a0a0a" in path]
    assert "/run/notes/a.txt" in store.store
    assert not (tmp_path / ".accel_mirror").exists()


def test_a_leftover_with_the_name_of_a_state_that_is_never_copied_is_removed(tmp_path, store):
    train(create_trainer(SaveTrainingStateCallback(tmp_path, save_every_n_updates=4)))
    paths = [tmp_path / f"update_{number:08}" for number in (4, 8, 12)]
    items = [(path, name_in_mirror(path), json.loads((path / STATE_FILE).read_text())) for path in paths]
    run_id = items[0][2]["run_id"]
    copying = copying_module.Copying(Address(RUN), run_id, False, lambda facts: sorted(facts)[:-2])
    left = items[0][1]
    Unreliable().pipe_file(f"/run/{left}/model.safetensors", b"x")
    copying.look()
    assert copying.leftovers == [left]
    # The first state waits while the second is copied, and need not be copied once there is a third.
    copying.add(*items[0])
    copying.add(*items[1])
    copying._copy(copying.pending[-1])
    copying.add(*items[2])
    copying._copy(copying.pending[-1])
    assert store.states() == [items[1][1], items[2][1]]
    assert not [path for path in store.store if left in path]


def test_a_state_may_get_the_name_of_its_own_leftover(tmp_path, store):
    lost = At(update_5=lambda trainer: trainer.request_stop("the machine", 15))
    with pytest.raises(RunInterrupted):
        train(create_trainer(saver(tmp_path, 3), lost))
    name = store.states()[-1]
    # As if it had been killed before the last file.
    del store.store[f"/run/{name}/trainer_state.json"]
    train(create_trainer(saver(tmp_path, 3)), resume_from=latest_checkpoint(tmp_path))
    assert name in store.states()
    for file in (tmp_path / "update_00000006").iterdir():
        assert f"/run/{name}/{file.name}" in store.store


def test_a_state_that_was_about_to_be_replaced_has_its_own_name_in_the_mirror(tmp_path, store):
    lost = At(update_5=lambda trainer: trainer.request_stop("the machine", 15))
    with pytest.raises(RunInterrupted):
        train(create_trainer(saver(tmp_path, 3), lost))
    before = store.states()
    # As if it had been killed between the two renames of a save to the same name.
    newest = latest_checkpoint(tmp_path)
    newest.rename(f"{newest}.replaced")
    train(create_trainer(saver(tmp_path, 3)), resume_from=latest_checkpoint(tmp_path))
    assert store.states()[: len(before)] == before
    assert not [path for path in store.store if ".replaced" in path]


def test_a_signal_and_an_error_wait_for_the_mirror(tmp_path, store):
    trainer = create_trainer(
        saver(tmp_path / "a"), At(update_5=lambda trainer: trainer.request_stop("x", 15))
    )
    with pytest.raises(RunInterrupted):
        train(trainer)
    assert names(store.states())[-1] == "update_00000006"
    Unreliable.reset()

    def fail(trainer):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        train(create_trainer(saver(tmp_path / "b"), At(update_5=fail)))
    assert names(store.states()) == ["update_00000004"]


@pytest.mark.filterwarnings("ignore:A save is due")
def test_background_saves_are_mirrored_once_they_stand(tmp_path, store):
    train(create_trainer(saver(tmp_path, in_background=True)))
    assert names(store.states()) == ["update_00000004", "update_00000008", "update_00000012"]


def test_a_folder_of_another_disk_may_be_the_mirror(tmp_path):
    mirror = tmp_path / "other" / "disk"
    train(create_trainer(saver(tmp_path / "a", mirror=mirror, keep_last=1)))
    assert latest_checkpoint(mirror).name.startswith("update_00000012-")
    assert latest_checkpoint(mirror, cache=tmp_path / "b") == tmp_path / "b" / "update_00000012"
    assert len(list(mirror.glob("update_*"))) == 1


def test_describe_tells_where_the_mirror_is(tmp_path):
    described = create_trainer(saver(tmp_path, in_background=True)).describe()
    assert "copies each state to 'unreliable://run'" in described and "in the background" in described


def test_a_saver_with_a_mirror_can_be_pickled_after_a_run(tmp_path):
    mine = saver(tmp_path)
    train(create_trainer(mine))
    assert pickle.loads(pickle.dumps(mine)).mirror == RUN


def test_no_thread_is_left(tmp_path):
    train(create_trainer(saver(tmp_path)))
    assert not [thread for thread in threading.enumerate() if thread.name == "accel-mirror"]


def test_several_processes_of_a_machine_download_once(tmp_path, monkeypatch):
    train(create_trainer(saver(tmp_path / "a")), 1)
    read, found = [], []
    get = Unreliable.get_file

    def slow(self, path, *args, **kwargs):
        read.append(path)
        time.sleep(0.02)
        return get(self, path, *args, **kwargs)

    monkeypatch.setattr(Unreliable, "get_file", slow)
    # A lock of the system counts for each opened file, so threads stand for processes here.
    ask = lambda: found.append(latest_checkpoint(RUN, cache=tmp_path / "b"))  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == [tmp_path / "b" / "update_00000006"] * 4
    assert len(read) == len(set(read))


def test_a_download_that_breaks_off_leaves_nothing_and_is_made_again(tmp_path, monkeypatch):
    train(create_trainer(saver(tmp_path / "a")), 1)
    get, left = Unreliable.get_file, [4]

    def broken(self, path, *args, **kwargs):
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt
        return get(self, path, *args, **kwargs)

    monkeypatch.setattr(Unreliable, "get_file", broken)
    with pytest.raises(KeyboardInterrupt):
        latest_checkpoint(RUN, cache=tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".accel_download"]
    assert len(list((tmp_path / "b" / ".accel_download").iterdir())) == 1
    monkeypatch.setattr(Unreliable, "get_file", get)
    assert latest_checkpoint(RUN, cache=tmp_path / "b").name == "update_00000006"


@pytest.mark.slow
def test_a_real_s3_server(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "accel_core")
    with s3_server(monkeypatch):
        lost = At(update_7=lambda trainer: trainer.request_stop("the machine", 15))
        with pytest.raises(RunInterrupted):
            train(create_trainer(saver(tmp_path / "a", 3, "s3://bucket/run", keep_last=2), lost))
        shutil.rmtree(tmp_path / "a")
        newest = latest_checkpoint("s3://bucket/run", cache=tmp_path / "b")
        assert newest.name == "update_00000008"
        resumed, whole = (
            create_trainer(saver(tmp_path / "b", 3, "s3://bucket/run", keep_last=2)),
            create_trainer(),
        )
        train(resumed, resume_from=newest)
        train(whole)
        assert_equal_weights(resumed, whole)
        import s3fs

        there = s3fs.S3FileSystem().find("bucket")
        complete = [path for path in there if path.endswith("trainer_state.json")]
        assert len(complete) == 2 and "update_00000012" in complete[1]
        assert {path.split("/")[2] for path in there if "update" in path} == {
            path.split("/")[2] for path in complete
        }
        with pytest.raises(ConfigurationError, match=r"mirror is 's3://no-such-bucket/run'.*Correct"):
            train(create_trainer(saver(tmp_path / "c", 3, "s3://no-such-bucket/run")))
        assert not s3fs.S3FileSystem().exists("no-such-bucket")
