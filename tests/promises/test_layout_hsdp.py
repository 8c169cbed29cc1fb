"""HSDP on two times two processes: equal to one, resumed on as many, on one, and from two that run FSDP2.

Accelerate refuses it on a CPU, so its state is set by hand (`tests/layouts.py`).
"""

from functools import partial

import pytest
from accelerate import DistributedType

import fsdp2_promises
import layout_limits
from accel_core import TrainerCallback
from case_runner import assert_equal, compare, run_as_script
from fsdp2_promises import Fsdp2Promises
from layout_limits import KeepsLimits
from layout_promises import GoesOnAnywhere, Layout, LayoutPromises, assert_others_went_on, make_data
from layouts import fsdp2
from sharding_promises import two_trainers

# Alone it has to launch FSDP2 too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LAYOUT = Layout("HSDP")


class Copies(TrainerCallback):
    """Which processes hold each copy of the model."""

    def on_train_epoch_start(self, trainer):
        self.processes = next(trainer.model.parameters()).device_mesh.mesh.tolist()


def hold_copies(batch_size):
    copies = Copies()
    LAYOUT.create_trainer([copies]).train(make_data(13, LAYOUT.dtype), 1, per_device_batch_size=3)
    return copies.processes


CASES = {
    **LAYOUT.cases(),
    **layout_limits.cases(LAYOUT),
    **fsdp2_promises.CASES,
    "two trainers": two_trainers,
    "copies": hold_copies,
}


@pytest.fixture
def layout():
    return LAYOUT


@pytest.fixture(scope="module")
def outcome(outcome_of_fsdp2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    return compare(CASES, __file__, 4, folder, timeout=280, args=[outcome_of_fsdp2.folder])


class TestHsdp(LayoutPromises, GoesOnAnywhere, KeepsLimits, Fsdp2Promises):
    """All that is promised."""


def test_neighbours_hold_a_copy_together(outcome):
    """So that the processes of one machine do."""
    assert outcome.of("copies") == [[[0, 1], [2, 3]]] * 4


def test_a_state_of_fsdp2_on_two_processes_goes_on(outcome):
    assert_others_went_on(LAYOUT, outcome)


def test_what_is_beside_the_model_goes_on_from_fsdp2_on_two_processes(outcome, outcome_of_fsdp2):
    whole, _ = outcome_of_fsdp2.of("beside resumed")[0][0]
    for rest, _ in outcome.of("beside resumed from others"):
        assert_equal(rest, whole)


def test_two_trainers_with_one_accelerator_equal_one_process(outcome):
    for result in outcome.of("two trainers"):
        assert_equal(result, outcome.alone("two trainers"))


if __name__ == "__main__":
    run_as_script(
        CASES,
        # Torch and Accelerate warn of their own calls of each other.
        ignore=".*",
        create_accelerator=partial(fsdp2, replicas=2),
        distributed_type=DistributedType.FSDP,
    )
