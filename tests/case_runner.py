"""Run the same cases on one process and on several, to compare what they give.

A test file has a dictionary of cases, functions from the batch size of one process to plain values and
tensors:

    CASES = {"evaluation": evaluate}

    def test_evaluation_equals_one_process(outcome):
        for result in outcome.of("evaluation"):
            assert result == outcome.alone("evaluation")

    if __name__ == "__main__":
        run_as_script(CASES)

The fixture `outcome` of conftest.py compares them. The file is its own script: a launch costs seconds, so it
runs all cases of the file, in the order of the dictionary.
"""

import atexit
import dataclasses
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list

from accel_core.processes.shutdown import close_process_group_at_exit
from launching import launch

Cases = Mapping[str, Callable[[int], Any]]
BATCH_SIZE = 4
"""Of one process; a single process that stands for several takes the batches of all of them at once."""


@dataclasses.dataclass
class Outcome:
    """What the cases gave."""

    processes: int
    folder: Path
    """Of the launch: its script gets it as second argument, and may leave states there."""
    _results: list[dict[str, Any]]
    _cases: Cases
    _alone: dict[str, Any] = dataclasses.field(default_factory=dict)

    def of(self, case: str) -> list[Any]:
        """What `case` gave on each of the processes."""
        return [results[case] for results in self._results]

    def alone(self, case: str) -> Any:
        """What `case` gives on a single process, this one, with the global batch size."""
        if case not in self._alone:
            self._alone[case] = self._cases[case](BATCH_SIZE * self.processes)
        return self._alone[case]


def shared_folder() -> Path:
    """A new folder, the same on every process: in that of the launch, or gone when the single process ends."""
    if not torch.distributed.is_initialized():
        name = tempfile.mkdtemp(prefix="accel-test-")
        atexit.register(shutil.rmtree, name, ignore_errors=True)
        return Path(name)
    names = [tempfile.mkdtemp(dir=sys.argv[2])]
    broadcast_object_list(names)
    return Path(names[0])


def compare(
    cases: Cases,
    script: str,
    processes: int,
    folder: Path,
    timeout: float = 200.0,
    args: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Run `cases` on several processes, with a time limit that kills them and fails.

    Args:
        args: further ones of the script, from `sys.argv[3]` on.
        env: added to the environment.
    """
    environment = {"PYTHONPATH": str(Path(__file__).parent), **(env or {})}
    launch(
        Path(script), processes=processes, args=[processes, folder, *args], timeout=timeout, env=environment
    )
    return read_outcome(cases, processes, folder)


def read_outcome(cases: Cases, processes: int, folder: Path) -> Outcome:
    """What a launch of `cases` has left in its folder."""
    results = [torch.load(folder / f"{index}.pt", weights_only=False) for index in range(processes)]
    return Outcome(processes, folder, results, cases)


def assert_equal(actual: Any, expected: Any) -> None:
    """Values and tensors agree as far as engines that shard a model do, which add in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def run_as_script(
    cases: Cases,
    ignore: str | None = None,
    create_accelerator: Callable[[], Accelerator] = Accelerator,
    distributed_type: DistributedType = DistributedType.MULTI_CPU,
) -> None:
    """Run `cases` on one of the processes that `compare` has launched; warnings are errors but for those that are ignored."""
    warnings.simplefilter("error")
    if ignore is not None:
        warnings.filterwarnings("ignore", message=ignore)
    processes, folder = int(sys.argv[1]), Path(sys.argv[2])
    accelerator = create_accelerator()
    assert accelerator.num_processes == processes, accelerator.num_processes
    assert accelerator.distributed_type == distributed_type, accelerator.distributed_type
    # As a trainer does in its first run; not all cases have one, and gloo may abort a process that leaves its
    # group open.
    close_process_group_at_exit()
    index, results = accelerator.process_index, {}
    for name, case in cases.items():
        print(f"process {index}: {name}", flush=True)
        results[name] = case(BATCH_SIZE)
    torch.save(results, folder / f"{index}.pt")
