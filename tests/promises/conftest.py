"""What holds for the promises: the slow tests try three processes too, and two layouts share a launch."""

from pathlib import Path

import pytest

from case_runner import Outcome, compare


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids="{} processes".format
)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the CASES of the test file give on several processes: see case_runner."""
    return compare(
        request.module.CASES, request.module.__file__, request.param, tmp_path_factory.mktemp("cases")
    )


@pytest.fixture(scope="session")
def outcome_of_fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What FSDP2 gives on two processes. HSDP goes on from the states that this launch leaves."""
    from fsdp2_promises import CASES_OF_FSDP2

    script, folder = Path(__file__).with_name("test_layout_fsdp2.py"), tmp_path_factory.mktemp("fsdp2")
    return compare(CASES_OF_FSDP2, str(script), 2, folder, timeout=280)
