"""Which tests are quick: the inner loop, `hatch run test-quick`.

A test is quick, unless it

- is marked `slow`, `seconds`, `gpu` or `network`,
- lies in a folder of `LENGTHY_FOLDERS`,
- starts a process: by itself, or in a fixture or a function of its own file that it uses, by one of
`STARTERS`, or
- is named in `lengthy_tests.txt`, since a case of it took more than `LONGEST_SECONDS` on average.

`hatch run test-quick --write-lengthy-tests` measures and writes that file.
"""

import functools
import inspect
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import case_runner
import launching

TESTS = Path(__file__).parent
LENGTHY_TESTS = TESTS / "lengthy_tests.txt"
LONGEST_SECONDS = 0.05
"""Of a case on average, in CPU time, with its fixtures: three thousand tests then take about a minute."""

TOLD_SECONDS = 4 * LONGEST_SECONDS
"""A run tells of tests that take longer. Less may be noise."""

MODULES_OF_A_LIBRARY = 10
"""A case that imports as many modules is the first to use a library, and its time is not that of the test."""

LENGTHY_MARKS = ("slow", "seconds", "gpu", "network")
LENGTHY_FOLDERS = ("documents", "packaging", "promises", "ways_out")
STARTERS = (launching.launch, launching.start, case_runner.compare, subprocess)


def is_quick(item: pytest.Function, lengthy: Collection[str]) -> bool:
    """Whether `item` belongs to the inner loop, from which the tests named in `lengthy` are left out."""
    folders = item.path.relative_to(TESTS).parts[:-1]
    if any(item.get_closest_marker(mark) for mark in LENGTHY_MARKS) or set(folders) & set(LENGTHY_FOLDERS):
        return False
    if name_of(item) in lengthy:
        return False
    fixtures = [
        fixture.func for fixtures in item._fixtureinfo.name2fixturedefs.values() for fixture in fixtures
    ]
    return not any(starts_any_process(function) for function in (item.function, *fixtures))


def name_of(item: pytest.Item) -> str:
    """`accel-core/test_resume.py::TestSaved::test_it_is_found`: the same for all cases of a test."""
    within = item.nodeid.partition("[")[0].partition("::")[2]
    return f"{item.path.relative_to(TESTS).as_posix()}::{within}"


@functools.cache
def starts_any_process(function: Callable[..., Any]) -> bool:
    """Whether `function` starts a process: asked once for all cases of a test."""
    return starts_process(function, set())


def starts_process(function: Callable[..., Any], seen: set[Any]) -> bool:
    """Whether `function`, or a function or class of its file that it uses, uses one of `STARTERS`."""
    function = inspect.unwrap(function)
    if function in seen or not inspect.isfunction(function):
        return False
    seen.add(function)
    for name in names_in(function.__code__):
        used = function.__globals__.get(name)
        if any(used is starter for starter in STARTERS):
            return True
        methods = vars(used).values() if inspect.isclass(used) else [used]
        own = [method for method in methods if getattr(method, "__module__", None) == function.__module__]
        if any(starts_process(method, seen) for method in own if callable(method)):
            return True
    return False


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that a function uses and those of the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def read_lengthy_tests() -> list[str]:
    """The names in `lengthy_tests.txt`."""
    return LENGTHY_TESTS.read_text(encoding="utf-8").splitlines()


def exists(name: str) -> bool:
    """Whether the file of the test is there, and defines the test and its class."""
    file, *within = name.split("::")
    return (TESTS / file).is_file() and defined_in(TESTS / file).issuperset(within)


@functools.cache
def defined_in(path: Path) -> set[str]:
    """The names of the functions and classes in a file, read once for all its tests."""
    return set(re.findall(r"\b(?:def|class) (\w+)", path.read_text(encoding="utf-8")))


def lengthy_after(listed: Collection[str], means: Mapping[str, float]) -> list[str]:
    """The new list: what was measured counts, and what was not stays listed as long as it exists."""
    kept = {name for name in listed if name not in means and exists(name)}
    return sorted(kept | {name for name, seconds in means.items() if seconds > LONGEST_SECONDS})


class Stopwatch:
    """Measures the tests of the inner loop, in CPU time: other programs on the machine hardly change it."""

    def __init__(self, writes: bool) -> None:
        self.writes = writes
        self.seconds: dict[str, list[float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        modules, begin = len(sys.modules), cpu_seconds()
        try:
            return (yield)
        finally:
            seconds = cpu_seconds() - begin
            if len(sys.modules) - modules < MODULES_OF_A_LIBRARY:
                self.seconds.setdefault(name_of(item), []).append(seconds)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        means = {name: sum(seconds) / len(seconds) for name, seconds in self.seconds.items()}
        if self.writes:
            names = lengthy_after(read_lengthy_tests(), means)
            LENGTHY_TESTS.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
            terminalreporter.write_line(f"{LENGTHY_TESTS.name} names {len(names)} tests")
        elif told := lines_about(means):
            terminalreporter.section("too long for the inner loop")
            for line in told:
                terminalreporter.write_line(line)


def cpu_seconds() -> float:
    """Of this process and of the children that it has waited for, such as the workers of a loader."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def lines_about(means: Mapping[str, float]) -> list[str]:
    """What a run tells about tests that take far longer than the others, the longest first."""
    longest = sorted((item for item in means.items() if item[1] > TOLD_SECONDS), key=lambda item: -item[1])
    if not longest:
        return []
    return [
        *(f"{seconds:.2f} s of CPU time a case: {name}" for name, seconds in longest),
        "Make them faster, or leave them out: hatch run test-quick FILE --write-lengthy-tests",
    ]
