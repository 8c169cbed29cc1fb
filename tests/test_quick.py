"""Which tests the inner loop runs, and that its list of lengthy tests stays true."""

import sys
import types

import pytest

from launching import launch
from quick import (
    LONGEST_SECONDS,
    MODULES_OF_A_LIBRARY,
    TOLD_SECONDS,
    Stopwatch,
    exists,
    is_quick,
    lengthy_after,
    lines_about,
    name_of,
    read_lengthy_tests,
    starts_any_process,
)

HERE = "test_quick.py::test_every_test_left_out_for_its_time_exists"


def test_every_test_left_out_for_its_time_exists() -> None:
    gone = [name for name in read_lengthy_tests() if not exists(name)]
    assert not gone, "remove these lines from lengthy_tests.txt"


@pytest.mark.parametrize("name", [HERE + "_not", "test_gone.py::test_it", "test_quick.py::TestGone::test_it"])
def test_a_test_that_is_gone_does_not_exist(name: str) -> None:
    assert exists(HERE)
    assert not exists(name)


@pytest.mark.parametrize("case", [1, 2])
def test_the_list_leaves_out_all_cases_of_a_test(request: pytest.FixtureRequest, case: int) -> None:
    name = "test_quick.py::test_the_list_leaves_out_all_cases_of_a_test"
    assert name_of(request.node) == name
    assert is_quick(request.node, ())
    assert not is_quick(request.node, (name,))


@pytest.mark.parametrize("mark", ["slow", "seconds", "gpu", "network"])
def test_a_marked_test_is_not_quick(request: pytest.FixtureRequest, mark: str) -> None:
    request.node.add_marker(mark)
    assert not is_quick(request.node, ())


def in_a_function_that_it_uses() -> None:
    launch()


def test_a_test_that_starts_a_process_is_found() -> None:
    def by_itself() -> None:
        launch()

    assert starts_any_process(by_itself)
    assert starts_any_process(lambda: in_a_function_that_it_uses())
    assert not starts_any_process(lambda: len(""))


def test_a_new_list_holds_what_was_measured_as_lengthy_and_what_was_not_measured() -> None:
    listed = ["test_a.py::test_now_quick", HERE, "test_gone.py::test_it"]
    means = {"test_a.py::test_now_quick": LONGEST_SECONDS / 2, "test_a.py::test_lengthy": LONGEST_SECONDS * 2}
    assert lengthy_after(listed, means) == ["test_a.py::test_lengthy", HERE]


def test_a_run_tells_of_tests_that_take_far_too_long_the_longest_first() -> None:
    means = {"a": TOLD_SECONDS / 2, "b": 2 * TOLD_SECONDS, "c": 3 * TOLD_SECONDS}
    first, second, way_out = lines_about(means)
    assert first.endswith(": c") and second.endswith(": b")
    assert "--write-lengthy-tests" in way_out
    assert lines_about({"a": TOLD_SECONDS / 2}) == []


@pytest.mark.parametrize("modules", [0, MODULES_OF_A_LIBRARY])
def test_the_first_use_of_a_library_is_not_measured(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, modules: int
) -> None:
    stopwatch = Stopwatch(writes=False)
    measuring = stopwatch.pytest_runtest_protocol(request.node)
    next(measuring)
    for number in range(modules):
        monkeypatch.setitem(sys.modules, f"library.module_{number}", types.ModuleType("module"))
    measuring.close()
    assert list(stopwatch.seconds) == ([] if modules else [name_of(request.node)])
