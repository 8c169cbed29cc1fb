import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from accel_core.errors import CheckpointError, ConfigurationError
from accel_core.state import files
from accel_core.state.files import (
    as_plain,
    make_folder,
    read_json,
    read_object,
    read_tensors,
    remove_folder,
    rename,
    replace_file,
    write_json,
    write_object,
    write_tensors,
)
from tiny import Malicious


def is_equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(is_equal, left, right))
    return type(left) is type(right) and left == right


# ---------------------------------------------------------------------- what can be kept


def test_plain_values_come_back_with_type_and_bits(tmp_path: Path) -> None:
    value = {
        "numbers": [None, True, -(2**70), 0.1, float("inf"), 1j, "ü", b"\x00"],
        ("a", 1): (torch.arange(3), torch.tensor(0.1, dtype=torch.bfloat16)),
        2: OrderedDict(x={1, 2}),
        0.5: Counter({10: 2}),
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2, 3])],
    }
    write_object(tmp_path / "object.pt", value)
    assert is_equal(read_object(tmp_path / "object.pt"), value)


def test_numbers_of_numpy_are_kept_as_python_numbers(tmp_path: Path) -> None:
    write_object(tmp_path / "object.pt", {np.int64(3): [np.float64(0.1), np.float32(0.1), np.bool_(True)]})
    assert is_equal(read_object(tmp_path / "object.pt"), {3: [0.1, float(np.float32(0.1)), True]})


class MyModel:
    pass


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"best": {"model": MyModel()}}, "'best.model' is a "),
        ({"a": [0, {"b": np.zeros(2)}]}, "'a.1.b' is a numpy.ndarray"),
        ({"seen": defaultdict(list)}, "'seen' is a collections.defaultdict"),
        ({"path": Path("x")}, "'path' is a pathlib."),
        ({"function": len}, "'function' is a builtin_function_or_method"),
        (MyModel(), "it is a "),
    ],
)
def test_what_cannot_be_loaded_safely_is_refused_by_name(value: Any, told: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^The state of 'MyCallback' .*Keep tensors, .*state_dict\(\)"
    ) as caught:
        as_plain(value, "The state of 'MyCallback'")
    assert told in str(caught.value)


def test_a_refused_value_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'object\.pt' .*MyModel.*Keep tensors"):
        write_object(tmp_path / "object.pt", MyModel())
    assert not list(tmp_path.iterdir())


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_torch_optimizer_comes_back(name: str, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)
    weight.grad = (
        torch.full_like(weight, 0.5).to_sparse() if name == "SparseAdam" else torch.full_like(weight, 0.5)
    )
    optimizer.step(lambda: torch.tensor(1.0))
    write_object(tmp_path / "optimizer.pt", optimizer.state_dict())
    assert is_equal(read_object(tmp_path / "optimizer.pt"), optimizer.state_dict())


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 1, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 9),
    "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: np.cos(n / 9)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.StepLR(o, 1), lr_scheduler.StepLR(o, 2)], [1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 1), lr_scheduler.LinearLR(o)]
    ),
}


# SequentialLR of torch 2.6 warns of itself.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_torch_schedulers_comes_back(name: str, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    optimizer.step()
    scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
    write_object(tmp_path / "scheduler.pt", scheduler.state_dict())
    write_object(tmp_path / "optimizer.pt", optimizer.state_dict())
    before = optimizer.param_groups[0]["lr"]

    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    resumed = SCHEDULERS[name](other)
    resumed.load_state_dict(read_object(tmp_path / "scheduler.pt"))
    other.load_state_dict(read_object(tmp_path / "optimizer.pt"))
    assert other.param_groups[0]["lr"] == before
    for one, its_optimizer in ((scheduler, optimizer), (resumed, other)):
        its_optimizer.step()
        one.step(2.0) if name == "ReduceLROnPlateau" else one.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tied = {
        "a": base,
        "b": base,
        "row": base[1],
        "turned": base.t(),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(2),
    }
    write_tensors(tmp_path / "model.safetensors", tied)
    assert is_equal(read_tensors(tmp_path / "model.safetensors"), tied)


def test_writing_tensors_changes_none_of_them(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3).t())
    write_tensors(tmp_path / "model.safetensors", {"weight": weight})
    assert weight.requires_grad and not weight.is_contiguous()


def test_json_keeps_every_float_to_the_bit_and_is_indented(tmp_path: Path) -> None:
    value = {"losses": [0.1 + 0.2, 1e-300, float("inf")], "seed": 2**63}
    write_json(tmp_path / "state.json", value)
    assert read_json(tmp_path / "state.json") == value
    assert '\n  "seed"' in (tmp_path / "state.json").read_text()


# ---------------------------------------------------------------------- damaged and malicious files


READERS = {"object.pt": read_object, "model.safetensors": read_tensors, "state.json": read_json}


