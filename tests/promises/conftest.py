"""What holds for the promises: the slow tests try three processes too."""

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
