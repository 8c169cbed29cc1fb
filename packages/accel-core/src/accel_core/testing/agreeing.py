"""Whether the processes of a script hold the same after its training."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import traceback
from pathlib import Path
from typing import Any

from ..checks.values import check_whole_number
from ..engines.trained import without_wrappers
from ..errors import ConfigurationError
from ..state.digests import digest_of_value
from ..text import counted
from .resuming import content_of

_RUNNER = "import sys\nfrom accel_core.testing.agreeing import run_script\nrun_script(*sys.argv[1:])\n"
_LAST_LINES = 30
"""Of what the processes printed, in the text of an error."""


def assert_processes_agree(script: str | Path, num_processes: int = 2, *, timeout: float = 300.0) -> None:
    """Assert that a script ends on several processes of this machine's CPU, and that they hold the same then.

    Compares the parameters, the progress, the learning rates and the history of each trainer among the
    script's global names. Where they differ, it also names the attributes of callbacks that differ.

    Args:
        script: a path that ends in `.py`, or the source itself; it trains with `Trainer`.
        num_processes: at least 2.
        timeout: in seconds, for all of it.

    Raises:
        AssertionError: a process failed, did not end in time, or holds something else than the first one.
        ConfigurationError: `num_processes` is less than 2, or the script is not there.
    """
    if check_whole_number("num_processes", num_processes, "Pass 2 or more.") < 2:
        raise ConfigurationError(
            f"num_processes is {num_processes}, but one agrees with itself. Pass 2 or more."
        )
    with tempfile.TemporaryDirectory(prefix="accel-testing-") as name:
        folder = Path(name)
        path = Path(script) if str(script).endswith(".py") else folder / "script.py"
        if path.parent == folder:
            path.write_text(textwrap.dedent(str(script)), encoding="utf-8")
        elif not path.is_file():
            raise ConfigurationError(f"script is '{script}', which is no file. Pass a path, or the source.")
        (folder / "runner.py").write_text(_RUNNER, encoding="utf-8")
        _launch([str(folder / "runner.py"), str(Path(path).absolute()), name], num_processes, folder, timeout)
        reports = [folder / f"report_{index}.json" for index in range(num_processes)]
        if missing := [index for index, report in enumerate(reports) if not report.exists()]:
            raise AssertionError(
                f"The processes {missing} left the script before its end, or did not know of each other. "
                "Let the script run to its end, without sys.exit."
            )
        _raise_if_different([json.loads(report.read_text(encoding="utf-8")) for report in reports])


def _launch(script: list[str], num_processes: int, folder: Path, timeout: float) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = f"--multi_gpu --num_processes {num_processes} --num_machines 1 --mixed_precision no"
    options += f" --dynamo_backend no --main_process_ip 127.0.0.1 --main_process_port {port}"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split(), *script]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_USE_CPU": "true"}
    output = folder / "output"
    with output.open("wb") as file:
        # A file and not a pipe, which a process that is left would keep open.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        status: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        status = None
        # The launcher ends its processes when it is told to end.
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
    if status != 0:
        # What the launcher says comes last, and hides the error of the process that failed first.
        errors = [error.read_text(encoding="utf-8") for error in sorted(folder.glob("error_*.txt"))]
        printed = output.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = errors or printed[-_LAST_LINES:]
        what = (
            f"failed with exit status {status}"
            if status is not None
            else f"did not end within {counted(timeout, 'seconds')}: one may wait for what another never does"
        )
        raise AssertionError("\n".join([f"The {num_processes} processes {what}.", *lines]))


def run_script(script: str, folder: str) -> None:
    """Run a script, and write what its trainers hold. Each process of `assert_processes_agree` calls it."""
    sys.argv = [script]
    sys.path.insert(0, str(Path(script).parent))
    index = os.environ.get("RANK", "0")
    try:
        found = runpy.run_path(script, run_name="__main__")
    except Exception:
        Path(folder, f"error_{index}.txt").write_text(
            f"Process {index}: {traceback.format_exc()}", encoding="utf-8"
        )
        raise
    trainers = {
        name: value
        for name, value in found.items()
        if "accel_core.trainer" in {cls.__module__ for cls in type(value).__mro__}
    }
    report = {name: _facts_of(trainer) for name, trainer in trainers.items()}
    Path(folder, f"report_{index}.json").write_text(json.dumps(report), encoding="utf-8")


def _facts_of(trainer: Any) -> dict[str, str]:
    facts = {
        f"the parameter {name}": digest_of_value(parameter)
        for name, parameter in without_wrappers(trainer.model).named_parameters()
    }
    progress = trainer.run_progress.state_dict()
    facts |= {f"`{name}` of run_progress": str(value) for name, value in progress.items()}
    for name in sorted(trainer.run_history.get_metric_names()):
        facts[f"the metric {name}"] = str(trainer.run_history.get_metric_values(name))
    if trainer.optimizer:
        facts["the learning rates"] = str([group["lr"] for group in trainer.optimizer.param_groups])
    for owner, callback in trainer.callbacks.named():
        for name, value in vars(callback).items():
            facts[f"the attribute `{name}` of {owner}"] = digest_of_value(content_of(value))
    return facts


def _raise_if_different(reports: list[dict[str, dict[str, str]]]) -> None:
    if not reports[0]:
        raise AssertionError(
            "The script has no trainer among its global names, so nothing can be compared. Give each trainer "
            "a global name."
        )
    for index, report in enumerate(reports[1:], start=1):
        if report.keys() != reports[0].keys():
            raise AssertionError(
                f"Process 0 has the trainers {sorted(reports[0])}, process {index} {sorted(report)}. "
                "Make the same trainers on every process."
            )
        for trainer, facts in reports[0].items():
            other = report[trainer]
            names = [name for name in {**facts, **other} if facts.get(name) != other.get(name)]
            # Callbacks may do more on the main process, so their attributes alone prove nothing.
            if any(not name.startswith("the attribute ") for name in names):
                raise AssertionError(
                    "\n- ".join([f"Processes 0 and {index} do not agree about `{trainer}`:", *names])
                )
