"""Processes with NCCL, one a GPU, equal one process: two of them if there are two GPUs, else the one that there is.

`ACCEL_TEST_DEVICE=cpu` runs the same with gloo, on two processes of a CPU.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parent))
import job

DEVICE = os.environ.get("ACCEL_TEST_DEVICE", "cuda")
PROCESSES = 2 if DEVICE == "cpu" else min(2, torch.cuda.device_count())
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROCESSES == 0, reason="needs a CUDA GPU, and torch sees none"),
]
SOURCES = [str(path) for path in (Path(__file__).parents[2] / "packages").glob("*/src")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(folder: Path) -> list[dict[str, Any]]:
    """Start the processes without a launcher, and leave none of them behind."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(PROCESSES)}
    if DEVICE == "cpu":
        variables["ACCELERATE_USE_CPU"] = "true"
    variables["PYTHONPATH"] = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, job.__file__, DEVICE, str(PROCESSES), str(folder)]
    started = [
        subprocess.Popen(command, env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(PROCESSES)
    ]
    try:
        assert [process.wait(timeout=150) for process in started] == [0] * PROCESSES
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    try:
        return job.results(DEVICE, PROCESSES, tmp_path_factory.mktemp("alone"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_they_communicate_by_the_backend_of_the_device(found: list[dict[str, Any]]) -> None:
    for result in found:
        assert result["processes"] == PROCESSES
        assert result["backend"] == ("gloo" if DEVICE == "cpu" else "nccl")


def test_weights_losses_and_metrics_are_those_of_one_process(
    found: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for result in found:
        for key in ("whole", "history", "predictions"):
            torch.testing.assert_close(result[key], alone[key], rtol=1e-4, atol=1e-5)


def test_a_resumed_run_has_the_same_bits_on_all_of_them(found: list[dict[str, Any]]) -> None:
    for result in found:
        torch.testing.assert_close(result["rest"], result["whole"], rtol=0, atol=0)
        torch.testing.assert_close(result["whole"], found[0]["whole"], rtol=0, atol=0)


def test_a_stop_that_one_of_them_asks_for_stops_all_after_the_same_update(
    found: list[dict[str, Any]],
) -> None:
    """The words of an update are read later on a GPU, so that nobody waits for it."""
    stopped = {result["stopped after"] for result in found}
    assert len(stopped) == 1 and 2 <= stopped.pop() <= 6
