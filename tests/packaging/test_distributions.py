"""What is installed is only the package, and the three distributions fit each other and no other version."""

import runpy
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
IMPORT_NAMES = {
    "accel-core": "accel_core",
    "accel-callbacks": "accel_callbacks",
    "accel-integrations": "accel_integrations",
}
VERSION = runpy.run_path(str(REPOSITORY / "packages/accel-core/src/accel_core/__about__.py"))["__version__"]


class Built:
    """The files that one distribution was built into."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.import_name = IMPORT_NAMES[name]
        (self.wheel,) = folder.glob(f"{self.import_name}-*.whl")
        (self.sdist,) = folder.glob(f"{self.import_name}-*.tar.gz")

    def wheel_files(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    def metadata(self) -> Message:
        return wheel_metadata(self.wheel)


def wheel_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def build(project: Path, folder: Path, *targets: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    for target in targets:
        command += ["--target", target]
    finished = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.fixture(scope="module", params=IMPORT_NAMES)
def built(request, tmp_path_factory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    build(REPOSITORY / "packages" / request.param, folder, "wheel", "sdist")
    return Built(request.param, folder)


@pytest.mark.slow
class TestBuilt:
    """Builds every distribution, with the build backend that `pip` uses too."""

    def test_all_have_the_one_version(self, built):
        assert built.metadata()["Version"] == VERSION

    def test_a_wheel_holds_only_its_package(self, built):
        source = REPOSITORY / "packages" / built.name / "src" / built.import_name
        modules = {
            f"{built.import_name}/{path.relative_to(source).as_posix()}"
            for path in source.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        info = f"{built.import_name}-{VERSION}.dist-info"
        assert built.wheel_files() == modules | {
            f"{info}/METADATA",
            f"{info}/RECORD",
            f"{info}/WHEEL",
            f"{info}/licenses/LICENSE",
        }

    def test_a_wheel_says_that_it_is_typed(self, built):
        assert f"{built.import_name}/py.typed" in built.wheel_files()

    def test_nothing_is_pinned_from_above_but_the_siblings(self, built):
        for requirement in requirements(built.metadata()):
            operators = {specifier.operator for specifier in requirement.specifier}
            if requirement.name in IMPORT_NAMES:
                assert str(requirement.specifier) == f"=={VERSION}"
            else:
                assert operators <= {">="}

    def test_an_sdist_builds_the_same_wheel_outside_the_repository(self, built, tmp_path):
        with tarfile.open(built.sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        (unpacked,) = tmp_path.iterdir()
        build(unpacked, tmp_path / "dist", "wheel")
        (wheel,) = (tmp_path / "dist").glob("*.whl")
        assert wheel.name == built.wheel.name
        assert wheel_metadata(wheel).as_string() == built.metadata().as_string()
        with zipfile.ZipFile(wheel) as archive:
            assert set(archive.namelist()) == built.wheel_files()


@pytest.mark.slow
def test_siblings_are_pinned_in_both_directions(tmp_path):
    pins = {}
    for name in IMPORT_NAMES:
        build(REPOSITORY / "packages" / name, tmp_path, "wheel")
        (wheel,) = tmp_path.glob(f"{IMPORT_NAMES[name]}-*.whl")
        pins[name] = {str(requirement) for requirement in requirements(wheel_metadata(wheel)) if requirement.name in IMPORT_NAMES}
    assert pins == {
        "accel-core": {
            f'accel-callbacks=={VERSION}; extra == "callbacks"',
            f'accel-integrations[timm]=={VERSION}; extra == "timm"',
            f'accel-integrations[transformers]=={VERSION}; extra == "transformers"',
            f'accel-callbacks[matplotlib,torchmetrics,trackers]=={VERSION}; extra == "all"',
            f'accel-integrations[timm,transformers]=={VERSION}; extra == "all"',
        },
        "accel-callbacks": {f"accel-core=={VERSION}"},
        "accel-integrations": {f"accel-core=={VERSION}"},
    }


def test_the_build_hook_is_the_same_in_every_distribution():
    hooks = {(REPOSITORY / "packages" / name / "hatch_build.py").read_text() for name in IMPORT_NAMES}
    assert len(hooks) == 1


def test_the_license_is_the_same_everywhere():
    folders = [REPOSITORY, *(REPOSITORY / "packages" / name for name in IMPORT_NAMES)]
    assert len({(folder / "LICENSE").read_text() for folder in folders}) == 1


@pytest.mark.parametrize("name", IMPORT_NAMES)
def test_what_describes_a_distribution_is_the_same(name):
    def described(name):
        project = tomllib.loads((REPOSITORY / "packages" / name / "pyproject.toml").read_text())["project"]
        return {field: project[field] for field in ("requires-python", "license", "authors", "classifiers")}

    assert described(name) == described("accel-core")
