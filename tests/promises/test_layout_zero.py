"""DeepSpeed's ZeRO of stages 1, 2 and 3 on two processes: equal to one, resumed on as many, and refused on another number.

How it runs on a CPU is told in `tests/sharding.py`. It trains in float32.
"""

import re
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator, DistributedType

import layout_limits
import sharding_promises
from accel_core import CheckpointError
from accel_core.engines.deepspeed import DeepSpeed
from accel_core.processes.group import DataGroup
from case_runner import compare, run_as_script
from layout_limits import KeepsLimits
from layout_promises import Layout, LayoutPromises
from sharding import create_accelerator, environment_of
from sharding_promises import ShardingPromises

pytestmark = pytest.mark.slow
LAYOUT = Layout("DEEPSPEED", dtype=torch.float32, tolerance=1e-4)
CASES = {**LAYOUT.cases(is_first=True), **layout_limits.cases(LAYOUT), **sharding_promises.CASES}


@pytest.fixture
def layout():
    return LAYOUT


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3"])
def outcome(request, tmp_path_factory):
    stage = request.param
    folder = tmp_path_factory.mktemp("cases")
    return compare(CASES, __file__, 2, folder, timeout=280, args=[stage], env=environment_of(stage))


class TestZero(LayoutPromises, KeepsLimits, ShardingPromises):
    """All that is promised."""


def test_what_it_cannot_do_is_refused_with_the_way_out(outcome):
    for told in outcome.of("refusals"):
        assert set(told) == {"clipping by value", "own step", "stream", "tokens"}
        assert "Pass gradient_clip_norm" in told["clipping by value"]
        assert re.search(r"\['optimizer_step'\].*DEEPSPEED.*backward", told["own step"])
        for name in ("stream", "tokens"):
            assert "Override count_items(batch)" in told[name]


def test_its_files_are_loaded_only_where_they_are_trusted(outcome):
    for result in outcome.of("resume"):
        assert "trainer.trust_engine_files = True" in result["refused"]
        assert "engine" in result["files"] and "model.safetensors" not in result["files"]


def test_a_state_of_two_processes_is_refused_on_one(outcome):
    with pytest.raises(CheckpointError, match="saved with an engine that shards"):
        LAYOUT.go_on(outcome.folder, trusts=True)


def test_a_state_goes_on_on_the_same_number_of_processes_only(tmp_path):
    (tmp_path / "engine").mkdir()
    deepspeed = DeepSpeed(Accelerator(cpu=True), DataGroup(2))
    deepspeed.check_files(tmp_path, saved_processes=2, trust_engine_files=True)
    with pytest.raises(CheckpointError, match=r"by 3 processes.*not with 2.*new run from an export"):
        deepspeed.check_files(tmp_path, saved_processes=3, trust_engine_files=True)


if __name__ == "__main__":
    run_as_script(
        CASES,
        ignore=".*",
        create_accelerator=partial(create_accelerator, sys.argv[3]),
        distributed_type=DistributedType.DEEPSPEED,
    )
