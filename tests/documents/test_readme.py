"""The script of the README runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_script_of_the_readme_trains_and_recognises_digits(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(script.splitlines()) <= 30
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    accuracy = float(re.search(r"accuracy: ([\d.]+)%", result.stdout.splitlines()[-1]).group(1))  # type: ignore[union-attr]
    assert accuracy >= 95


def test_the_readme_begins_with_the_two_commands() -> None:
    first_block = README.read_text().split("```")[1]
    assert first_block.strip() == "pip install hatch && hatch run demo\nhatch run test"


def test_the_times_of_the_comparison_are_those_that_were_measured() -> None:
    """In the order of the README's columns; those of the page are wall / CPU."""
    libraries = ("accel", "pytorch-accelerated", "lightning", "transformers", "accelerate")
    page = (README.parent / "docs" / "performance.md").read_text()
    rows = {
        name: re.findall(rf"^\| {name} \|(.* / .*)\|$", page, flags=re.MULTILINE)[0].split("|")
        for name in libraries
    }
    for words, column in (
        ("of a small MLP", 0),
        ("of a convnet", 4),
        ("one training and one evaluation step", 3),
    ):
        measured = [rows[name][column].split("/")[0].strip() for name in libraries]
        (line,) = [line for line in README.read_text().splitlines() if words in line and line.startswith("|")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == measured
