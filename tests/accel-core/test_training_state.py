import errno
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from accel_core.errors import CheckpointError, ConfigurationError
from accel_core.run.run_progress import RunProgress
from accel_core.state import files
from accel_core.state.checkpoint import (
    STATE_FILE,
    RunState,
    is_same_state,
    library_versions,
    model_files,
    process_file,
    read_model_state,
)
from accel_core.state.folder import complete_checkpoints, open_training_state
from accel_core.state.housekeeping import check_folder_of_run, remove_checkpoint
from accel_core.state.latest import latest_checkpoint
from accel_core.state.random import capture_random_state, restore_random_state
from accel_core.state.save import save_folder
from launching import launch
from tiny import Malicious

FILES = ["model.safetensors", "model_extra.pt", "optimizer.pt", "extra.pt", "process_00000.pt"]


def run_state(updates: int, run_id: str = "run", **progress: Any) -> RunState:
    return {
        "run_id": run_id,
        "run_progress": vars(RunProgress(updates_completed=updates, **progress)),
        "run_history": {"records": []},
        "seed": 1,
        "num_samples": 10,
        "launched": {
            "num_processes": 1,
            "per_device_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "num_update_steps": None,
            "versions": library_versions(),
        },
        "callbacks": [],
    }


def save(path: Path, updates: int, run_id: str = "run", is_known: bool = True, **progress: Any) -> bool:
    """Save a state of one process, all of whose files hold the number of updates."""
    weight = torch.full((100,), float(updates))
    return save_folder(
        path,
        run_state(updates, run_id, **progress),
        lambda: {
            **model_files({"weight": weight}),
            "optimizer.pt": {"weight": weight},
            "extra.pt": {"updates": updates},
        },
        lambda: {"updates": updates},
        process_index=0,
        gather=lambda value: [value],
        is_known=is_known,
    )


def load(path: Path) -> int:
    """Read every file, and return the number of updates that all of them hold."""
    numbers = {open_training_state(path)["run_progress"]["updates_completed"]}
    numbers |= set(read_model_state(path)["weight"].tolist())
    numbers |= set(files.read_object(path / "optimizer.pt")["weight"].tolist())
    numbers |= {files.read_object(path / name)["updates"] for name in ("extra.pt", "process_00000.pt")}
    assert len(numbers) == 1
    return int(numbers.pop())


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# ---------------------------------------------------------------------- what a folder holds


def test_a_saved_folder_holds_what_was_given_and_can_be_read_by_people(tmp_path: Path) -> None:
    assert save(tmp_path / "new" / "state", 3, epochs_completed=1)
    assert load(tmp_path / "new" / "state") == 3
    assert names(tmp_path / "new") == {"state"}
    text = (tmp_path / "new" / "state" / STATE_FILE).read_text()
    state = json.loads(text)
    assert '\n  "run_id": "run"' in text
    assert state["format_version"] == 2
    assert state["run_progress"]["epochs_completed"] == 1
    assert set(state["launched"]["versions"]) == {"accel", "torch", "accelerate", "python"}
    assert state["files"] == {name: (tmp_path / "new" / "state" / name).stat().st_size for name in FILES}


class WithExtras(torch.nn.Module):
    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2)
        self.second = torch.nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
        self.norm = torch.nn.BatchNorm1d(2)
        self.seen = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]

    def _load_from_state_dict(self, state_dict: Any, prefix: Any, local_metadata: Any, *rest: Any) -> None:
        assert local_metadata["version"] == 3
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_a_model_with_tied_weights_extra_state_and_versions_comes_back(tmp_path: Path) -> None:
    model, other = WithExtras(), WithExtras()
    model.seen = 5
    contents = model_files(model.state_dict())
    files.write_tensors(tmp_path / "model.safetensors", contents["model.safetensors"])
    files.write_object(tmp_path / "model_extra.pt", contents["model_extra.pt"])
    other.load_state_dict(read_model_state(tmp_path))
    assert other.seen == 5
    assert other.second.weight is other.first.weight
    for name, value in model.state_dict().items():
        assert name == "_extra_state" or torch.equal(value.to_dense(), other.state_dict()[name].to_dense())


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_random_numbers_go_on_to_the_bit(tmp_path: Path) -> None:
    draw()
    files.write_object(tmp_path / "random.pt", capture_random_state(torch.device("cpu")))
    expected = [draw() for _ in range(700)]
    restore_random_state(files.read_object(tmp_path / "random.pt"), torch.device("cpu"))
    assert [draw() for _ in range(700)] == expected


