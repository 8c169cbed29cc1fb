"""Compare the loop with a hand-written one, and with other libraries, and print the tables of docs/performance.md.

    hatch run bench                          ours, accelerate's, and by hand
    hatch run bench --only train --only eval
    hatch env create bench-others            once, installs the other libraries
    hatch run bench --others                 those too

Every figure is a ratio to the hand-written loop, measured in the same process in pairs back to back: the median over the
pairs, of wall time and of user and system time. All loops have to end with the same loss. Ratios of a busy machine are
wide: repeat the command rather than trust one figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

HERE = Path(__file__).parent
OTHERS_PYTHON = HERE.parent / ".venv-bench" / "bin" / "python"
OTHERS = ("pytorch-accelerated", "lightning", "transformers", "fastai", "ignite", "poutyne", "skorch")
OTHERS_WORKLOADS = ("train", "bar", "eval", "epoch", "convnet")
MODULES = {"pytorch-accelerated": "pytorch_accelerated"}
START_TARGETS = {"import": "+0.15 s", "first_forward": "+0.15 s", "peak_megabytes": "+10 MB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*WORKLOADS, "start"], help="measure this; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of chunks for each figure")
    parser.add_argument("--others", action="store_true", help="measure the other libraries too")
    arguments = parser.parse_args()
    if arguments.others and not OTHERS_PYTHON.exists():
        parser.error("--others needs the environment of the other libraries. Create it with: hatch env create bench-others")
    wanted = arguments.only or [*WORKLOADS, "start"]
    print(_versions(sys.executable, ["torch", "accelerate", "accel-core"]))
    names = [name for name in wanted if name in WORKLOADS]
    if names:
        print_ratios(names, arguments.rounds)
    if "start" in wanted:
        print_start(["accelerate", "accel"], sys.executable)
    if arguments.others:
        print("\n" + _versions(str(OTHERS_PYTHON), ["torch", "pytorch-ignite", *(name for name in OTHERS if name != "ignite")]))
        print_others([name for name in names if name in OTHERS_WORKLOADS], arguments.rounds)
        if "start" in wanted:
            print_start(list(OTHERS), str(OTHERS_PYTHON))


def print_ratios(names: list[str], rounds: int) -> None:
    """Ours, with the target beside it, and two other ways."""
    print("\n| workload | target | accel wall | accel CPU | accel best of | by hand, ms | accelerate wall | by index by hand |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        workload = WORKLOADS[name]
        ours = measure(sys.executable, name, "accel", rounds)
        accelerate = measure(sys.executable, name, "accelerate", rounds)
        by_index = measure(sys.executable, name, "raw by index", rounds) if workload.in_memory else None
        figures = (_ratio(ours, key) for key in ("ratio", "cpu_ratio", "best_ratio"))
        milliseconds = f"{ours['raw_ms']:.2f}" if "raw_ms" in ours else ""
        others = (_ratio(accelerate, "ratio"), "" if by_index is None else _ratio(by_index, "ratio"))
        _row(workload.title, f"{workload.target:.2f}", *figures, milliseconds, *others)


def print_others(names: list[str], rounds: int) -> None:
    """The other libraries and ours, all in their environment."""
    print("\n| loop, wall / CPU | " + " | ".join(WORKLOADS[name].title for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for loop in ("accel", *OTHERS):
        results = [measure(str(OTHERS_PYTHON), name, loop, rounds) for name in names]
        _row(loop, *(f"{_ratio(result, 'ratio')} / {_ratio(result, 'cpu_ratio')}" for result in results))


def print_start(loops: list[str], python: str) -> None:
    """Import, time to the first forward and memory, as differences to the hand-written loop."""
    print(f"\n| over the hand-written loop | {' | '.join(f'{name} (target {value})' for name, value in START_TARGETS.items())} |")
    print("|---|---|---|---|")
    for loop in loops:
        seconds = [_import_seconds(python, loop) for _ in range(5)]
        pairs = [(_start(python, loop), _start(python, "raw")) for _ in range(5)]
        figures = [
            statistics.median(own[name] - raw[name] for own, raw in pairs) if all(a and b for a, b in pairs) else float("nan")
            for name in ("first_forward", "peak_megabytes")
        ]
        _row(loop, f"{statistics.median(seconds):+.2f} s CPU", f"{figures[0]:+.2f} s CPU", f"{figures[1]:+.0f} MB")


def measure(python: str, workload: str, loop: str, rounds: int) -> dict[str, Any]:
    """The figures of measure.py, or what kept it from giving any."""
    command = [python]
    processes = WORKLOADS[workload].processes
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(_free_port())]
    return _run([*command, str(HERE / "measure.py"), workload, loop, str(rounds)])


def _start(python: str, loop: str) -> dict[str, Any]:
    result = _run([python, str(HERE / "start.py"), loop])
    return {} if "failed" in result else result


def _import_seconds(python: str, loop: str) -> float:
    """CPU time of the import, over that of what it stands on."""
    module = {"accel": "accel_core"}.get(loop, MODULES.get(loop, loop))
    before = "torch, accelerate" if loop == "accel" else "torch"
    code = f"import {before}, json, time; start = time.process_time(); import {module}; "
    result = _run([python, "-W", "ignore", "-c", code + "print(json.dumps({'seconds': time.process_time() - start}))"])
    return float(result.get("seconds", "nan"))


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode or not lines:
        reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{' '.join(command[1:])} failed: {reason}", file=sys.stderr)
        return {"failed": reason}
    return dict(json.loads(lines[-1]))


def _ratio(result: dict[str, Any], key: str) -> str:
    return f"{result[key]:.2f}" if key in result else "failed"


def _row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _versions(python: str, packages: list[str]) -> str:
    code = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {packages!r}}}))"
    versions = _run([python, "-c", code])
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(f"{k} {v}" for k, v in versions.items())


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
