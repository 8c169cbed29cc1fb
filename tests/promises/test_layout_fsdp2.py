"""FSDP2 on two processes: equal to one, resumed on as many and on one, and what it cannot do is refused.

Accelerate refuses it on a CPU, so its state is set by hand (`tests/layouts.py`). States of two processes go on on
three in `test_sharded_states.py`, and on four in `test_layout_hsdp.py`.
"""

import pytest
from accelerate import DistributedType

from case_runner import run_as_script
from fsdp2_promises import CASES_OF_FSDP2, FSDP2, Fsdp2Promises
from layout_limits import KeepsLimits
from layout_promises import GoesOnAnywhere, LayoutPromises
from layouts import fsdp2
from sharding_promises import ShardingPromises

pytestmark = pytest.mark.slow


@pytest.fixture
def layout():
    return FSDP2


@pytest.fixture
def outcome(outcome_of_fsdp2):
    return outcome_of_fsdp2


class TestFsdp2(LayoutPromises, GoesOnAnywhere, KeepsLimits, ShardingPromises, Fsdp2Promises):
    """All that is promised."""


def test_clipping_by_value_is_refused_with_the_way_out_and_nothing_else(outcome):
    for told in outcome.of("refusals"):
        assert set(told) == {"clipping by value"}
        assert "Pass gradient_clip_norm" in told["clipping by value"]


def test_a_state_has_a_part_of_each_process_and_no_whole_weights(outcome):
    for result in outcome.of("resume"):
        assert {"engine", "sharded.pt"} <= set(result["files"])
        assert "model.safetensors" not in result["files"]


if __name__ == "__main__":
    run_as_script(
        CASES_OF_FSDP2,
        # Torch and Accelerate warn of their own calls of each other.
        ignore=".*",
        create_accelerator=fsdp2,
        distributed_type=DistributedType.FSDP,
    )
