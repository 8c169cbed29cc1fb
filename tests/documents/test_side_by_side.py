"""The same small task with accel and with three other libraries, wherever those are installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = REPOSITORY / "examples" / "side_by_side"
PYTHONS = (Path(sys.executable), REPOSITORY / ".venv-others" / "bench" / "bin" / "python")
"""The second is the environment `bench-others`, which has all of them."""


def python_with(library):
    """An interpreter that has `library`, or skip."""
    if library == "accel" or importlib.util.find_spec(library):
        return PYTHONS[0]
    if PYTHONS[1].exists():
        return PYTHONS[1]
    pytest.skip(f"{library} is not installed: hatch env create bench-others")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["accel", "lightning", "transformers", "fastai"])
def test_each_library_recognises_the_digits(library, tmp_path):
    command = [python_with(library), "-W", "ignore", SCRIPTS / f"with_{library}.py"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert float(re.findall(r"Accuracy: ([\d.]+)", finished.stdout)[-1]) >= 0.89


def test_the_guide_shows_the_scripts_themselves():
    guide = (REPOSITORY / "docs" / "coming_from_other_libraries.md").read_text()
    shown = re.findall(r'--8<-- "examples/side_by_side/(\w+\.py)"', guide)
    assert sorted(shown) == sorted(path.name for path in SCRIPTS.glob("*.py"))
