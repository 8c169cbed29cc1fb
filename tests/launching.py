"""Start a script on several real processes, and never leave one of them behind.

`launch` is for scripts that come to an end by themselves:

    from launching import launch

    def test_processes_agree(tmp_path):
        finished = launch(
            '''
            import sys
            from accelerate import Accelerator
            accelerator = Accelerator()
            assert accelerator.num_processes == 2
            print(f"process {accelerator.process_index} was given {sys.argv[1:]}")
            accelerator.end_training()
            ''',
            processes=2,
            args=[tmp_path],
        )
        assert "process 1" in finished.stdout

`start` is for what has to be done to a script while it runs, such as killing it at a chosen moment:

    with start(SCRIPT, processes=2, args=[tmp_path]) as running:
        wait_until(lambda: (tmp_path / "checkpoints").exists(), running)
        running.kill()

The processes find each other only with `--multi_gpu` and ACCELERATE_USE_CPU=true; other spellings start
trainings that do not know of each other. A script should therefore assert `accelerator.num_processes` and
`accelerator.distributed_type`.
"""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

_LAUNCH_ID = "ACCEL_TEST_LAUNCH_ID"
_WHOLE_LINES = Path(__file__).parent / "whole_lines"
_SET_BY_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "MASTER_", "GROUP_")
_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "OMP_NUM_THREADS",
)


class Running:
    """A script that was started; made by `start`."""

    def __init__(self, process: subprocess.Popen[bytes], launch_id: str, folder: Path) -> None:
        self.process = process
        self._launch_id = launch_id
        self._folder = folder

    @property
    def stdout(self) -> str:
        """What all processes printed so far."""
        return (self._folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What all processes wrote to their standard error so far."""
        return (self._folder / "stderr").read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Every living process of this launch: launcher, workers, workers of data loaders, and orphans of any of them.

        They are found by a variable in their environment, as each worker of torchrun has a session of its
        own, and the children of a launcher that was killed are no longer its children.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if is_alive(process) and process.environ().get(_LAUNCH_ID) == self._launch_id:
                    found.append(process)
        return found

    def workers(self) -> dict[int, psutil.Process]:
        """The living processes of the script by their rank, without the launcher and the workers of data loaders."""
        found: dict[int, psutil.Process] = {}
        for process in sorted(self.tree(), key=lambda process: process.create_time()):
            with contextlib.suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None:
                    found.setdefault(int(rank), process)
        return found

    def wait(self, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Wait for the launcher to end, whatever its exit code.

        Raises:
            AssertionError: it has not ended after `timeout` seconds. Its whole tree is dead then.
        """
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                self._told(f"has not ended after {timeout:g} seconds and was killed")
            ) from None
        return subprocess.CompletedProcess(
            self.process.args, self.process.returncode, self.stdout, self.stderr
        )

    def kill(self) -> None:
        """Kill every process of this launch with SIGKILL, at once, and wait until none is left."""
        give_up = time.monotonic() + 30
        killed: set[psutil.Process] = set()
        # A process that is on its way out has no environment any more, so those found earlier are asked as
        # well.
        while (tree := self.tree()) or any(map(is_alive, killed)):
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            killed.update(tree)
            # The launcher is this process's child: only `Popen` may wait for it, else its exit code is lost.
            self.process.poll()
            if time.monotonic() > give_up:
                raise AssertionError(self._told(f"cannot be killed: {killed}"))
            time.sleep(0.01)
        self.process.wait(10)

    def _told(self, what: str) -> str:
        return f"{self.process.args} {what}\n--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"


@contextlib.contextmanager
def start(
    script: Path | str,
    processes: int = 2,
    args: Sequence[object] = (),
    env: Mapping[str, str] | None = None,
    max_restarts: int | None = None,
) -> Iterator[Running]:
    """Start a script on `processes` processes of this machine's CPU, and kill whatever is left of it at the end.

    Args:
        script: a `Path` is the script, a string is its source (indented as the test is).
        processes: with 1 the script is started by Python alone, without a launcher.
        args: the script's arguments.
        env: added to the environment; OMP_NUM_THREADS is 1 where it is not given here.
        max_restarts: how often killed workers are started anew; by default never.
    """
    launch_id = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="accel-launch-") as name:
        folder = Path(name)
        if isinstance(script, str):
            source, script = script, folder / "script.py"
            script.write_text(textwrap.dedent(source))
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            # Files, not pipes: a pipe stays open as long as any orphan lives, and whoever reads it hangs.
            process = subprocess.Popen(
                command_of(script, processes, args, max_restarts, folder / "logs"),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=environment_of(launch_id, env, max_restarts is not None),
                start_new_session=True,
            )
        running = Running(process, launch_id, folder)
        try:
            yield running
        finally:
            running.kill()


def launch(
    script: Path | str,
    processes: int = 2,
    args: Sequence[object] = (),
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    max_restarts: int | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a script on `processes` processes of this machine's CPU to its end; see `start` for the arguments.

    Returns what `subprocess.run` would: `returncode`, `stdout` and `stderr`, of all processes together.

    Args:
        timeout: in seconds, for all of it. Two processes need about ten only to import torch and accelerate.
        check: whether an exit code other than 0 fails the test.

    Raises:
        AssertionError: the script failed, or was too slow; with all that it printed. No process is left in
            any case.
    """
    with start(script, processes, args, env, max_restarts) as running:
        finished = running.wait(timeout)
        if check and finished.returncode != 0:
            raise AssertionError(running._told(f"ended with exit code {finished.returncode}"))
        return finished


def wait_until(condition: Callable[[], object], running: Running, timeout: float = 60.0) -> None:
    """Wait until `condition` is true; fail, with what was printed, if the script ends or the time is over before."""
    give_up = time.monotonic() + timeout
    while not condition():
        if running.process.poll() is not None and not condition():
            raise AssertionError(
                running._told(f"ended with exit code {running.process.returncode} too early")
            )
        if time.monotonic() > give_up:
            raise AssertionError(running._told(f"did not get there within {timeout:g} seconds"))
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    """Whether the process still runs; one that has ended and that its parent has not asked for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(
    script: Path, processes: int, args: Sequence[object], max_restarts: int | None, logs: Path
) -> list[str]:
    """The command that starts a script; see `start`. What a launcher logs goes to the folder `logs`."""
    arguments = [str(script), *map(str, args)]
    if processes == 1:
        return [sys.executable, *arguments]
    # Without it torch makes a folder for logs at each launch, and leaves it behind.
    arguments = ["--log_dir", str(logs), *arguments]
    if max_restarts is not None:
        # The static rendezvous does not take workers back, and for any other `accelerate launch` always uses
        # port 29400 and one name, so that two launches at a time mix. torchrun --standalone chooses a port
        # that is free, and a name.
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        return [*launcher, "--max_restarts", str(max_restarts), *arguments]
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
    ]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), *arguments]


def environment_of(launch_id: str, env: Mapping[str, str] | None, restarts: bool) -> dict[str, str]:
    """The variables of a launch, without those of another launcher around it."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANKS and not name.startswith(_SET_BY_LAUNCHERS)
    }
    defaults = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if restarts:
        # Else restarted workers find the addresses of the dead ones in the store of torchrun's agent, which
        # is kept.
        defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    variables = {**inherited, **defaults, **(env or {}), _LAUNCH_ID: launch_id}
    paths = filter(None, [str(_WHOLE_LINES), variables.get("PYTHONPATH")])
    return {**variables, "PYTHONPATH": os.pathsep.join(paths)}


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