def test_asking_for_the_random_state_draws_nothing() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2).tolist()
    torch.manual_seed(1)
    capture_random_state(torch.device("cpu"))
    assert torch.rand(2).tolist() == expected


@pytest.mark.gpu
def test_random_numbers_of_the_device_go_on_to_the_bit(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    files.write_object(tmp_path / "random.pt", capture_random_state(device))
    expected = torch.rand(5, device=device).tolist()
    restore_random_state(files.read_object(tmp_path / "random.pt"), device)
    assert torch.rand(5, device=device).tolist() == expected


# ---------------------------------------------------------------------- saving again


def test_the_same_state_is_saved_once(tmp_path: Path) -> None:
    assert save(tmp_path / "state", 3)
    before = (tmp_path / "state" / STATE_FILE).stat().st_ino
    assert not save(tmp_path / "state", 3)
    assert (tmp_path / "state" / STATE_FILE).stat().st_ino == before


@pytest.mark.parametrize("changed", ["epochs_completed", "train_epoch_completed", "eval_epoch_completed"])
def test_another_place_in_the_loop_at_the_same_update_is_another_state(changed: str, tmp_path: Path) -> None:
    save(tmp_path / "state", 3)
    assert is_same_state(tmp_path / "state", "run", vars(RunProgress(updates_completed=3)))
    assert not is_same_state(tmp_path / "state", "other", vars(RunProgress(updates_completed=3)))
    assert not is_same_state(tmp_path / "missing", "run", vars(RunProgress(updates_completed=3)))
    assert save(tmp_path / "state", 3, **{changed: type(vars(RunProgress())[changed])(1)})
    assert open_training_state(tmp_path / "state")["run_progress"][changed] == 1


def test_saving_onto_a_state_replaces_it_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for updates in (1, 2, 3):
        assert save(tmp_path / "state", updates)
        assert load(tmp_path / "state") == updates
    assert names(tmp_path) == {"state"}


def test_a_damaged_state_of_this_run_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "state", 3)
    (tmp_path / "state" / "optimizer.pt").write_bytes(b"")
    assert save(tmp_path / "state", 3)
    assert load(tmp_path / "state") == 3


def test_an_empty_folder_can_be_saved_to(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert save(tmp_path / "state", 3)
    assert load(tmp_path / "state") == 3


@pytest.mark.parametrize("content", ["notes.txt", "best_model.pt", "model.safetensors"])
def test_a_folder_of_other_files_is_never_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / content).write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine' is no folder .*empty or a new folder"):
        save(tmp_path / "mine", 3)
    assert names(tmp_path) == {"mine"} and names(tmp_path / "mine") == {content}


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine' is no folder .*empty or a new folder"):
        save(tmp_path / "mine", 3)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("is_damaged", [False, True])
def test_the_state_of_another_run_is_refused_with_both_names(is_damaged: bool, tmp_path: Path) -> None:
    save(tmp_path / "state", 3, run_id="first")
    if is_damaged:
        (tmp_path / "state" / "optimizer.pt").unlink()
    # What the first run writes at this moment.
    written = "state.0123abcd.incomplete"
    shutil.copytree(tmp_path / "state", tmp_path / written)
    with pytest.raises(CheckpointError, match=r"the run 'first'.* the run 'second'") as caught:
        save(tmp_path / "state", 4, run_id="second")
    assert "another folder" in str(caught.value) and "resume_from=" in str(caught.value)
    assert names(tmp_path) == {"state", written}
    assert (tmp_path / "state" / "process_00000.pt").exists()


def test_a_folder_with_states_of_another_run_or_of_a_later_update_is_refused(tmp_path: Path) -> None:
    check_folder_of_run(tmp_path / "missing", "second")
    save(tmp_path / "a", 5, run_id="first")
    check_folder_of_run(tmp_path, "first")
    check_folder_of_run(tmp_path, "first", updates_completed=5)
    with pytest.raises(
        CheckpointError, match=r"a' .* run 'first'.* run 'second'.*another folder.*resume_from="
    ):
        check_folder_of_run(tmp_path, "second")
    with pytest.raises(CheckpointError, match=r"a' .* 5 updates.* from 4\b.*Remove it"):
        check_folder_of_run(tmp_path, "first", updates_completed=4)


