"""Compare the loop with a hand-written one, and with other libraries, and print the tables of docs/performance.md.

    hatch run bench                          ours, accelerate's, and by hand
    hatch run bench --only train --only eval
    hatch run bench --only real              a ResNet, a GPT and a BERT in all libraries; needs the next line
    hatch env create bench-others            once, installs the other libraries
    hatch run bench --others                 those too
    hatch run bench --correctness            whether the weights are those of the loop by hand, instead of the time
    hatch run bench --tables                 measure nothing, print what was measured last

Every figure is a ratio to the hand-written loop, measured in the same process in pairs back to back: the
median over the pairs, of wall time and of user and system time. All loops have to end with the same loss.
Ratios of a busy machine are wide: repeat the command rather than trust one figure. What was measured is kept in
figures.json beside this file, each figure with the versions that gave it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import correctness
import real_work
from workloads import WORKLOADS, Workload

HERE = Path(__file__).parent
FIGURES = HERE / "figures.json"
OTHERS_PYTHON = HERE.parent / ".venv-others" / "bench" / "bin" / "python"
OTHERS = ("pytorch-accelerated", "lightning", "transformers", "fastai", "ignite", "poutyne", "skorch")
OTHERS_WORKLOADS = ("train", "bar", "eval", "epoch", "convnet")
CORRECT = 1e-4
"""Relative difference of the weights up to which they count as equal: sums of float32 differ by their order."""
MODULES = {"accel": "accel_core", "pytorch-accelerated": "pytorch_accelerated"}
START_TARGETS = {"import": "+0.15 s", "first_forward": "+0.15 s", "peak_megabytes": "+10 MB"}
SAVE_TARGETS = {
    "digests, a core free, %": "10",
    "digests, no core free, %": "25",
    **{
        f"{size} MB in the background, {name}": target
        for size in (50, 500)
        for name, target in (
            ("stall, % of a blocking save", "15"),
            ("update beside the writing, % of one without", "105"),
        )
    },
}
ROUNDS_OF_REAL_WORK = 3
SAME_LOSS = 0.01
"""Relative difference of losses up to which libraries have done the same work."""
OWN_PACKAGES = ["torch", "accelerate", "accel-core"]
CORRECTNESS_PACKAGES = ["torch", "accelerate", "pytorch-accelerated", "lightning", "transformers"]
OTHERS_PACKAGES = ["torch", "pytorch-ignite", *(name for name in OTHERS if name != "ignite")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    only = [*WORKLOADS, "start", "long", "saves", "reading", "real"]
    parser.add_argument("--only", action="append", choices=only, help="measure this; may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of chunks for each figure")
    parser.add_argument("--others", action="store_true", help="measure the other libraries too")
    parser.add_argument(
        "--others-only", action="append", choices=OTHERS, help="measure this library only; may be repeated"
    )
    parser.add_argument(
        "--correctness", action="store_true", help="compare the weights after an epoch, with all libraries"
    )
    parser.add_argument("--tables", action="store_true", help="print the tables of what was measured last")
    arguments = parser.parse_args()
    wanted = [] if arguments.tables else arguments.only or only
    others = arguments.others_only or (OTHERS if arguments.others else ())
    if others and not OTHERS_PYTHON.exists():
        parser.error(
            "--others needs the environment of the other libraries. Create it with: hatch env create "
            "bench-others"
        )
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if arguments.correctness:
        if not OTHERS_PYTHON.exists():
            parser.error(
                "--correctness needs the other libraries. Create their environment with: hatch env create "
                "bench-others"
            )
        compare_weights(figures)
        print_correctness(figures)
        return
    if not arguments.others_only:
        measure_ours(figures, wanted, arguments.rounds)
    measure_others(figures, wanted, others, arguments.rounds)
    print_tables(figures)


def measure_ours(figures: dict[str, Any], wanted: list[str], rounds: int) -> None:
    """Measure what is wanted of our own loop, of a plain one of accelerate, and of one by hand that fetches by index."""
    if wanted:
        keep(figures, "versions", "ours", _versions(sys.executable, OWN_PACKAGES))
    for name in wanted:
        if name == "long":
            keep(
                figures,
                "long",
                "accel",
                _run([sys.executable, str(HERE / "long_run.py"), "100000", "1000000"]),
            )
        elif name == "saves":
            keep(figures, "saves", "accel", _run([sys.executable, str(HERE / "saves.py"), "500", "1000"]))
        elif name == "reading":
            keep(
                figures, "reading", "accel", _run([sys.executable, str(HERE / "reading.py"), "2048", "2000"])
            )
        elif name == "real":
            measure_real_work(figures, min(rounds, ROUNDS_OF_REAL_WORK))
        elif name == "start":
            for loop in ("accelerate", "accel"):
                keep(figures, "start", loop, measure_start(loop, sys.executable))
        else:
            for loop in _own_loops(WORKLOADS[name]):
                keep(figures, name, loop, measure(sys.executable, name, loop, rounds))


def measure_real_work(figures: dict[str, Any], rounds: int) -> None:
    """Measure real work with all libraries in turn, each in the environment that has it: medians of the rounds."""
    libraries: list[str] = [*real_work.OWN]
    if OTHERS_PYTHON.exists():
        libraries = list(real_work.LIBRARIES)
        keep(figures, "versions", "real work, others", _versions(str(OTHERS_PYTHON), OTHERS_PACKAGES))
    keep(figures, "real work", "date", datetime.date.today().isoformat())
    for name in real_work.TASKS:
        results: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
        for _ in range(rounds):
            for library in results:
                python = sys.executable if library in real_work.OWN else str(OTHERS_PYTHON)
                results[library].append(
                    _run([python, "-W", "ignore", str(HERE / "real_work.py"), name, library])
                )
        for library, found in results.items():
            keep(figures, f"real work, {name}", library, _median_of(found))
        losses = [found["loss"] for found in figures[f"real work, {name}"].values() if "loss" in found]
        if max(losses, default=1) > min(losses, default=1) * (1 + SAME_LOSS):
            raise RuntimeError(f"The libraries did not do the same work: their losses are {losses}.")


def _median_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    failed = next((result for result in results if "failed" in result), None)
    return failed or {key: statistics.median(result[key] for result in results) for key in results[0]}


def measure_others(figures: dict[str, Any], wanted: list[str], others: tuple[str, ...], rounds: int) -> None:
    """Measure what is wanted of other libraries, in their environment."""
    if wanted and others:
        keep(figures, "versions", "others", _versions(str(OTHERS_PYTHON), OTHERS_PACKAGES))
    for loop in others:
        for name in wanted:
            if name == "start":
                keep(figures, "start", loop, measure_start(loop, str(OTHERS_PYTHON)))
            elif name in OTHERS_WORKLOADS:
                keep(figures, name, loop, measure(str(OTHERS_PYTHON), name, loop, rounds))


def compare_weights(figures: dict[str, Any]) -> None:
    """Train an epoch with each library in its environment, and compare the weights with those of the loop by hand."""
    keep(figures, "versions", "correctness, ours", _versions(sys.executable, OWN_PACKAGES))
    keep(figures, "versions", "correctness, others", _versions(str(OTHERS_PYTHON), CORRECTNESS_PACKAGES))
    keep(figures, "correctness", "date", datetime.date.today().isoformat())
    for library in correctness.LIBRARIES:
        python = sys.executable if library in ("accel", "accelerate") else str(OTHERS_PYTHON)
        for name in correctness.cases_of(library):
            script = [str(HERE / "correctness.py"), library, name]
            result = _run([*_launcher(python, correctness.CASES[name].processes), *script])
            keep(figures, f"correctness of {library}", name, result.get("difference", "failed"))


def print_correctness(figures: dict[str, Any]) -> None:
    """One row a case: whether the weights are those of the loop by hand, or how far they are off."""
    print(
        figures["correctness"]["date"],
        *(figures["versions"][f"correctness, {whose}"] for whose in ("ours", "others")),
        sep="\n",
    )
    print(f"\n| | {' | '.join(correctness.LIBRARIES)} |")
    print("|---" * (len(correctness.LIBRARIES) + 1) + "|")
    for name in correctness.CASES:
        found = [figures[f"correctness of {library}"].get(name, "") for library in correctness.LIBRARIES]
        _row(
            name,
            *(
                value if isinstance(value, str) else "equal" if value < CORRECT else f"off by {value:.0%}"
                for value in found
            ),
        )


def keep(figures: dict[str, Any], group: str, name: str, value: Any) -> None:
    """Remember a figure, also for the tables of a later command."""
    figures.setdefault(group, {})[name] = value
    FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
    print(f"{group}, {name}: {value}", file=sys.stderr, flush=True)


def print_tables(figures: dict[str, Any]) -> None:
    """Ours with the targets beside them; what it costs to start; a long run; the other libraries."""
    for versions in figures.get("versions", {}).values():
        print(versions)
    titles = [
        "workload",
        "target",
        "accel wall",
        "accel CPU",
        "accel best of",
        "by hand, ms",
        "accelerate",
        "by hand, by index",
    ]
    print(f"\n| {' | '.join([*titles, 'accel, with messages'])} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, workload in WORKLOADS.items():
        loops = figures.get(name, {})
        if "accel" in loops:
            ours = [_figure(loops["accel"], key) for key in ("ratio", "cpu_ratio", "best_ratio", "raw_ms")]
            others = [
                _figure(loops.get(loop, {}), "ratio")
                for loop in ("accelerate", "raw by index", "accel with messages")
            ]
            _row(workload.title, "" if workload.target is None else f"{workload.target:.2f}", *ours, *others)
    if "long" in figures:
        print(
            "\n| 100,000 updates with history, progress bar and callbacks | after 1 % | at the end "
            "|\n|---|---|---|"
        )
        for name, (before, after) in figures["long"]["accel"].items():
            _row(name, f"{before:,.1f}", f"{after:,.1f}")
    if "saves" in figures:
        print("\n| saves | target | |")
        print("|---|---|---|")
        for name, value in figures["saves"]["accel"].items():
            _row(name, SAVE_TARGETS.get(name, ""), _number(value, ",.1f"))
    if "reading" in figures:
        print("\n| JPEG files, and texts in batches by chance and by length | |\n|---|---|")
        for name, value in figures["reading"]["accel"].items():
            _row(name, _number(value, ",.0f"))
    if "real work" in figures:
        print_real_work(figures)
    print(
        "\n| over the hand-written loop | "
        f"{' | '.join(f'{name} (target {value})' for name, value in START_TARGETS.items())} |"
    )
    print("|---" * (len(START_TARGETS) + 1) + "|")
    for loop, start in figures.get("start", {}).items():
        _row(
            loop,
            f"{start['import']:+.2f} s",
            f"{start['first_forward']:+.2f} s",
            f"{start['peak_megabytes']:+.0f} MB",
        )
    print("\n| loop, wall / CPU | " + " | ".join(WORKLOADS[name].title for name in OTHERS_WORKLOADS) + " |")
    print("|---" * (len(OTHERS_WORKLOADS) + 1) + "|")
    for loop in ("accel", "accelerate", *OTHERS):
        results = [figures.get(name, {}).get(loop, {}) for name in OTHERS_WORKLOADS]
        if any(results):
            _row(
                loop,
                *(
                    f"{_figure(result, 'ratio')} / {_figure(result, 'cpu_ratio')}" if result else ""
                    for result in results
                ),
            )


def print_real_work(figures: dict[str, Any]) -> None:
    """Samples per second and peak memory of each library at real work."""
    names = list(real_work.TASKS)
    print(f"\n{figures['real work']['date']}, others: {figures['versions'].get('real work, others', '')}")
    titles = [f"{name}, samples/s | {name}, MB" for name in names]
    print(f"\n| real work | {' | '.join(titles)} |")
    print("|---" * (2 * len(names) + 1) + "|")
    for library in real_work.LIBRARIES:
        results = [figures.get(f"real work, {name}", {}).get(library, {}) for name in names]
        cells = [
            (f"{result['rate']:,.1f}", f"{result['megabytes']:,.0f}")
            if "rate" in result
            else (result.get("failed", ""), "")
            for result in results
        ]
        _row(library, *(cell for pair in cells for cell in pair))


def measure_start(loop: str, python: str) -> dict[str, float]:
    """CPU seconds of import and up to the first forward, and memory, as medians of differences to the hand-written loop."""
    pairs = [(_start(python, loop), _start(python, "raw")) for _ in range(5)]
    differences = {
        name: statistics.median(own.get(name, float("nan")) - raw[name] for own, raw in pairs)
        for name in ("first_forward", "peak_megabytes")
    }
    return {"import": statistics.median(_import_seconds(python, loop) for _ in range(5)), **differences}


def measure(python: str, workload: str, loop: str, rounds: int) -> dict[str, Any]:
    """The figures of measure.py, or what kept it from giving any."""
    launcher = _launcher(python, WORKLOADS[workload].processes)
    return _run([*launcher, str(HERE / "measure.py"), workload, loop, str(rounds)])


def _launcher(python: str, processes: int) -> list[str]:
    """What starts a script on so many processes."""
    if processes == 1:
        return [python]
    command = [
        python,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
    ]
    return [
        *command,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(_free_port()),
    ]


def _own_loops(workload: Workload) -> list[str]:
    """The loops of this environment that can do `workload`."""
    by_index = ["raw by index"] if workload.in_memory and workload.processes == 1 else []
    return ["accel", "accelerate", *by_index, *(["accel with messages"] if workload.processes > 1 else [])]


def _start(python: str, loop: str) -> dict[str, Any]:
    result = _run([python, str(HERE / "start.py"), loop])
    return {} if "failed" in result else result


def _import_seconds(python: str, loop: str) -> float:
    """CPU time of the import, over that of what it stands on."""
    module = MODULES.get(loop, loop)
    before = "torch, accelerate" if loop == "accel" else "torch"
    code = f"import {before}, json, time; start = time.process_time(); import {module}; "
    result = _run(
        [python, "-W", "ignore", "-c", code + "print(json.dumps({'seconds': time.process_time() - start}))"]
    )
    return float(result.get("seconds", "nan"))


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode or not lines:
        print(f"{' '.join(command[1:])} failed:\n{finished.stderr}", file=sys.stderr)
        return {"failed": "failed"}
    return dict(json.loads(lines[-1]))


def _figure(result: dict[str, Any], key: str) -> str:
    return f"{result[key]:.2f}" if key in result else result.get("failed", "")


def _number(value: float | str, form: str) -> str:
    """The number in this form; a word for what could not be measured stays as it is."""
    return value if isinstance(value, str) else format(value, form)


def _row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _versions(python: str, packages: list[str]) -> str:
    code = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {packages!r}}}))"
    versions = _run([python, "-c", code])
    return f"Python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(
        f"{k} {v}" for k, v in versions.items()
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
