"""Any system call of a save may fail, once or from then on: the run says so, and a restart ends with the same bits.

The faults are injected below Python, by a small library in front of the C library. Needs a compiler and
Linux.
ACCEL_TEST_FAULTS chooses how many calls of each kind fail.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("system_faults.c")
FAULTS = int(os.environ.get("ACCEL_TEST_FAULTS", "3"))
KINDS = [
    ("write", "EIO"),
    ("write", "ENOSPC"),
    ("fsync", "EIO"),
    ("close", "EIO"),
    ("rename", "EIO"),
    ("unlink", "EBUSY"),
    ("mkdir", "EDQUOT"),
    ("open", "EMFILE"),
    ("open", "EACCES"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("cc") is None, reason="needs a compiler on Linux"
    ),
]


def run_job(folder: Path, on_error: str = "raise") -> dict[str, object]:
    """Train to the end, from the newest state if there is one, and return what is there."""
    import torch

    from accel_callbacks import EarlyStoppingCallback, SaveBestModelCallback, SaveTrainingStateCallback
    from accel_core import latest_checkpoint
    from tiny import tiny_data, tiny_trainer, weights_of

    callbacks = [
        SaveBestModelCallback(folder / "best.pt", load_saved_checkpoint=False),
        EarlyStoppingCallback(99),
        SaveTrainingStateCallback(folder / "states", save_every_n_updates=3, keep_last=2, on_error=on_error),
    ]
    trainer = tiny_trainer(callbacks=callbacks)
    torch.set_num_threads(1)
    trainer.train(
        tiny_data(40),
        2,
        eval_dataset=tiny_data(12),
        per_device_batch_size=4,
        resume_from=latest_checkpoint(folder / "states"),
    )
    return {"weights": weights_of(trainer).tolist(), "history": trainer.run_history.to_records()}


def in_fork(action):
    """Act in a process of its own, which has none of the descriptors and faults of the others."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = action()
        except BaseException as error:
            result = {"error": type(error).__name__, "message": str(error)}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(content) if content else {"error": "died"}


def inject(root: Path) -> list[str]:
    """Try all kinds, and return sentences about what was not as it should be."""
    import contextlib
    import ctypes
    import logging
    import warnings

    import torch

    import accel_callbacks  # noqa: F401
    import tiny  # noqa: F401

    # What torch imports at the first optimizer takes as long as torch itself, and each process would do
    # it again.
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    # The library was loaded before all others, so that its functions are found among those of the process.
    faults = ctypes.CDLL(None)
    warnings.simplefilter("ignore")
    logging.getLogger("accel_core").setLevel(logging.CRITICAL)
    wrong, rng = [], random.Random(1)

    def begin(kind: str, folder: Path, number: int, code: int, stays: bool) -> None:
        faults.faults_begin(kind.encode(), str(folder).encode(), number, code, int(stays))

    def job(folder: Path, *args: object) -> dict[str, object]:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return run_job(folder, *args)

    expected = in_fork(lambda: job(root / "expected"))
    for kind, name in KINDS:

        def count(kind=kind) -> int:
            folder = root / "count"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            begin(kind, folder, 0, 0, False)
            job(folder)
            return faults.faults_seen()

        total = in_fork(count)
        if not isinstance(total, int) or total < 2:
            wrong.append(f"{kind}: {total} calls were seen")
            continue
        for stays in (False, True):
            for number in rng.sample(range(1, total + 1), min(FAULTS, total)):
                for on_error in ("raise", "retry"):
                    folder = root / "trial"
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()

                    def with_fault(
                        kind=kind, name=name, number=number, stays=stays, folder=folder, on_error=on_error
                    ):
                        begin(kind, folder, number, getattr(errno, name), stays)
                        return job(folder, on_error)

                    case = f"{kind} {number} of {total} fails with {name}{' and after' if stays else ''}, {on_error}"
                    outcome = in_fork(with_fault)
                    if outcome != expected and outcome.get("error") not in (
                        "CheckpointError",
                        "DamagedError",
                    ):
                        wrong.append(f"{case}: {str(outcome)[:300]}")
                    again = in_fork(lambda folder=folder: job(folder))
                    if again != expected:
                        wrong.append(f"{case}: restarted {str(again)[:300]}")
    return wrong


@pytest.mark.timeout(1200)
def test_a_run_in_which_any_system_call_fails_ends_with_the_same_bits_after_a_restart(tmp_path: Path) -> None:
    library = tmp_path / "libfaults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True, timeout=60)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == []


if __name__ == "__main__":
    print(json.dumps(inject(Path(sys.argv[1]))))
