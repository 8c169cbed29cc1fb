"""The script of the README for schedulers runs as it stands there, and leaves the files that are promised beside it."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[3] / "packages/accel-integrations/README.md"
SECTION = README.read_text(encoding="utf-8").split("\n## Schedulers\n")[1].split("\n## ")[0]


def test_a_run_is_made_longer_from_where_its_decay_began(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "checkpoint_100_wsd_post_decay.pt",
        "checkpoint_189_wsd_pre_decay",  # a tenth of the 110 updates since
        "checkpoint_200_wsd_post_decay.pt",
        "checkpoint_90_wsd_pre_decay",
        "run_card.json",
    ]