def test_leftovers_of_a_crash_are_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    shutil.copytree(tmp_path / "a", tmp_path / "b.incomplete")
    (tmp_path / "b.incomplete" / ".tmpAb12").touch()
    shutil.copytree(tmp_path / "a", tmp_path / "c.incomplete")
    shutil.copytree(tmp_path / "a", tmp_path / "a.replaced")
    save(tmp_path / "c", 2)
    assert names(tmp_path) == {"a", "c"}
    assert load(tmp_path / "c") == 2


def test_a_replaced_state_without_successor_is_kept_until_it_has_one(tmp_path: Path) -> None:
    save(tmp_path / "state", 1)
    (tmp_path / "state").rename(tmp_path / "state.replaced")
    assert latest_checkpoint(tmp_path) == tmp_path / "state.replaced"
    save(tmp_path / "other", 2)
    assert load(tmp_path / "state.replaced") == 1
    save(tmp_path / "state", 3)
    assert names(tmp_path) == {"state", "other"}


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    for name in ("download.incomplete", "old.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "film.mp4").touch()
    (tmp_path / "file.incomplete").touch()
    save(tmp_path / "state", 1)
    save(tmp_path / "download", 2)
    assert names(tmp_path) == {"state", "download", "download.incomplete", "old.replaced", "file.incomplete"}
    assert (tmp_path / "download.incomplete" / "film.mp4").exists()


def test_what_a_user_puts_into_a_state_does_not_keep_it_from_being_replaced(tmp_path: Path) -> None:
    for updates in (1, 2, 3):
        save(tmp_path / "state", updates)
        (tmp_path / "state" / "tokenizer.json").touch()
    assert names(tmp_path) == {"state"}
    assert load(tmp_path / "state") == 3


@pytest.mark.parametrize("name", ["state.incomplete", "state.replaced"])
def test_the_names_of_leftovers_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"'{name}' is a name .*another one"):
        save(tmp_path / name, 1)
    assert not names(tmp_path)


def test_a_job_that_writes_at_the_same_time_never_writes_into_the_folder_of_another(tmp_path: Path) -> None:
    """Of two jobs that go on with one run, the one that is overtaken says so, and the state is that of the other."""

    def main_files() -> dict[str, Any]:
        save(tmp_path / "state", 2)
        return {"extra.pt": {"updates": 2}}

    with pytest.raises(CheckpointError, match=r"not saved to .*state'"):
        save_folder(
            tmp_path / "state", run_state(2), main_files, dict, process_index=0, gather=lambda value: [value]
        )
    assert names(tmp_path) == {"state"}
    assert load(tmp_path / "state") == 2


def test_a_state_that_is_not_of_this_very_run_is_replaced(tmp_path: Path) -> None:
    save(tmp_path / "state", 3)
    before = (tmp_path / "state" / STATE_FILE).stat().st_ino
    assert save(tmp_path / "state", 3, is_known=False)
    assert (tmp_path / "state" / STATE_FILE).stat().st_ino != before


def test_removing_leaves_nothing_and_a_half_removed_state_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    remove_checkpoint(tmp_path / "b")
    remove_checkpoint(tmp_path / "missing")
    assert names(tmp_path) == {"a"}

    save(tmp_path / "b", 2)
    monkeypatch.setattr(files, "remove_folder", fail_with(OSError(errno.EIO, "I/O error")))
    remove_checkpoint(tmp_path / "b")
    assert latest_checkpoint(tmp_path) == tmp_path / "a"


# ---------------------------------------------------------------------- finding


def test_the_newest_state_is_the_one_with_the_most_progress(tmp_path: Path) -> None:
    places = [
        {"updates_completed": 9, "epochs_completed": 1},
        {"updates_completed": 10},
        {"updates_completed": 10, "train_epoch_completed": True},
        {"updates_completed": 10, "train_epoch_completed": True, "eval_epoch_completed": True},
        {"updates_completed": 10, "epochs_completed": 1},
        {"updates_completed": 100},
    ]
    for index in (3, 0, 5, 1, 4, 2):
        place: dict[str, Any] = dict(places[index])
        save(tmp_path / f"{9 - index}", place.pop("updates_completed"), **place)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["9", "8", "7", "6", "5", "4"]
    assert latest_checkpoint(str(tmp_path)) == tmp_path / "4"


