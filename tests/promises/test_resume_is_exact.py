"""A job that is killed at random moments, and started again each time, ends with the bits of one that was never stopped.

The number of kills is chosen by the environment variable ACCEL_TEST_KILLS (see CONTRIBUTING.md).
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from accel_core import latest_checkpoint, verify_checkpoint
from stores import s3_server

JOB = Path(__file__).with_name("resume_job.py")
KILLS = int(os.environ.get("ACCEL_TEST_KILLS", "50"))
WAYS = list(itertools.product([0, 2], [1, 3]))
"""Workers of the data loader, steps an update."""
MOMENTS = [("started", 0.8), ("saving", 0.1), ("training", 0.02), ("saved", 0.03)]
"""A phase of the job and the seconds after its beginning, within which a kill comes at random; taken in turn."""
KILLS_OF_A_JOB = 8


class WarmProcess:
    """A process that has imported torch and forks for each job, so that a kill costs no import."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, settings):
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        return self.wait()

    def wait(self):
        line = self.process.stdout.readline()
        assert line, f"the warm process has ended with {self.process.wait(10)}"
        return int(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class FreshProcess:
    """A new Python for each job, as when a machine has gone down."""

    def start(self, settings):
        with (Path(settings["folder"]) / "output").open("a") as output:
            command = [sys.executable, JOB, json.dumps(settings)]
            self.process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
        return self.process.pid

    def wait(self):
        return self.process.wait(60)


@pytest.fixture(scope="module")
def warm():
    process = WarmProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def uninterrupted(warm, tmp_path_factory):
    """What each way gives that is neither killed nor ever saved."""
    results = {}

    def result_of(workers, accumulation):
        if (workers, accumulation) not in results:
            folder = tmp_path_factory.mktemp("uninterrupted")
            warm.start(settings_of(folder, workers, accumulation, is_saved=False))
            assert warm.wait() == 0, (folder / "output").read_text()
            results[workers, accumulation] = torch.load(folder / "result.pt")
        return results[workers, accumulation]

    return result_of


def settings_of(folder, workers, accumulation, is_saved=True, in_background=False, mirror=None):
    return {
        "mirror": mirror,
        "in_background": in_background,
        "folder": str(folder),
        "workers": workers,
        "accumulation": accumulation,
        "is_saved": is_saved,
        "slow_seconds": 0.002,
    }


def phases_in(folder):
    path = folder / "phases"
    return path.read_text().split() if path.exists() else []


def wait_at_random(folder, num_before, phase, longest):
    """Wait for a random moment after `phase` in the life that began after `num_before` phases."""
    give_up = time.monotonic() + 60
    # A kill before the job has started would test nothing of accel.
    while phase not in phases_in(folder)[num_before:]:
        assert time.monotonic() < give_up, (folder / "output").read_text()
        if (folder / "result.pt").exists():
            return
        time.sleep(0.001)
    time.sleep(random.uniform(0, longest))


def run_until_through(process, settings, most_kills, moments=MOMENTS, after_kill=lambda number: None):
    """Kill and start again at random until the job is through. Returns what each kill met."""
    folder = Path(settings["folder"])
    kills = Counter()
    while True:
        num_before = len(phases_in(folder))
        pid = process.start(settings)
        if sum(kills.values()) < most_kills:
            wait_at_random(folder, num_before, *moments[sum(kills.values()) % len(moments)])
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        status = process.wait()
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, (folder / "output").read_text()
        met = {"saving": "during", "saved": "after"}
        kills[met.get((phases_in(folder) or [""])[-1], "before")] += 1
        after_kill(sum(kills.values()))


def assert_same(result, expected):
    """Equality to the bit, of all that the job leaves."""
    assert result.keys() == expected.keys()
    assert result["history"] == expected["history"]
    assert result["patience"] == expected["patience"]
    assert result["scheduler"] == expected["scheduler"]
    assert torch.equal(result["random"], expected["random"])
    for name, tensor in expected["model"].items():
        assert torch.equal(result["model"][name], tensor), name
    assert result["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(result["optimizer"]["state"][index][name], value), (index, name)


def kill_and_compare(process, uninterrupted, tmp_path, kills_wanted, ways, **settings):
    """Let jobs of all `ways` be killed until there are enough kills of each class."""
    kills = Counter()
    for number in itertools.count():
        if sum(kills.values()) >= kills_wanted and number >= len(ways):
            break
        workers, accumulation = ways[number % len(ways)]
        folder = tmp_path / f"job_{number}"
        folder.mkdir()
        kills += run_until_through(
            process, settings_of(folder, workers, accumulation, **settings), KILLS_OF_A_JOB
        )
        assert_same(torch.load(folder / "result.pt"), uninterrupted(workers, accumulation))
        assert len(list((folder / "states").iterdir())) <= 3, "what crashes left was not removed"
    print(f"{sum(kills.values())} kills: {dict(kills)}")
    return kills


def test_a_job_that_is_killed_a_few_times_ends_with_the_same_bits(warm, uninterrupted, tmp_path):
    kills = kill_and_compare(warm, uninterrupted, tmp_path, kills_wanted=15, ways=[(0, 3), (2, 1)])
    assert all(kills[phase] for phase in ("before", "during", "after")), kills


def test_a_job_that_saves_in_the_background_and_is_killed_ends_with_the_same_bits(
    warm, uninterrupted, tmp_path
):
    ways = [(2, 1), (0, 3)]
    kill_and_compare(warm, uninterrupted, tmp_path, kills_wanted=15, ways=ways, in_background=True)


def test_a_job_of_new_processes_that_is_killed_ends_with_the_same_bits(uninterrupted, tmp_path):
    settings = settings_of(tmp_path, workers=0, accumulation=3)
    run_until_through(FreshProcess(), settings, most_kills=1, moments=[("saving", 0.1)])
    assert_same(torch.load(tmp_path / "result.pt"), uninterrupted(0, 3))


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
def test_a_job_that_is_killed_many_times_ends_with_the_same_bits(warm, uninterrupted, tmp_path):
    kills = kill_and_compare(warm, uninterrupted, tmp_path, KILLS, WAYS)
    assert all(kills[phase] for phase in ("before", "during", "after")), kills


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
def test_a_job_that_saves_in_the_background_and_is_killed_many_times(warm, uninterrupted, tmp_path):
    kill_and_compare(warm, uninterrupted, tmp_path, KILLS, WAYS, in_background=True)


MOMENTS_OF_A_MIRROR = [("mirroring", 0.05), ("saving", 0.1), ("mirroring", 0.2), ("training", 0.02)]


def kill_and_lose_the_machine(process, uninterrupted, tmp_path, kills_wanted, ways):
    """Kill jobs that have a mirror, and take the folder of the states away after every second kill."""
    kills, lost, half_mirrored = Counter(), 0, 0
    for number in itertools.count():
        if sum(kills.values()) >= kills_wanted and number >= len(ways):
            break
        folder = tmp_path / f"job_{number}"
        folder.mkdir()
        mirror = folder / "mirror"

        def look(kill, folder=folder, mirror=mirror):
            nonlocal lost, half_mirrored
            half_mirrored += any(
                not (each / "trainer_state.json").exists() for each in mirror.glob("update_*")
            )
            for file in mirror.glob("update_*/trainer_state.json"):
                assert verify_checkpoint(file.parent) == {file.parent: None}
            if kill % 2 == 0 and (folder / "states").exists():
                shutil.rmtree(folder / "states")
                # What only the lost machine had was not told as mirrored.
                (folder / "told").unlink(missing_ok=True)
                lost += 1

        workers, accumulation = ways[number % len(ways)]
        settings = settings_of(folder, workers, accumulation, mirror=f"file://{mirror}")
        kills += run_until_through(process, settings, KILLS_OF_A_JOB, MOMENTS_OF_A_MIRROR, look)
        assert_same(torch.load(folder / "result.pt"), uninterrupted(workers, accumulation))
        assert len(list(mirror.glob("update_*"))) <= 2, "what crashes left in the mirror was not removed"
        assert not (folder / "states" / ".accel_mirror").exists()
    print(f"{sum(kills.values())} kills, {half_mirrored} of them in a mirrored state, {lost} machines lost")
    assert half_mirrored and lost


def test_a_job_with_a_mirror_that_is_killed_and_loses_its_machine(warm, uninterrupted, tmp_path):
    kill_and_lose_the_machine(warm, uninterrupted, tmp_path, kills_wanted=8, ways=[(0, 1)])


@pytest.mark.slow
@pytest.mark.timeout(60 + 15 * KILLS)
def test_a_job_with_a_mirror_that_is_killed_many_times(warm, uninterrupted, tmp_path):
    kill_and_lose_the_machine(warm, uninterrupted, tmp_path, KILLS, WAYS)


@pytest.mark.slow
def test_a_job_with_a_mirror_on_a_server_of_s3_that_is_killed(uninterrupted, tmp_path, monkeypatch):
    with s3_server(monkeypatch):
        settings = settings_of(tmp_path, workers=0, accumulation=3, mirror="s3://bucket/run")

        def lose(kill):
            shutil.rmtree(tmp_path / "states", ignore_errors=True)
            (tmp_path / "told").unlink(missing_ok=True)

        run_until_through(FreshProcess(), settings, 3, [("mirroring", 0.2), ("mirroring", 2.0)], lose)
        assert_same(torch.load(tmp_path / "result.pt"), uninterrupted(0, 3))
        fetched = latest_checkpoint("s3://bucket/run", cache=tmp_path / "fetched")
        assert verify_checkpoint(fetched) == {fetched: None}


def test_comparing_notices_a_difference_of_one_bit(uninterrupted):
    expected = uninterrupted(0, 1)
    changed = {**expected, "model": {name: tensor.clone() for name, tensor in expected["model"].items()}}
    changed["model"]["0.bias"][0] = torch.nextafter(changed["model"]["0.bias"][0], torch.tensor(2.0))
    with pytest.raises(AssertionError, match=r"0\.bias"):
        assert_same(changed, expected)
