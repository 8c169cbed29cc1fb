"""What `hatch run gpu` does around the tests and the benchmark: ends what hangs, and writes what there is."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launching import is_alive

COMMAND = runpy.run_path(str(Path(__file__).parent / "gpu" / "run.py"))
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""
REPORT = """
<testsuites><testsuite>
  <testcase name="test_one[a]" time="1.25" />
  <testcase name="test_two" time="0.5"><failure message="no" /></testcase>
  <testcase name="test_three" time="0"><skipped message="needs a GPU" /></testcase>
</testsuite></testsuites>
"""


@pytest.mark.seconds
def test_what_hangs_is_ended_with_its_children_and_its_output_is_kept(tmp_path):
    begin = time.monotonic()
    wrong = COMMAND["run"]([sys.executable, "-c", HANGS], 5.0, tmp_path / "output")
    assert wrong == "was ended after 5 seconds" and time.monotonic() - begin < 60
    word, number = (tmp_path / "output").read_text().split()
    assert word == "child"
    for _ in range(500):
        if not psutil.pid_exists(int(number)) or not is_alive(psutil.Process(int(number))):
            break
        time.sleep(0.01)
    else:
        raise AssertionError(f"the child {number} lives on")


def test_the_exit_status_of_a_part_is_told(tmp_path, capsys):
    told = COMMAND["run"](
        [sys.executable, "-c", "print('so far'); raise SystemExit(3)"], 60.0, tmp_path / "o"
    )
    assert told == "ended with status 3" and "so far" in capsys.readouterr().out
    assert COMMAND["run"]([sys.executable, "-c", "pass"], 60.0, tmp_path / "o") is None


def test_each_test_has_a_row_with_outcome_and_seconds(tmp_path):
    report = tmp_path / "tests.xml"
    assert COMMAND["rows_of"](report) == []
    report.write_text(REPORT)
    assert COMMAND["rows_of"](report) == [
        "| `test_one[a]` | passed | 1.2 |",
        "| `test_two` | failure | 0.5 |",
        "| `test_three` | skipped | 0.0 |",
    ]


@pytest.mark.slow
def test_without_a_gpu_everything_is_skipped_and_says_so(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "ACCEL_TEST_DEVICE"}
    command = [sys.executable, Path(__file__).parent / "gpu" / "run.py", "--out", tmp_path]
    finished = subprocess.run(
        command,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "needs a CUDA GPU, and torch sees none" in finished.stdout
    figures = (tmp_path / "gpu.md").read_text()
    rows = [line for line in figures.splitlines() if line.startswith("| `test_")]
    assert len(rows) > 15 and all("| skipped |" in row for row in rows)
    assert figures.startswith("# Figures of no GPU") and "Skipped: torch sees no GPU" in figures
