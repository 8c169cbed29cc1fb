"""Every byte of a checkpoint counts: what is damaged, mixed or exchanged is noticed by name, or has no effect.

ACCEL_TEST_DAMAGES chooses the number of trials.
"""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_core import (
    CheckpointError,
    ConfigurationError,
    Trainer,
    TrainerCallback,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.state import digests, files, publishing
from accel_core.state.digests import SMALL, digest_of_value
from accel_core.state.export import read_export, write_export
from states import STATE_FILE, edit, flip_bit, flip_last_bit, zero_sector
from tiny import ONE_CYCLE, SaveAt, tiny_data, tiny_network, weights_of

TRIALS = int(os.environ.get("ACCEL_TEST_DAMAGES", "60"))
DATA = tiny_data()


class Counter(TrainerCallback):
    """Has a state."""

    number = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.number += 1

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


def create_trainer(*callbacks: TrainerCallback, seed: int = 3) -> Trainer:
    model = torch.nn.Sequential(tiny_network(), torch.nn.BatchNorm1d(2).double(), torch.nn.Dropout(0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, torch.nn.functional.cross_entropy, optimizer, [Counter(), *callbacks], seed=seed)


def train(trainer: Trainer, num_epochs: int = 2, **kwargs: Any) -> Trainer:
    trainer.train(DATA, num_epochs, create_scheduler_fn=ONE_CYCLE, eval_dataset=DATA, **kwargs)
    return trainer


def end_of(trainer: Trainer) -> str:
    """All that a resumed run leaves, to the bit."""
    plain = [trainer.model.state_dict(), trainer.optimizer.state_dict(), trainer.scheduler.state_dict()]
    return digest_of_value(
        [*plain, trainer.run_history.to_records(), trainer.callbacks.state_dict(), torch.get_rng_state()]
    )


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two states of one run and one of another."""
    folder = tmp_path_factory.mktemp("states")
    train(create_trainer(SaveAt(4, folder / "earlier"), SaveAt(7, folder / "state")))
    train(create_trainer(SaveAt(7, folder / "other"), seed=4))
    return folder


@pytest.fixture(scope="module")
def undisturbed(states: Path) -> str:
    return end_of(train(create_trainer(), resume_from=states / "state"))


def all_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestStates:
    def test_the_json_holds_the_digest_of_every_file_and_its_own(self, states):
        content = json.loads((states / "state" / STATE_FILE).read_text())
        others = set(all_files(states / "state")) - {STATE_FILE}
        assert set(content["digests"]) == set(content["files"]) == others
        for name, digest in content["digests"].items():
            assert hashlib.sha256((states / "state" / name).read_bytes()).hexdigest() == digest
        assert re.search(r'"sha256": "[0-9a-f]{64}"\n}\n$', (states / "state" / STATE_FILE).read_text())

    def test_every_file_says_of_which_run_and_update_it_is(self, states):
        content = json.loads((states / "state" / STATE_FILE).read_text())
        for name in set(all_files(states / "state")) - {STATE_FILE, "history.jsonl"}:
            path = states / "state" / name
            if name.endswith(".pt"):
                origin = torch.load(path, weights_only=True)["accel_origin"]
            else:
                origin = json.loads(files.read_metadata(path)["accel_origin"])
            assert origin == {"run_id": content["run_id"], "update": 7}

    @pytest.mark.seconds
    def test_damage_at_random_places_is_noticed_by_name_or_has_no_effect(self, states, undisturbed, tmp_path):
        rng = random.Random(5)
        names, kinds = all_files(states / "state"), [flip_bit, zero_sector]
        noticed = 0
        for trial in range(TRIALS):
            path = tmp_path / "state"
            shutil.copytree(states / "state", path)
            name = names[trial % len(names)]
            what = kinds[trial // len(names) % 2](path / name, rng)
            trainer = create_trainer()
            try:
                train(trainer, resume_from=path)
            except CheckpointError as error:
                assert name in str(error), what  # noqa: PT017
                noticed += 1
            else:
                assert end_of(trainer) == undisturbed, what
            for left in tmp_path.iterdir():
                shutil.rmtree(left)
        # A sector may have been zeros before.
        assert noticed >= 0.9 * TRIALS

    @pytest.mark.parametrize("source", ["earlier", "other"])
    def test_no_file_of_another_state_passes_for_its_own(self, source, states, tmp_path):
        for name in all_files(states / "state"):
            path = tmp_path / name / "state"
            shutil.copytree(states / "state", path)
            shutil.copy(states / source / name, path / name)
            with pytest.raises(CheckpointError, match=r"damaged"):
                train(create_trainer(), resume_from=path)

    def test_damage_leaves_the_trainer_as_it_was_and_the_state_is_set_aside(self, states, tmp_path):
        shutil.copytree(states / "earlier", tmp_path / "update_4")
        shutil.copytree(states / "state", tmp_path / "update_7")
        flip_bit(tmp_path / "update_7" / "optimizer.pt", random.Random(0))
        trainer, fresh = create_trainer(), create_trainer()
        with pytest.raises(
            CheckpointError,
            match=r"update_7' is damaged: optimizer\.pt .*now '.*damaged_update_7'.*latest_checkpoint",
        ):
            train(trainer, resume_from=tmp_path / "update_7")
        assert all_files(tmp_path) == ["damaged_update_7", "update_4"]
        assert torch.equal(weights_of(trainer), weights_of(fresh))
        assert latest_checkpoint(tmp_path) == tmp_path / "update_4"
        with pytest.raises(CheckpointError, match=r"update_7"):
            create_trainer().load_training_state(tmp_path / "damaged_update_7")

    def test_damage_in_a_state_without_digests_is_set_aside_too(self, tmp_path):
        past = Path(__file__).parents[1] / "past" / "format_1" / "one_process" / "mid_epoch"
        shutil.copytree(past, tmp_path / "state")
        path = tmp_path / "state" / "process_00000.pt"
        path.write_bytes(bytes(path.stat().st_size))
        with pytest.raises(CheckpointError, match=r"process_00000\.pt' could not be read.*damaged_state"):
            create_trainer().load_training_state(tmp_path / "state")
        assert all_files(tmp_path) == ["damaged_state"]

    def test_what_does_not_fit_this_run_is_not_damage(self, states, tmp_path):
        shutil.copytree(states / "state", tmp_path / "state")
        model = torch.nn.Linear(5, 2).double()
        other = Trainer(
            model, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters()), [], seed=3
        )
        with pytest.raises(CheckpointError, match="another model"):
            other.train(DATA, 2, resume_from=tmp_path / "state")
        assert all_files(tmp_path) == ["state"]

    def test_an_old_state_says_that_it_cannot_be_checked(self, tmp_path, capsys, caplog):
        past = Path(__file__).parents[1] / "past" / "format_1" / "one_process" / "mid_epoch"
        with pytest.raises(CheckpointError):
            create_trainer().load_training_state(past)
        assert re.search(
            "mid_epoch' .*older version, without digests.*cannot be checked", capsys.readouterr().out
        )
        assert verify_checkpoint(past) == {past: None}
        assert re.search("mid_epoch' has no digests", caplog.text)


WRONG_VALUES = {
    "num_processes of 0": (("launched", "num_processes"), 0),
    "negative num_processes": (("launched", "num_processes"), -3),
    "a billion processes": (("launched", "num_processes"), 10**9),
    "a negative counter": (("run_progress", "epochs_completed"), -1),
    "a counter beyond all numbers": (("run_progress", "samples_completed_in_epoch"), 2**80),
    "a seed beyond all numbers": (("seed",), 2**70),
    "negative num_samples": (("num_samples",), -5),
    "a size that is text": (("files", "optimizer.pt"), "1"),
    "a path outside": (("files", "../../../etc/passwd"), 1),
    "an absolute path": (("files", "/etc/passwd"), 1),
    "a path with a zero": (("files", "a\0b"), 1),
    "a path of 5,000 letters": (("files", "a" * 5000), 1),
    "half a letter": (("files", "\ud800"), 1),
    "callbacks that are no names": (("callbacks",), [1, [2]]),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_a_value_that_no_state_has_is_a_sentence_that_names_it(wrong, states, tmp_path):
    shutil.copytree(states / "state", tmp_path / "state")
    path, value = WRONG_VALUES[wrong]
    edit(tmp_path / "state", *path, value=value)
    with pytest.raises(
        CheckpointError, match=rf"state' has a damaged {STATE_FILE}: .*{path[0] if len(path) < 2 else ''}"
    ):
        train(create_trainer(), resume_from=tmp_path / "state")
    with pytest.raises(CheckpointError, match="start afresh"):
        latest_checkpoint(tmp_path)


class TestExports:
    @pytest.mark.seconds
    @pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
    def test_damage_at_random_places_is_noticed_or_has_no_effect(self, name, tmp_path):
        trainer = train(create_trainer())
        trainer.save_checkpoint(tmp_path / name, {"note": "mine", "value": 0.5})
        whole, expected = (tmp_path / name).read_bytes(), create_trainer()
        saved = digest_of_value(expected.load_checkpoint(tmp_path / name, load_scheduler=False))
        rng, noticed = random.Random(1), 0
        for trial in range(TRIALS):
            (tmp_path / name).write_bytes(whole)
            what = [flip_bit, zero_sector][trial % 2](tmp_path / name, rng)
            other = create_trainer()
            try:
                content = other.load_checkpoint(tmp_path / name, load_scheduler=False)
            except CheckpointError as error:
                assert name in str(error), what  # noqa: PT017
                noticed += 1
            else:
                assert torch.equal(weights_of(other), weights_of(expected)), what
                content.pop("accel_origin", None)
                assert digest_of_value({key: content[key] for key in content}) == saved or len(content) > 4, (
                    what
                )
        assert noticed >= 0.4 * TRIALS

    def test_an_export_says_of_which_run_update_and_value_it_is(self, tmp_path):
        trainer = train(create_trainer())
        for name in ("model.pt", "model.safetensors"):
            trainer.save_checkpoint(tmp_path / name, {"accuracy": 0.25})
        origin = json.loads(files.read_metadata(tmp_path / "model.safetensors")["accel_origin"])
        assert (origin["run_id"], origin["update"], origin["values"]) == (
            trainer.run_id,
            10,
            {"accuracy": 0.25},
        )
        content = torch.load(tmp_path / "model.pt", weights_only=True)
        assert (content["accel_origin"]["run_id"], content["accel_origin"]["update"]) == (trainer.run_id, 10)


class TestVerify:
    def test_all_of_a_folder_is_checked_and_each_flaw_is_named(self, states, tmp_path):
        for name in ("good", "flipped", "cut", "update.0a1b2c3d.incomplete"):
            shutil.copytree(states / "state", tmp_path / name)
        flip_bit(tmp_path / "flipped" / "extra.pt", random.Random(0))
        os.truncate(tmp_path / "cut" / "model.safetensors", 50)
        trainer = train(create_trainer())
        for name in ("a.pt", "b.safetensors"):
            trainer.save_checkpoint(tmp_path / name)
        flip_last_bit(tmp_path / "b.safetensors")
        (tmp_path / "notes").mkdir()
        torch.save([1], tmp_path / "mine.pt")
        found = verify_checkpoint(tmp_path)
        assert [path.name for path, flaw in found.items() if flaw is None] == ["good", "a.pt"]
        flaws = {path.name: flaw for path, flaw in found.items() if flaw}
        assert flaws.keys() == {"flipped", "cut", "b.safetensors"}
        assert "extra.pt" in flaws["flipped"] and "model.safetensors" in flaws["cut"]
        assert verify_checkpoint(tmp_path / "good") == {tmp_path / "good": None}
        assert verify_checkpoint(tmp_path / "a.pt") == {tmp_path / "a.pt": None}

    def test_the_command_tells_each_and_fails_if_one_is_wrong(self, states, tmp_path):
        shutil.copytree(states / "state", tmp_path / "good")
        command = [sys.executable, "-m", "accel_core.verify"]
        finished = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=120)
        assert (finished.returncode, finished.stdout) == (0, f"{tmp_path / 'good'}: good\n"), finished.stderr
        flip_bit(tmp_path / "good" / "extra.pt", random.Random(0))
        finished = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=120)
        assert finished.returncode == 1 and "extra.pt" in finished.stdout
        assert subprocess.run([*command, tmp_path / "no"], capture_output=True, timeout=120).returncode == 1

    @pytest.mark.parametrize("path", ["missing", "", "a" * 5000, "a\0b", 5, None])
    def test_a_path_with_nothing_is_told(self, path, tmp_path):
        with pytest.raises((CheckpointError, ConfigurationError), match=r"Pass"):
            verify_checkpoint(tmp_path / path if path == "missing" else path)


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
]
DTYPES += [torch.float64, torch.int64, torch.float8_e5m2, torch.float8_e4m3fn]


class TestFormat:
    @settings(deadline=None, max_examples=40)
    @given(
        shapes=st.lists(
            st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6
        ),
        names=st.permutations(["a", "B", "Ö", "layers.10.weight", 'q"\n', "z"]),
    )
    def test_our_safetensors_are_those_of_safetensors_to_the_byte(self, shapes, names, tmp_path_factory):
        folder = tmp_path_factory.mktemp("format")
        tensors = {
            name: torch.randint(
                0, 255, [*shape, torch.empty(0, dtype=dtype).element_size()], dtype=torch.uint8
            )
            .view(dtype if dtype != torch.bool else torch.uint8)[..., 0]
            .to(dtype)
            .contiguous()
            for name, (dtype, shape) in zip(names, shapes, strict=False)
        }
        files.write_tensors(folder / "ours", tensors)
        safetensors.torch.save_file(tensors, folder / "theirs", {"format": "pt"})
        assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()

    @pytest.mark.parametrize("size", [10, SMALL, 3 * SMALL + 1])
    def test_the_digest_is_that_of_the_file_whichever_thread_computes_it(self, size, tmp_path):
        value = {"a": torch.arange(size), "b": torch.ones(size).to_sparse(), "c": b"x" * size}
        for name, written in {
            "object.pt": files.write_object(tmp_path / "object.pt", value),
            "t.safetensors": files.write_tensors(tmp_path / "t.safetensors", {"a": value["a"]}),
            "lines.jsonl": files.write_bytes(tmp_path / "lines.jsonl", value["c"]),
        }.items():
            content = (tmp_path / name).read_bytes()
            assert written.written == (len(content), hashlib.sha256(content).hexdigest())

    @pytest.mark.parametrize("beside", [True, False])
    def test_a_file_of_many_pieces_has_its_digest_and_a_second_thread_only_where_one_may_hash(
        self, beside, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(digests, "PIECE", SMALL)
        started = []
        start = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self.name), start(self)))
        content = torch.arange(SMALL, dtype=torch.int32).numpy().tobytes() + b"end"
        written = []

        def write() -> None:
            digests.hashes_beside.set(beside)
            written.append(files.write_bytes(tmp_path / "file", content).written)

        writer = threading.Thread(target=write, name="writer")
        writer.start()
        writer.join()
        assert (tmp_path / "file").read_bytes() == content
        assert written == [(len(content), hashlib.sha256(content).hexdigest())]
        assert [name.partition("_")[0] for name in started] == ["writer", *["accel-digest"] * beside]

    @settings(deadline=None, max_examples=60)
    @given(
        sizes=st.lists(st.integers(0, 200), max_size=12),
        kept=st.sets(st.integers(0, 11)),
        beside=st.booleans(),
    )
    def test_what_is_kept_and_what_changes_at_once_have_one_digest(
        self, sizes, kept, beside, tmp_path_factory
    ):
        path = tmp_path_factory.mktemp("kept") / "file"
        tensors = [torch.randint(0, 255, [size], dtype=torch.uint8) for size in sizes]
        content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
        stay = [tensor.untyped_storage() for index, tensor in enumerate(tensors) if index in kept]
        token = digests.hashes_beside.set(beside)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digests, "SMALL", 50)
            patch.setattr(digests, "PIECE", 70)
            with files.create(path, stay) as file:
                for index, tensor in enumerate(tensors):
                    file.write(tensor.numpy())
                    if index not in kept:
                        tensor.zero_()
        digests.hashes_beside.reset(token)
        assert path.read_bytes() == content
        assert file.written == (len(content), hashlib.sha256(content).hexdigest())

    def test_the_disk_takes_a_file_while_the_one_before_is_hashed(self, tmp_path, monkeypatch):
        are_written, sha256 = threading.Event(), hashlib.sha256

        class Slow:
            def __init__(self):
                self.inner = sha256()

            def update(self, data):
                if threading.current_thread() is not threading.main_thread():
                    assert are_written.wait(30), "A file waits for the digest of the one before."
                self.inner.update(data)

            def hexdigest(self):
                return self.inner.hexdigest()

        sync = files.sync

        def sync_and_tell(path):
            sync(path)
            if path.name == "b.safetensors":
                are_written.set()

        monkeypatch.setattr(digests.hashlib, "sha256", Slow)
        monkeypatch.setattr(files, "sync", sync_and_tell)
        tensors = {name: torch.randn(SMALL) for name in ("one", "two", "three")}
        contents = {"a.pt": {"state": {0: tensors}}, "b.safetensors": tensors}
        written = publishing.write_contents(tmp_path, contents, {"run_id": "r", "update": 1})
        monkeypatch.undo()
        for name in contents:
            content = (tmp_path / name).read_bytes()
            assert written[name] == (len(content), hashlib.sha256(content).hexdigest())

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
    def test_the_system_is_asked_to_give_back_the_memory_of_all_that_was_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(digests, "PIECE", SMALL)
        asked = []
        monkeypatch.setattr(os, "posix_fadvise", lambda _, *range_and_advice: asked.append(range_and_advice))
        monkeypatch.setattr(digests, "_WINDOW", 2 * SMALL)
        files.write_bytes(tmp_path / "file", bytes(4 * SMALL + 1))
        # Each piece twice: the disk begins with it, and has it when the next one is written.
        ranges = [(0, 1), (0, 2), (1, 2), (2, 2)]
        assert asked == [(begin * SMALL, length * SMALL, os.POSIX_FADV_DONTNEED) for begin, length in ranges]

    def test_the_digest_of_a_value_is_that_of_what_comes_back(self, tmp_path):
        value = {
            "tensors": [
                torch.ones(2, 3).t(),
                torch.eye(3).to_sparse(),
                torch.tensor(1j),
            ],
            "more": (
                torch.tensor(float("nan")),
                torch.zeros(0, dtype=torch.bfloat16),
                torch.float16,
                torch.Size([2]),
            ),
            2: {"set": {1.5, "a"}, "none": None, "text": "ü\n", "bytes": b"\0"},
        }
        files.write_object(tmp_path / "object.pt", value)
        assert digest_of_value(files.read_object(tmp_path / "object.pt")) == digest_of_value(value)

    @settings(deadline=None, max_examples=60)
    @given(st.binary(min_size=1, max_size=200), st.data())
    def test_a_seal_notices_any_change(self, text, data):
        document = b'{"a": "' + text.hex().encode() + b'",\n  "sha256": "' + b"0" * 64 + b'"\n}\n'
        sealed = files.sealed(document)
        assert files.is_sealed(sealed) and files.sealed(sealed) == sealed
        place, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
        changed = bytearray(sealed)
        changed[place] ^= 1 << bit
        assert not files.is_sealed(bytes(changed))


class TestPaths:
    @pytest.mark.parametrize("path", ["", 5, None, "a" * 5000, "a\0b"])
    def test_a_path_that_is_none_is_a_sentence(self, path):
        trainer = train(create_trainer())
        for method in (trainer.save_checkpoint, trainer.load_checkpoint, trainer.save_training_state):
            with pytest.raises(ConfigurationError, match=r"path|dir"):
                method(path)
        with pytest.raises((ConfigurationError, CheckpointError), match=r"(?i)pass|use"):
            trainer.load_training_state(path)
        if path is not None:
            with pytest.raises((ConfigurationError, CheckpointError), match=r"resume_from|not exist"):
                train(create_trainer(), resume_from=path)
            with pytest.raises((ConfigurationError, CheckpointError)):
                latest_checkpoint(path)


class Counts(torch.Tensor):
    """A class of tensors that torch reads only if it is told to."""


def test_what_torch_can_read_safely_can_be_saved(tmp_path):
    value = {"state": torch.zeros(2).as_subclass(Counts)}
    with pytest.raises(ConfigurationError, match=r"'state' is a .*Counts.*Keep tensors"):
        files.write_object(tmp_path / "object.pt", value)
    known = [Counts, torch._tensor._rebuild_from_type_v2]
    with torch.serialization.safe_globals(known):
        files.write_object(tmp_path / "object.pt", value)
        assert type(files.read_object(tmp_path / "object.pt")["state"]) is Counts


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_an_export_hashes_each_byte_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"weight": torch.randn(100_000)}
    sha256, num_bytes = hashlib.sha256, 0

    class Counting:
        def __init__(self) -> None:
            self.inner = sha256()
            self.hexdigest = self.inner.hexdigest

        def update(self, data: Any) -> None:
            nonlocal num_bytes
            num_bytes += memoryview(data).nbytes
            self.inner.update(data)

    monkeypatch.setattr(digests.hashlib, "sha256", Counting)
    write_export(tmp_path / name, {"model_state_dict": weights})
    assert 400_000 <= num_bytes < 401_000
    torch.testing.assert_close(read_export(tmp_path / name)["model_state_dict"], weights, rtol=0, atol=0)


def test_what_has_a_digest_has_no_checksums_of_torch_beside_it(tmp_path: Path) -> None:
    value = {"weight": torch.randn(1000)}
    files.write_object(tmp_path / "state.pt", value)
    write_export(tmp_path / "export.pt", {"model_state_dict": value})
    # Nothing but torch reads the files of a state, while exports are for everybody.
    assert zipfile.ZipFile(tmp_path / "state.pt").testzip() is not None
    assert zipfile.ZipFile(tmp_path / "export.pt").testzip() is None
    torch.testing.assert_close(torch.load(tmp_path / "state.pt"), value, rtol=0, atol=0)
    assert torch.serialization.get_crc32_options()


def test_the_checksums_of_torch_come_back_after_a_save_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError):
        files.write_object(tmp_path / "state.pt", {"a": object()})
    with pytest.raises(CheckpointError):
        files.write_object(tmp_path / "no_folder" / "state.pt", {"a": 1})
    assert torch.serialization.get_crc32_options()