def write_good(folder: Path, name: str) -> Path:
    writers = {"object.pt": write_object, "model.safetensors": write_tensors, "state.json": write_json}
    writers[name](folder / name, {"key": 1.0 if name == "state.json" else torch.arange(100.0)})
    return folder / name


def malicious_pickle(marker: Path) -> bytes:
    return pickle.dumps(Malicious(marker))


def malicious_archive(marker: Path) -> bytes:
    aside = marker.with_name("aside.pt")
    torch.save({"key": Malicious(marker)}, aside)
    content = aside.read_bytes()
    aside.unlink()
    return content


def test_the_malicious_files_of_these_tests_do_run_when_trusted(tmp_path: Path) -> None:
    pickle.loads(malicious_pickle(tmp_path / "first"))
    (tmp_path / "file.pt").write_bytes(malicious_archive(tmp_path / "second"))
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "first").exists() and (tmp_path / "second").exists()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "half", "one byte short", "garbage", "pickle", "archive", "folder"]
)
def test_a_damaged_file_is_an_error_that_names_it_and_runs_nothing(
    name: str, damage: str, tmp_path: Path
) -> None:
    path, marker = write_good(tmp_path, name), tmp_path / "marker"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        damaged = {
            "empty": b"",
            "half": content[: len(content) // 2],
            "one byte short": content[:-2],
            "garbage": bytes(range(256)) * (len(content) // 256 + 1),
            "pickle": malicious_pickle(marker),
            "archive": malicious_archive(marker),
        }
        path.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match="another checkpoint") as caught:
        READERS[name](path)
    assert f"'{path}'" in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()


# ---------------------------------------------------------------------- the disk refuses


@pytest.mark.skipif(os.name == "nt", reason="the limit is one of POSIX")
@pytest.mark.parametrize("writer", ["write_object", "write_tensors", "write_json"])
def test_a_write_that_the_system_cuts_off_is_an_error_with_the_reason(writer: str, tmp_path: Path) -> None:
    script = f"""
        import resource, signal
        from pathlib import Path
        import torch
        from accel_core import CheckpointError
        from accel_core.state import files
        value = {{"a": "x" * 100_000 if "json" in "{writer}" else torch.zeros(25_000)}}
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            files.{writer}(Path({str(tmp_path / "file")!r}), value)
        except CheckpointError as error:
            raise SystemExit(0 if "File too large" in str(error) else str(error))
        raise SystemExit("nothing was noticed")
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(os.name == "nt", reason="there are no such permissions")
@pytest.mark.parametrize("name", READERS)
def test_files_can_be_read_by_whom_the_umask_lets(name: str, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    assert write_good(tmp_path, name).stat().st_mode == (tmp_path / "usual").stat().st_mode


# ---------------------------------------------------------------------- one file, replaced


KILLED_WRITER = """
    import os, signal, sys
    from pathlib import Path
    from accel_core.state.files import replace_file

    def write(staging):
        staging.write_text("half")
        print("writes", flush=True)
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.read()

    replace_file(Path(sys.argv[1]), write)
"""


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks")
def test_replace_file_cleans_up_after_a_killed_one_and_leaves_one_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WRITER), str(path)]
    assert subprocess.run([*command, "killed"], capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with subprocess.Popen(
        [*command, "alive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "writes\n"
        replace_file(path, lambda staging: write_json(staging, 1))
        assert read_json(path) == 1
        assert len(list(tmp_path.iterdir())) == 2
        other.communicate(timeout=60)
    assert other.returncode == 0
    assert path.read_text() == "half" and [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    "name", ["file.json.incomplete", "file.json.backup.incomplete", "other.json.0123456789abcdef.incomplete"]
)
def test_replace_file_leaves_files_and_folders_of_others_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    (tmp_path / f"mine.{name}").write_text("precious")
    replace_file(tmp_path / "file.json", lambda staging: write_json(staging, 1))
    assert (
        (tmp_path / name / "thesis.txt").read_text() == (tmp_path / f"mine.{name}").read_text() == "precious"
    )


def test_replace_file_makes_the_folders_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    for value in (1, 2):
        replace_file(path, lambda aside, value=value: write_json(aside, value))
        assert read_json(path) == value
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("operation", ["write_json", "sync", "rename"])
def test_replace_file_leaves_the_old_content_when_the_disk_fails(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_json(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, operation, fail)
    with pytest.raises(CheckpointError, match=r"file\.json' .*not be written.*untouched.*No space left"):
        replace_file(path, lambda aside: files.write_json(aside, "new"))
    assert read_json(path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_folders_are_made_renamed_and_removed_with_all_in_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b")
    write_json(tmp_path / "a" / "b" / "c" / "file.json", 1)
    rename(tmp_path / "a" / "b", tmp_path / "a" / "d")
    assert read_json(tmp_path / "a" / "d" / "c" / "file.json") == 1
    remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())
