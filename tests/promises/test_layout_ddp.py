"""DDP with each of its options on two and three processes: equal to one, and resumed on as many and on another number.

More kinds of data and models are in `test_many_processes_equal_one.py` and `test_evaluation_is_exact.py`. Resuming to
the bit with several buckets of gradients is in `test_resume_is_exact_on_more_processes.py`.
"""

import functools
import sys

import pytest
from accelerate import Accelerator, DistributedDataParallelKwargs

import layout_limits
from case_runner import compare, run_as_script
from layout_limits import KeepsLimits
from layout_promises import GoesOnAnywhere, Layout, LayoutPromises, TrainingPromises, assert_others_went_on
from layouts import DDP_OPTIONS

pytestmark = pytest.mark.slow
TOLERANCE = 1e-12
PROCESSES = (2, 3, 2)
"""Of each launch. It goes on from the states of the one before."""


def create_accelerator(option):
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(**DDP_OPTIONS[option])])


def layout_with(option):
    return Layout(
        "DDP",
        create_accelerator=functools.partial(create_accelerator, option),
        tolerance=TOLERANCE,
        resumes_to_the_bit=option != "static graph",
        suffix=f" with {option}",
    )


PLAIN, OPTIONS = Layout("DDP", tolerance=TOLERANCE), {name: layout_with(name) for name in DDP_OPTIONS}
CASES = {name: case for layout in (PLAIN, *OPTIONS.values()) for name, case in layout.cases().items()}
# Options are those of the wrapper, which evaluations pass by.
CASES = {name: case for name, case in CASES.items() if not name.startswith("predictions with")}
CASES |= layout_limits.cases(PLAIN)


@pytest.fixture
def layout():
    return PLAIN


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    found = []
    for processes in PROCESSES:
        earlier = [outcome.folder for outcome in found[-1:]]
        found.append(compare(CASES, __file__, processes, tmp_path_factory.mktemp("cases"), args=earlier))
    return found


@pytest.fixture(params=[0, 1], ids=["2 processes", "3 processes"])
def outcome(request, launches):
    return launches[request.param]


class FromOthers(GoesOnAnywhere):
    @pytest.mark.parametrize("launch", [1, 2], ids=["3 from 2 processes", "2 from 3 processes"])
    def test_a_state_of_another_number_of_processes_goes_on(self, layout, launches, launch):
        assert_others_went_on(layout, launches[launch])


class TestDdp(LayoutPromises, FromOthers, KeepsLimits):
    """All that is promised."""


class TestOptions(TrainingPromises, FromOthers):
    """Training and resuming with each option."""

    @pytest.fixture(params=OPTIONS)
    def layout(self, request):
        return OPTIONS[request.param]


if __name__ == "__main__":
    # The third launch repeats nothing of the first.
    is_third = len(sys.argv) > 3 and sys.argv[1] == "2"
    run_as_script({name: CASES[name] for name in CASES if name.startswith("resume from") or not is_third})
