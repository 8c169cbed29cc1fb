"""Build the distributions, and install them into fresh environments that have nothing else than they ask for.

    environment = Environment(tmp_path / "environment")
    environment.install("accel-core[timm]", wheels=folder)
    environment.run("-c", "import timm, accel_core")

PyTorch takes gigabytes. An environment therefore borrows what others have written: for each requirement of
what is installed, and theirs in turn, it gets a link into the environment that runs the tests, and for
nothing else. pip then resolves and installs our own distributions without an index.
"""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from email import message_from_string
from email.message import Message
from functools import cache
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
IMPORT_NAMES = {
    "accel-core": "accel_core",
    "accel-callbacks": "accel_callbacks",
    "accel-integrations": "accel_integrations",
}


def build(project: Path, folder: Path, *targets: str) -> None:
    """Build `targets` ("wheel", "sdist") of the project into `folder`, with the build backend that pip uses too."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder]
    for target in targets:
        command += ["--target", target]
    run(command, cwd=project)


def run(command: list[str | Path], cwd: Path, timeout: float = 120.0, **environment: str) -> str:
    """Run a command without the variables that lead to this repository, and return what it printed."""
    leading = ("PYTHONPATH", "VIRTUAL_ENV", "HATCH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(leading)}
    finished = subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


class Environment:
    """A virtual environment in `folder` that sees nothing of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        (self.site_packages,) = folder.glob("[Ll]ib/**/site-packages")

    def install(self, *wanted: str, wheels: Path, sdists: bool = False) -> None:
        """Install those of our distributions that `wanted` names, from the wheels or sdists in the folder, with all they need."""
        self.borrow(_foreign_requirements(map(Requirement, wanted), wheels))
        options: list[str | Path] = ["--no-index", "--find-links", wheels]
        if sdists:
            self.borrow([Requirement("hatchling")])
            options += ["--no-binary", ",".join(IMPORT_NAMES), "--no-build-isolation"]
        self.pip("install", *options, *wanted)

    def pip(self, *arguments: str | Path, timeout: float = 120.0) -> None:
        run(
            [sys.executable, "-m", "pip", "--python", self.python, *arguments],
            cwd=self.folder,
            timeout=timeout,
        )

    def run(self, *arguments: str | Path, timeout: float = 120.0) -> str:
        """Run this environment's Python in its folder; warnings are errors, as in the tests."""
        return run([self.python, *arguments], cwd=self.folder, timeout=timeout, PYTHONWARNINGS="error")

    def borrow(self, wanted: Iterable[Requirement]) -> None:
        """Link to everything that `wanted` needs."""
        for name in _closure(wanted):
            for place, entry in _entries(name):
                link = self.site_packages / entry
                if not link.exists():
                    link.symlink_to(place / entry)


def _foreign_requirements(wanted: Iterable[Requirement], wheels: Path) -> list[Requirement]:
    """What others have to provide for those of our distributions that `wanted` names."""
    waiting, seen, foreign = list(wanted), set(), []
    while waiting:
        requirement = waiting.pop()
        if requirement.name not in IMPORT_NAMES:
            foreign.append(requirement)
        elif str(requirement) not in seen:
            seen.add(str(requirement))
            (wheel,) = wheels.glob(f"{IMPORT_NAMES[requirement.name]}-*.whl")
            waiting += [
                needed
                for needed in requirements(wheel_metadata(wheel))
                if _applies(needed, requirement.extras)
            ]
    return foreign


def _closure(wanted: Iterable[Requirement]) -> set[str]:
    """The names of installed distributions that `wanted` needs, directly or not; each has to be of a fitting version."""
    waiting, seen, names = list(wanted), set(), set()
    while waiting:
        requirement = waiting.pop()
        if (canonicalize_name(requirement.name), *sorted(requirement.extras)) in seen:
            continue
        seen.add((canonicalize_name(requirement.name), *sorted(requirement.extras)))
        found = distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), (
            f"{requirement} is installed as {found.version}"
        )
        names.add(requirement.name)
        needed = map(Requirement, found.requires or [])
        waiting += [further for further in needed if _applies(further, requirement.extras)]
    return names


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
    )


@cache
def _entries(name: str) -> list[tuple[Path, str]]:
    """The files and folders at the top of site-packages that a distribution consists of."""
    found: Distribution = distribution(name)
    place = Path(str(found.locate_file("")))
    tops = {line.split(",")[0].split("/")[0] for line in (found.read_text("RECORD") or "").splitlines()}
    return [(place, top) for top in sorted(tops - {"..", "__pycache__", ""}) if (place / top).exists()]
