"""The script of the README runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_script_of_the_readme_trains_and_recognises_digits(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(script.splitlines()) <= 30
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    accuracy = float(re.search(r"accuracy: ([\d.]+)%", result.stdout.splitlines()[-1]).group(1))  # type: ignore[union-attr]
    assert accuracy >= 95


def test_the_readme_begins_with_the_two_commands() -> None:
    first_block = README.read_text().split("```")[1]
    assert first_block.strip() == "pip install hatch && hatch run demo\nhatch run test"