def test_there_is_no_latest_checkpoint_where_nothing_is_complete(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "empty", tmp_path / "missing", tmp_path / "file"):
        assert latest_checkpoint(folder) is None


def test_what_is_no_checkpoint_is_passed_over_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").mkdir()
    save(tmp_path / "a", 1)
    assert latest_checkpoint(tmp_path) == tmp_path / "a"
    assert not caplog.records


DAMAGES: dict[str, Callable[[Path], object]] = {
    "incomplete": lambda path: path.rename(f"{path}.incomplete"),
    "no trainer_state.json": lambda path: (path / STATE_FILE).unlink(),
    "empty trainer_state.json": lambda path: (path / STATE_FILE).write_bytes(b""),
    "half of trainer_state.json": lambda path: (path / STATE_FILE).write_bytes(
        (path / STATE_FILE).read_bytes()[:99]
    ),
    "a list in trainer_state.json": lambda path: (path / STATE_FILE).write_text("[1]"),
    "nothing in trainer_state.json": lambda path: (path / STATE_FILE).write_text("{}"),
    "depth in trainer_state.json": lambda path: (path / STATE_FILE).write_text("[" * 100_000),
    "a pickle in trainer_state.json": lambda path: (path / STATE_FILE).write_bytes(pickle.dumps([1])),
    "text as progress": lambda path: change(path, run_progress={"updates_completed": "many"}),
    "a list of files": lambda path: change(path, files=[]),
    "an unknown format": lambda path: change(path, format_version=4),
    **{f"{name} missing": lambda path, name=name: (path / name).unlink() for name in FILES},
    **{f"{name} cut off": lambda path, name=name: os.truncate(path / name, 99) for name in FILES},
}


def change(path: Path, **changes: Any) -> None:
    """Edit trainer_state.json as a program would that wrote it itself: with its right digest."""
    state = {**json.loads((path / STATE_FILE).read_text()), **changes}
    del state["sha256"]
    files.write_json(path / STATE_FILE, state, True)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_never_chosen_and_said_to_be_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    DAMAGES[damage](tmp_path / "b")
    assert latest_checkpoint(tmp_path) == tmp_path / "a"
    assert any("b" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)
    assert {record.name for record in caplog.records} == {"accel_core"}
    shutil.rmtree(tmp_path / "a")
    if damage == "incomplete":
        assert latest_checkpoint(tmp_path) is None
        return
    with pytest.raises(
        CheckpointError,
        match=rf"{tmp_path}' has 1 .*none .*'b' .*start afresh.*(move|delete).*another folder",
    ):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_opening_a_damaged_state_says_what_is_there_and_names_a_complete_one(
    damage: str, tmp_path: Path
) -> None:
    save(tmp_path / "a", 1)
    save(tmp_path / "b", 2)
    DAMAGES[damage](tmp_path / "b")
    path = next(path for path in tmp_path.iterdir() if path.name != "a")
    with pytest.raises(CheckpointError) as caught:
        open_training_state(path)
    assert str(path) in str(caught.value)
    assert f"Did you mean '{tmp_path / 'a'}'?" in str(caught.value)
    file = next((name for name in (*FILES, STATE_FILE) if name in damage), "")
    assert file in str(caught.value)


def test_a_path_that_is_no_state_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "update_1", 1)
    save(tmp_path / "checkpoints" / "update_2", 2)
    change(tmp_path / "checkpoints" / "update_1", format_version=7)
    (tmp_path / "best.pt").touch()
    newest = f".*Did you mean '{re.escape(str(tmp_path / 'checkpoints' / 'update_2'))}'"
    told = {
        "missing": "not exist.*complete training state.*None to start afresh",
        "checkpoints": rf"no trainer_state\.json.*\['update_1', 'update_2'\]{newest}",
        "checkpoints/update_3": f"not exist{newest}",
        "checkpoints/update_1": f"format 7, not 1.*version of accel{newest}",
        "best.pt": "is a file.*folder.*load_checkpoint",
    }
    for name, words in told.items():
        with pytest.raises(CheckpointError, match=f"^'{re.escape(str(tmp_path / name))}' .*{words}"):
            open_training_state(str(tmp_path / name))


