"""Run the tests of this folder and benchmarks/gpu.py on a GPU in one command, and write what they gave.

    python tests/gpu/run.py --out figures           with torch, accelerate, torchmetrics and pytest, nothing of the checkout installed
    ACCEL_TEST_DEVICE=cpu python tests/gpu/run.py   tries it where there is no GPU, with small models

It ends within `--minutes`, whatever hangs. `gpu.md` in the folder of `--out` has the device, each test with its outcome and
seconds, and the table of the benchmark, as far as it came. The exit status is 1 if a test failed or time ran out.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import accelerate
import torch

ROOT = Path(__file__).parents[2]
DEVICE = os.environ.get("ACCEL_TEST_DEVICE", "cuda")
SHARE_OF_TESTS = 0.6
"""Of the time; the benchmark has the rest."""


def run(command: list[str], seconds: float, output: Path) -> str | None:
    """Run a command with its output in a file, and return what went wrong, if anything did."""
    sources = [str(path) for path in sorted((ROOT / "packages").glob("*/src"))]
    path = os.pathsep.join([*sources, *filter(None, [os.environ.get("PYTHONPATH")])])
    with output.open("w") as file:
        # A session of its own, so that the processes that a test has started end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return f"was ended after {seconds:.0f} seconds"
    print(output.read_text(), flush=True)
    return None if status == 0 else f"ended with status {status}"


def rows_of(report: Path) -> list[str]:
    """Return a row for each test of a report in JUnit's form; none if there is no report."""
    if not report.exists():
        return []
    rows = []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        outcome = outcomes[0] if outcomes else "passed"
        rows.append(f"| `{case.get('name')}` | {outcome} | {float(case.get('time', 0)):.1f} |")
    return rows


def name_of_device() -> str:
    if DEVICE == "cuda" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"no GPU, {platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), help="folder for the figures")
    parser.add_argument("--minutes", type=float, default=8, help="at most, for all of it")
    parser.add_argument("--select", default="", help="as -k of pytest")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    report, begin = out / "tests.xml", time.monotonic()
    report.unlink(missing_ok=True)
    # A minute is left for what starts and ends processes.
    seconds = max(60.0, arguments.minutes * 60 - 60)
    tests = [sys.executable, "-m", "pytest", "-c", "tests/gpu/gpu.ini", "tests/gpu", f"--junitxml={report}"]
    tests += ["-k", arguments.select] if arguments.select else []
    wrong = {"The tests": run(tests, seconds * SHARE_OF_TESTS, out / "tests.txt")}
    rest = seconds - (time.monotonic() - begin)
    benchmark = [sys.executable, "benchmarks/gpu.py"]
    benchmark += ["--device", "cpu", "--tiny", "--pairs", "1"] if DEVICE == "cpu" else []
    wrong["The benchmark"] = run(benchmark, rest, out / "benchmark.txt")
    versions = f"torch {torch.__version__}, accelerate {accelerate.__version__}"
    text = [
        f"# Figures of {name_of_device()}",
        f"Python {platform.python_version()}, {versions}. {time.monotonic() - begin:.0f} seconds in all.",
        *[f"**{what} {how}.**" for what, how in wrong.items() if how is not None],
        "\n".join(["| test | outcome | seconds |", "|---|---|---|", *rows_of(report)]),
        (out / "benchmark.txt").read_text(),
    ]
    (out / "gpu.md").write_text("\n\n".join(text))
    print(f"The figures are in {out / 'gpu.md'}.")
    return int(any(how is not None for how in wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
