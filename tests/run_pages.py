"""Run all Python blocks of pages, each page in order and in a folder of its own: `python run_pages.py FOLDER PAGE...`.

One process for all pages, so that libraries are imported once. Prints a JSON object from page to what went
wrong, or null.
"""

import contextlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def run_page(page: Path, folder: Path) -> str | None:
    """Run the blocks as one module, and return the error. Line numbers are those of the page."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("error")
            # By torchdata 0.11, in the constructor of its loader, and by PEFT, in that of its model.
            warnings.filterwarnings("ignore", "'set_vital' is deprecated|`is_gradient_checkpointing` is depr")
            for block in BLOCK.finditer(text):
                lines_before = text.count("\n", 0, block.start(1))
                exec(compile("\n" * lines_before + block.group(1), page, "exec"), names)
    except BaseException:
        return traceback.format_exc()
    finally:
        # Settings of torch for the whole process, which a page may show.
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Compiling takes minutes, and changes nothing about what a page shows.
    torch.compiler.set_stance("force_eager")
    results = {
        name: run_page(Path(name), Path(sys.argv[1]) / str(number))
        for number, name in enumerate(sys.argv[2:])
    }
    print(json.dumps(results))