def test_asking_for_the_latest_in_a_state_itself_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "state", 1)
    assert latest_checkpoint(tmp_path / "state") is None
    assert re.search("state' is itself a training state.*resume_from", caplog.text)


# ---------------------------------------------------------------------- damaged and malicious contents


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["garbage", "pickle", "archive"])
def test_a_file_with_another_content_of_the_same_size_is_named_and_nothing_in_it_runs(
    name: str, damage: str, tmp_path: Path
) -> None:
    path, marker = tmp_path / "state", tmp_path / "marker"
    save(path, 1)
    size = (path / name).stat().st_size
    if damage == "archive":
        torch.save({"weight": Malicious(marker)}, path / name)
    else:
        (path / name).write_bytes(
            pickle.dumps(Malicious(marker)) if damage == "pickle" else b"\x00\xff" * size
        )
    change(
        path,
        files={**json.loads((path / STATE_FILE).read_text())["files"], name: (path / name).stat().st_size},
    )
    with pytest.raises(CheckpointError, match=str(path / name)):
        load(path)
    assert not marker.exists()


# ---------------------------------------------------------------------- faults at every file operation

OPERATIONS = (
    "write_object",
    "write_tensors",
    "write_json",
    "make_folder",
    "make_staging",
    "rename",
    "remove_folder",
    "sync",
)


