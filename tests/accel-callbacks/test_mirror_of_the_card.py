"""The run card stands in the mirror too, after the states that it names; and addresses that cannot be one are refused."""

import json
import shutil

import pytest

from accel_callbacks import SaveTrainingStateCallback
from accel_core import AccelWarning, ConfigurationError, latest_checkpoint
from accel_core.extending import OtherRunError
from stores import Unreliable
from tiny import tiny_data, tiny_trainer

pytestmark = pytest.mark.usefixtures("store")

RUN = "unreliable://run"
CARD = "/run/run_card.json"


def train(folder, mirror=RUN, **arguments):
    trainer = tiny_trainer(
        callbacks=[SaveTrainingStateCallback(folder, save_every_n_updates=2, mirror=mirror, **arguments)]
    )
    trainer.train(tiny_data(), 2, per_device_batch_size=8)


@pytest.mark.filterwarnings("ignore:A save is due")
@pytest.mark.parametrize("in_background", [False, True])
def test_the_last_card_stands_in_the_mirror_after_the_states(tmp_path, store, in_background):
    train(tmp_path, in_background=in_background, keep_last=2)
    card = json.loads(store.store[CARD].getvalue())
    local = json.loads((tmp_path / "run_card.json").read_text())
    assert card == local and list(card["states"]) == ["update_00000008", "update_00000010"]
    last_state = max(index for index, path in enumerate(store.written) if path.endswith("trainer_state.json"))
    assert store.written[last_state:][-1] == CARD
    shutil.rmtree(tmp_path)
    assert latest_checkpoint(RUN, cache=tmp_path).name == "update_00000010"


def test_a_card_that_fails_is_tried_again(tmp_path, store, monkeypatch):
    failed = []
    write = Unreliable.put_file

    def put_file(self, lpath, rpath, *args, **kwargs):
        if "run_card" in rpath and len(failed) < 3:
            failed.append(rpath)
            raise ConnectionError("the connection broke")
        write(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(Unreliable, "put_file", put_file)
    train(tmp_path)
    assert (
        len(failed) == 3 and json.loads(store.store[CARD].getvalue())["progress"]["updates_completed"] == 10
    )


def test_a_card_that_does_not_arrive_is_named(tmp_path, store, monkeypatch):
    write = Unreliable.put_file

    def put_file(self, lpath, rpath, *args, **kwargs):
        if "run_card" in rpath:
            raise ConnectionError("the connection broke")
        write(self, lpath, rpath, *args, **kwargs)

    monkeypatch.setattr(Unreliable, "put_file", put_file)
    with pytest.warns(AccelWarning, match=r"does not have 'run_card\.json'"):
        train(tmp_path, mirror_wait_seconds=1)
    assert CARD not in store.store and len(store.states()) == 5


def test_the_card_of_another_run_stays(tmp_path, store):
    train(tmp_path / "a")
    before = store.store[CARD].getvalue()
    with pytest.raises(OtherRunError):
        train(tmp_path / "b")
    assert store.store[CARD].getvalue() == before


@pytest.mark.parametrize("scheme", ["", "file://", "local://"])
def test_the_folder_itself_is_no_mirror(tmp_path, scheme):
    (tmp_path / "link").symlink_to(tmp_path / "states")
    with pytest.raises(ConfigurationError, match=r"^mirror is .*, which is the folder of save_dir itself"):
        SaveTrainingStateCallback(tmp_path / "states", mirror=f"{scheme}{tmp_path}/link")
    with pytest.raises(ConfigurationError, match=r"^folder is .*, which is the folder of cache itself"):
        latest_checkpoint(f"{scheme}{tmp_path}/states", cache=tmp_path / "link")


@pytest.mark.parametrize(
    ("address", "flaw"),
    [
        ("s3://", "names nothing in the store"),
        ("file:///", "names nothing in the store"),
        ("s3:/bucket/run", "one slash follows the scheme"),
    ],
)
def test_an_address_that_lacks_something_is_refused(tmp_path, address, flaw):
    with pytest.raises(ConfigurationError, match=rf"^mirror is '{address}', .*{flaw}.*'s3://bucket/run1'"):
        SaveTrainingStateCallback(tmp_path, mirror=address)
    with pytest.raises(ConfigurationError, match=rf"^folder is '{address}', .*{flaw}"):
        latest_checkpoint(address, cache=tmp_path)


def test_what_fsspec_cannot_open_or_write_is_told_before_the_training(tmp_path, monkeypatch):
    chain = "simplecache::zip://inner"
    with pytest.raises(
        ConfigurationError, match=rf"^mirror is '{chain}', .*could not be opened.*Correct the"
    ):
        train(tmp_path, chain)

    def only_read(self, *args, **kwargs):
        raise NotImplementedError("only read")

    monkeypatch.setattr(Unreliable, "put_file", only_read)
    with pytest.raises(ConfigurationError, match=r"where nothing can be written.*NotImplementedError"):
        train(tmp_path)
    assert not list(tmp_path.glob("update_*"))


def test_a_state_in_place_of_its_mirror_is_told(tmp_path, store, caplog):
    train(tmp_path / "a")
    state = f"{RUN}/{store.states()[-1]}"
    assert latest_checkpoint(state, cache=tmp_path / "b") is None
    assert f"'{state}' is itself a training state. Pass the address of the mirror" in caplog.text
