"""The example of sharded models prints the same figures on one process and on two, and after a resume.

A CPU starts it without an engine that shards. What those give is tested in tests/promises/test_layout_fsdp2.py and
test_layout_zero.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launching import launch

EXAMPLE = Path(__file__).parents[2] / "examples" / "17_sharded_models.py"
ON_TWO = """
    import os, runpy, sys

    os.chdir(sys.argv[1])
    example = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_path(example, run_name="__main__")
    """

pytestmark = pytest.mark.slow


def figures(output: str) -> tuple[float, float]:
    by_trainer, by_export = (
        re.search(rf"{text}: ([\d.]+)%", output).group(1)  # type: ignore[union-attr]
        for text in ("Test accuracy", "By the export")
    )
    return float(by_trainer), float(by_export)


def test_two_processes_stop_resume_and_export_what_one_trains_at_once(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    finished = subprocess.run(
        [sys.executable, EXAMPLE], capture_output=True, text=True, timeout=120, cwd=alone
    )
    assert finished.returncode == 0, finished.stderr
    by_trainer, by_export = figures(finished.stdout)
    assert by_trainer == by_export >= 90

    half = launch(ON_TWO, processes=2, args=[together, EXAMPLE, "--epochs", "2"], timeout=150).stdout
    assert "Processes: 2, engine: MULTI_CPU" in half
    resumed = launch(ON_TWO, processes=2, args=[together, EXAMPLE, "--resume"], timeout=150).stdout
    assert resumed.count("train loss") == 2
    assert figures(resumed) == pytest.approx((by_trainer, by_export), abs=0.5)