def fail_with(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


class FaultAt:
    """Has a fault at one operation: before it, in its middle where it fills a file or empties a folder, or after it."""

    def __init__(self, number: int, when: str, fault: Callable[..., Any]) -> None:
        self.number, self.when, self.fault = number, when, fault
        self.done = 0
        self.originals = {name: getattr(files, name) for name in OPERATIONS}

    def __enter__(self) -> "FaultAt":
        for name, original in self.originals.items():
            setattr(files, name, self.wrap(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self.originals.items():
            setattr(files, name, original)

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operate(path: Path, *args: Any, **kwargs: Any) -> Any:
            self.done += 1
            if self.done != self.number:
                return original(path, *args, **kwargs)
            if self.when != "before":
                original(
                    path, *args, **kwargs
                ) if name != "remove_folder" or self.when == "after" else self.remove_half(path)
            if self.when == "during" and path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            return self.fault()

        return operate

    @staticmethod
    def remove_half(path: Path) -> None:
        entries = sorted(path.iterdir())
        for entry in entries[: len(entries) // 2]:
            entry.unlink()


def prepare_scene(scene: str, folder: Path) -> Path:
    """Put a complete state of update 1 into `folder`, and return the path for that of update 2."""
    if scene == "beside":
        save(folder / "update_1", 1)
        return folder / "update_2"
    save(folder / "state", 1)
    if scene == "after a crash":
        (folder / "state").rename(folder / "state.replaced")
        (folder / "state.0a1b2c3d.incomplete").mkdir()
        (folder / "state.0a1b2c3d.incomplete" / "model.safetensors").write_bytes(b"half")
    if scene == "onto a damaged one":
        shutil.copytree(folder / "state", folder / "state.replaced")
        (folder / "state" / "extra.pt").write_bytes(b"")
    return folder / "state"


SCENES = ("beside", "onto it", "after a crash", "onto a damaged one")


def number_of_operations(scene: str, folder: Path) -> int:
    path = prepare_scene(scene, folder)
    with FaultAt(0, "before", fail_with(AssertionError())) as counting:
        save(path, 2)
    return counting.done


def check_after_fault(path: Path, was_saved: bool, where: str) -> None:
    found = latest_checkpoint(path.parent)
    assert found is not None, where
    assert load(found) in ((2,) if was_saved else (1, 2)), where
    save(path, 3)
    assert load(path) == 3, where
    assert latest_checkpoint(path.parent) == path, where
    assert names(path.parent) <= {"update_1", "update_2", "state", "damaged_state"}, where


@pytest.fixture
def without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written outlives the process anyway; only a machine that loses its power needs the waiting."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("without_waiting_for_the_disk")
@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("scene", SCENES)
def test_an_error_at_any_operation_of_a_save_leaves_a_complete_state(
    scene: str, when: str, tmp_path: Path
) -> None:
    count = number_of_operations(scene, tmp_path / "count")
    assert count >= 10
    for number in range(1, count + 1):
        path = prepare_scene(scene, tmp_path / f"{number}")
        was_saved = False
        with FaultAt(number, when, fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))) as fault:
            try:
                was_saved = save(path, 2)
                told = ""
            except CheckpointError as error:
                told = str(error)
        assert fault.done >= number
        if not was_saved:
            assert told.startswith(f"The training state was not saved to '{path}'. Process 0: ")
            assert os.strerror(errno.ENOSPC) in told
        check_after_fault(path, was_saved, f"operation {number} of {count}")


@pytest.mark.parametrize("scene", ["beside", "onto it"])
def test_a_disk_that_stays_full_leaves_the_state_before(scene: str, tmp_path: Path) -> None:
    path = prepare_scene(scene, tmp_path)
    full = fail_with(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_object", "write_tensors", "write_json", "make_folder", "make_staging", "sync"):
            patch.setattr(files, name, full)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"not saved to .*No space left on device"):
                save(path, 2)
    assert names(tmp_path) == {"update_1" if scene == "beside" else "state"}
    check_after_fault(path, False, scene)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}, {own!r}]
    import test_training_state as tests

    os.fsync = lambda _: None
    folder, scene = Path(sys.argv[1]), sys.argv[2]
    count = tests.number_of_operations(scene, folder / "count")
    for when in ("before", "during", "after"):
        for number in range(1, count + 1):
            path = tests.prepare_scene(scene, folder / f"{{when}}-{{number}}")
            child = os.fork()
            if child == 0:
                with tests.FaultAt(number, when, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    tests.save(path, 2)
                os._exit(1)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{{when}} {{number}}: {{status}}"
    print("killed", 3 * count)
"""


@pytest.mark.usefixtures("without_waiting_for_the_disk")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(
    "scene", [*SCENES[:2], *(pytest.param(scene, marks=pytest.mark.slow) for scene in SCENES[2:])]
)
def test_a_kill_at_any_operation_of_a_save_leaves_a_complete_state(scene: str, tmp_path: Path) -> None:
    own = Path(__file__).parent
    script = textwrap.dedent(KILLED).format(tests=str(own.parent), own=str(own))
    command = [sys.executable, "-c", script, str(tmp_path), scene]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    killed = [folder for folder in tmp_path.iterdir() if folder.name != "count"]
    assert finished.stdout == f"killed {len(killed)}\n" and len(killed) >= 30
    for folder in killed:
        check_after_fault(folder / ("update_2" if scene == "beside" else "state"), False, folder.name)


def test_an_interrupt_while_saving_leaves_the_state_before(tmp_path: Path) -> None:
    save(tmp_path / "update_1", 1)
    with FaultAt(5, "before", fail_with(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt):
        save(tmp_path / "update_2", 2)
    assert latest_checkpoint(tmp_path) == tmp_path / "update_1"
    check_after_fault(tmp_path / "update_2", False, "the next save")


# ---------------------------------------------------------------------- several processes


def save_as(
    process_index: int, path: Path, main_files: Mapping[str, Any], others: list[Any], **kwargs: Any
) -> bool:
    """Save as one of several processes, the others of which answer at every phase with one of `others`."""
    return save_folder(
        path,
        run_state(2),
        lambda: main_files,
        lambda: {"updates": 2},
        process_index=process_index,
        gather=lambda value: [value, others.pop(0)] if process_index == 0 else [others.pop(0), value],
        **kwargs,
    )


WELL = ({}, None, False)


def test_the_main_process_does_not_publish_without_the_files_of_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \['process_00001\.pt'\].*several machines.*disk"):
        save_as(0, tmp_path / "state", {}, [WELL] * 6, write_engine=lambda folder: None)
    assert not names(tmp_path)


def test_a_process_without_the_folder_of_the_main_process_says_that_the_disk_has_to_be_shared(
    tmp_path: Path,
) -> None:
    others = [("state.ab12.incomplete", None, False), WELL]
    with pytest.raises(CheckpointError, match=r"Process 1: .*several machines.*disk.*share"):
        save_as(1, tmp_path / "state", {}, others, write_engine=lambda folder: None)


def test_an_engine_writes_its_files_into_the_folder_and_they_are_checked(tmp_path: Path) -> None:
    def write_engine(folder: Path) -> None:
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "0.bin").write_bytes(b"shard")

    path = tmp_path / "state"
    save_folder(
        path,
        run_state(1),
        dict,
        dict,
        process_index=0,
        gather=lambda value: [value],
        write_engine=write_engine,
    )
    assert open_training_state(path)["files"]["engine/shards/0.bin"] == 5
    (path / "engine" / "shards" / "0.bin").write_bytes(b"half")
    with pytest.raises(
        CheckpointError, match=r"damaged.*engine/shards/0\.bin .*(missing|size).*complete training state"
    ):
        open_training_state(path)


def test_what_cannot_be_kept_is_the_mistake_of_the_caller(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    with pytest.raises(ConfigurationError, match=r"not saved to .*b'.*Process 0: .*'extra\.pt' .*'f' is a "):
        save_folder(
            tmp_path / "b",
            run_state(2),
            lambda: {"extra.pt": {"f": print}},
            dict,
            process_index=0,
            gather=lambda value: [value],
        )
    assert names(tmp_path) == {"a"}


SEVERAL = """
    import sys
    from pathlib import Path
    import torch
    from accelerate import Accelerator
    from accel_core import CheckpointError, ConfigurationError
    from accel_core.processes.collectives import all_gather_object
    from accel_core.state.save import save_folder
    from accel_core.state.checkpoint import process_file
    from accel_core.state.latest import latest_checkpoint
    from accel_core.state import files
    sys.path[:0] = [{tests!r}, {own!r}]
    from test_training_state import run_state

    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    index, folder = accelerator.process_index, Path(sys.argv[1])

    def save(name, updates, main=lambda: {{"extra.pt": {{}}}}, own=lambda: {{"index": index}}, **kwargs):
        return save_folder(
            folder / name, run_state(updates), main, own, process_index=index, gather=all_gather_object, **kwargs
        )

    def fails(kind, text, *args, **kwargs):
        before = latest_checkpoint(folder)
        accelerator.wait_for_everyone()
        try:
            save(*args, **kwargs)
        except (CheckpointError, ConfigurationError) as error:
            assert type(error) is kind and text in str(error), error
        else:
            raise AssertionError(text)
        accelerator.wait_for_everyone()
        assert latest_checkpoint(folder) == before
        assert [path.name for path in folder.iterdir() if path.suffix] == []
        accelerator.wait_for_everyone()

    def on(process, error):
        def act(*_):
            if index == process:
                raise error
            return {{}}
        return act

    assert save("a", 1) and not save("a", 1)
    for i in range(2):
        assert files.read_object(folder / "a" / process_file(i)) == {{"index": i}}
    fails(CheckpointError, "Process 1: OSError: [Errno 28] full", "b", 2, own=on(1, OSError(28, "full")))
    fails(CheckpointError, "Process 0: ZeroDivisionError: oh", "b", 2, main=on(0, ZeroDivisionError("oh")))
    fails(ConfigurationError, "Process 1: The content of", "b", 2, own=lambda: {{"f": print if index else 1}})
    fails(CheckpointError, "Process 1: OSError: [Errno 5] engine", "b", 2, write_engine=on(1, OSError(5, "engine")))
    files.write_json = on(0, OSError(28, "at the end"))
    fails(CheckpointError, "Process 0: OSError: [Errno 28] at the end", "a", 2)
    print(f"process {{index}} is done")
    accelerator.end_training()
"""


def test_a_failure_on_one_process_is_the_same_error_on_all_and_leaves_nothing(tmp_path: Path) -> None:
    own = Path(__file__).parent
    script = textwrap.dedent(SEVERAL).format(tests=str(own.parent), own=str(own))
    finished = launch(script, processes=2, args=[tmp_path])
    assert "process 0 is done" in finished.stdout and "process 1 is done" in finished.stdout


def test_process_files_are_in_the_order_of_the_processes() -> None:
    assert sorted(map(process_file, range(12))) == [process_file(index) for index in range(12)]
