"""The helper of the tests with several processes: they see each other, and none is ever left behind."""

import signal
import time

import pytest

from launching import is_alive, launch, start, wait_until

TWO_THAT_SLEEP = """
    import sys, time
    from pathlib import Path
    from accelerate import Accelerator
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    print(f"rank {accelerator.process_index} sleeps")
    accelerator.wait_for_everyone()
    (Path(sys.argv[1]) / f"ready-{accelerator.process_index}").touch()
    time.sleep(600)
"""


def both_are_ready(folder):
    return all((folder / f"ready-{rank}").exists() for rank in range(2))


def test_two_processes_see_each_other():
    finished = launch(
        """
        import os, sys
        from accelerate import Accelerator
        from accelerate.utils import DistributedType
        import torch
        accelerator = Accelerator()
        assert accelerator.distributed_type == DistributedType.MULTI_CPU
        total = accelerator.reduce(torch.tensor(accelerator.process_index + 1))
        print(f"sum {total.item()} threads {os.environ['OMP_NUM_THREADS']} {sys.argv[1]} {os.environ['GREETING']}")
        accelerator.end_training()
        """,
        args=["argument"],
        env={"GREETING": "hello"},
    )
    assert finished.stdout.count("sum 3 threads 1 argument hello") == 2


def test_the_lines_of_two_processes_do_not_mix():
    finished = launch(
        """
        from accelerate import Accelerator
        accelerator = Accelerator()
        accelerator.wait_for_everyone()
        for number in range(5_000):
            print("line", number, "of", accelerator.process_index)
        accelerator.end_training()
        """
    )
    wanted = [f"line {number} of {rank}" for rank in range(2) for number in range(5_000)]
    assert sorted(finished.stdout.splitlines()) == sorted(wanted)


def test_one_process_needs_no_launcher():
    assert launch("import os; print('RANK' in os.environ)", processes=1).stdout == "False\n"


def test_a_failing_script_fails_the_test_with_what_it_printed():
    with pytest.raises(AssertionError, match=r"exit code 1(?s:.)*before(?s:.)*the reason"):
        launch("print('before'); raise SystemExit('the reason')", processes=1)


def test_a_failure_can_be_expected():
    assert launch("raise SystemExit(7)", processes=1, check=False).returncode == 7


def test_a_timeout_tells_what_was_printed():
    with pytest.raises(AssertionError, match=r"after 2 seconds(?s:.)*waiting"):
        launch("import time; print('waiting'); time.sleep(600)", processes=1, timeout=2)


def test_killing_ends_every_process_of_the_tree(tmp_path):
    with start(TWO_THAT_SLEEP, args=[tmp_path]) as running:
        wait_until(lambda: both_are_ready(tmp_path), running)
        workers = running.workers()
        assert sorted(workers) == [0, 1]
        running.kill()
        assert not any(map(is_alive, workers.values()))
        assert running.process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_orphans_of_a_killed_launcher_are_killed_too(tmp_path):
    with start(TWO_THAT_SLEEP, args=[tmp_path]) as running:
        wait_until(lambda: both_are_ready(tmp_path), running)
        workers = running.workers()
        running.process.kill()
        running.wait()
        assert all(map(is_alive, workers.values()))
    assert not any(map(is_alive, workers.values()))


@pytest.mark.slow
def test_a_killed_worker_is_restarted_on_request(tmp_path):
    with start(TWO_THAT_SLEEP, args=[tmp_path], max_restarts=1) as running:
        wait_until(lambda: both_are_ready(tmp_path), running)
        before = {worker.pid for worker in running.workers().values()}
        for rank in range(2):
            (tmp_path / f"ready-{rank}").unlink()
        running.workers()[1].kill()
        wait_until(lambda: both_are_ready(tmp_path), running)
        after = {worker.pid for worker in running.workers().values()}
        assert len(after) == 2
        assert not before & after


def test_waiting_for_what_never_happens_fails():
    with (
        start("import time; time.sleep(600)", processes=1) as running,
        pytest.raises(AssertionError, match=r"within 0\.5 seconds"),
    ):
        wait_until(lambda: False, running, timeout=0.5)


def test_waiting_ends_when_the_script_has_ended():
    began = time.monotonic()
    with (
        start("raise SystemExit(3)", processes=1) as running,
        pytest.raises(AssertionError, match="exit code 3 too early"),
    ):
        wait_until(lambda: False, running, timeout=60)
    assert time.monotonic() - began < 30
