"""Two hosts on this machine: two network namespaces with a cable between them, and a disk each if asked for.

Nothing leaves them: each has its loopback, one end of the cable and no route to anywhere else.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from launching import free_port, launch

NETWORK = "192.0.2"
"""Addresses that are reserved for documentation, so that they are nobody's."""
CABLE = "cable"


def ip(*arguments: str) -> str:
    """Run `ip`, and return what it prints."""
    finished = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=True)
    return finished.stdout


class Hosts:
    """The namespaces of two hosts; made by `two_hosts`."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def received(self) -> list[int]:
        """Return how many bytes have come through the cable to each host."""
        told = [json.loads(ip("-n", name, "-json", "-stats", "link", "show", CABLE)) for name in self.names]
        return [link[0]["stats64"]["rx"]["bytes"] for link in told]

    def launch(
        self,
        script: Path,
        args: Sequence[object],
        disks: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as one job, by a launcher and one process on each host, to its end.

        Args:
            env: added to the environment.
            disks: an empty folder. At its place each host sees a folder of its own, kept beside it.
        """
        arguments = [*self.names, "-" if disks is None else disks, free_port(), script, *args]
        return launch(Path(__file__), processes=1, args=arguments, timeout=200, env=env)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts, and remove them whatever happens; skip the test if this machine allows none."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` of iproute2 is missing, so there are no two hosts")
    names = [f"accel-{uuid.uuid4().hex[:8]}-{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", CABLE, "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"{NETWORK}.{number}/30", "dev", CABLE)
                ip("-n", name, "link", "set", CABLE, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.strip()}")
        yield Hosts(names)


def command_on(number: int, name: str, disks: Path | None, port: str, script: Sequence[str]) -> list[str]:
    """Return the command that starts the launcher of one host."""
    # `ip netns exec` gives it mounts of its own.
    enter = ["ip", "netns", "exec", name]
    if disks is not None:
        own = disks.with_name(f"{disks.name}_of_host_{number}")
        own.mkdir(exist_ok=True)
        enter += ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(own), str(disks)]
    # Else gloo looks for the address of the host's name.
    launcher = ["env", f"GLOO_SOCKET_IFNAME={CABLE}", sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(number)]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*enter, *launcher, "--main_process_ip", f"{NETWORK}.1", "--main_process_port", port, *script]


def main(one: str, other: str, disks: str, port: str, *script: str) -> int:
    """Start both launchers, and wait for them; `launch` ends whatever is left."""
    place = None if disks == "-" else Path(disks)
    started = [
        subprocess.Popen(command_on(number, name, place, port, script))
        for number, name in enumerate((one, other))
    ]
    # Both have to end, also after one has failed.
    ended = [process.wait() for process in started]
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
