"""What is installed is only the package, and the three distributions fit each other and no other version."""

import ast
import importlib.metadata
import re
import runpy
import shutil
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from installing import IMPORT_NAMES, REPOSITORY, build, requirements, run, wheel_metadata

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


@pytest.fixture(scope="module", params=IMPORT_NAMES)
def built(request, distributions) -> Built:
    return Built(request.param, distributions)


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

    def test_an_sdist_holds_the_package_and_what_builds_and_describes_it(self, built):
        with tarfile.open(built.sdist) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        package = {
            f"src/{name}" for name in built.wheel_files() if not name.startswith(f"{built.import_name}-")
        }
        others = {
            "pyproject.toml",
            "hatch_build.py",
            "README.md",
            "CHANGELOG.md",
            "LICENSE",
            "PKG-INFO",
            ".gitignore",
        }
        assert names == package | others

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
def test_siblings_are_pinned_in_both_directions(distributions):
    pins = {}
    for name in IMPORT_NAMES:
        metadata = Built(name, distributions).metadata()
        pins[name] = {
            str(requirement) for requirement in requirements(metadata) if requirement.name in IMPORT_NAMES
        }
    assert pins == {
        "accel-core": {
            f'accel-callbacks=={VERSION}; extra == "callbacks"',
            f'accel-integrations[timm]=={VERSION}; extra == "timm"',
            f'accel-integrations[transformers]=={VERSION}; extra == "transformers"',
            f'accel-callbacks[torchmetrics]=={VERSION}; extra == "torchmetrics"',
            f'accel-callbacks[matplotlib]=={VERSION}; extra == "matplotlib"',
            f'accel-callbacks[tensorboard]=={VERSION}; extra == "tensorboard"',
            f'accel-callbacks[optuna]=={VERSION}; extra == "optuna"',
            f'accel-callbacks[matplotlib,optuna,tensorboard,torchmetrics]=={VERSION}; extra == "all"',
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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("hatch") is None, reason="needs the command hatch")
def test_one_command_gives_all_three_a_new_version(tmp_path):
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "packages", tmp_path / "packages", ignore=without_caches)
    run(["hatch", "version", "1.2.3"], cwd=tmp_path, HATCH_DATA_DIR=str(tmp_path / "hatch"))
    for name, import_name in IMPORT_NAMES.items():
        build(tmp_path / "packages" / name, tmp_path / "dist", "wheel")
        metadata = wheel_metadata(tmp_path / "dist" / f"{import_name}-1.2.3-py3-none-any.whl")
        siblings = [requirement for requirement in requirements(metadata) if requirement.name in IMPORT_NAMES]
        assert siblings and {str(sibling.specifier) for sibling in siblings} == {"==1.2.3"}


def project_of(name: str) -> dict:
    return tomllib.loads((REPOSITORY / "packages" / name / "pyproject.toml").read_text())["project"]


def test_the_oldest_libraries_that_are_allowed_are_those_that_are_tested():
    allowed = {
        str(requirement) for requirement in project_of("accel-core")["dependencies"] if ">=" in requirement
    }
    environments = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]
    tested = [Requirement(line) for line in environments["lowest"]["dependencies"] if "==" in line]
    versions = {
        requirement.name: str(requirement.specifier).removeprefix("==").removesuffix(".0")
        for requirement in tested
    }
    assert allowed == {f"{name}>={versions[name]}" for name in ("torch", "accelerate")}


def third_parties_of(path: Path) -> set[str]:
    """The modules that a file of the tests imports when it is read, but those of Python and of the tests."""
    lines = ast.parse(path.read_text(encoding="utf-8")).body
    named = [node.module for node in lines if isinstance(node, ast.ImportFrom)]
    named += [alias.name for node in lines if isinstance(node, ast.Import) for alias in node.names]
    modules = {name.partition(".")[0] for name in named}
    helpers = {path.stem for path in (REPOSITORY / "tests").glob("*.py")}
    return modules - sys.stdlib_module_names - helpers - set(IMPORT_NAMES.values())


def test_the_tests_of_the_oldest_libraries_find_what_they_import():
    """Where one does not, pytest ends before it has run any."""
    environment = environments()["lowest"]
    folders = re.findall(r"(?<!--ignore )\btests/[\w/-]+", environment["scripts"]["test"])
    files = {path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")}
    # With what these bring in their turn.
    brought = {Requirement(line).name for line in environment["dependencies"]} | {
        "numpy",
        "safetensors",
        "nbformat",
    }
    distributions = importlib.metadata.packages_distributions()
    missing = {
        (path.name, module)
        for path in files
        for module in third_parties_of(path)
        if not brought & {name.lower() for name in distributions.get(module, [module])}
    }
    assert len(files) > 100 and not missing


def test_every_python_that_is_promised_is_tested():
    promised = [
        line.split()[-1]
        for line in project_of("accel-core")["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    workflow = (REPOSITORY / ".github" / "workflows" / "test.yml").read_text()
    versions = ", ".join(f'"{version}"' for version in promised)
    assert f"python: [{versions}]" in workflow
    assert project_of("accel-core")["requires-python"] == f">={promised[0]}"


def test_the_citation_has_the_version():
    assert f"\nversion: {VERSION}\n" in (REPOSITORY / "CITATION.cff").read_text()


def environments() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]


def offered_by(environment: str) -> set[str]:
    """The scripts of an environment, and the programs named as the packages that it installs."""
    table = environments()[environment]
    return {*table["scripts"], *(Requirement(line).name for line in table["dependencies"])}


def test_commands_of_the_documents_exist_and_start_with_an_environment_that_is_empty():
    assert "dependencies" not in environments()["default"] and environments()["default"]["detached"]
    commands = environments()["default"]["scripts"]
    for page in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / ".ci" / "run"):
        for command in re.findall(r"hatch run ([\w:-]+)", page.read_text()):
            environment, _, script = command.rpartition(":")
            assert script in (offered_by(environment) if environment else commands), command
    for command in commands.values():
        environment, _, script = command.split()[2].partition(":")
        assert script in ("python", "pytest", "pip") or script in environments()[environment]["scripts"]


def test_demo_site_and_build_install_what_they_need_alone():
    assert environments()["demo"]["dependencies"] == ["torchmetrics", "matplotlib", "scikit-learn"]
    for name in ("site", "release"):  # Detached: without the packages, and so without torch.
        assert environments()[name]["detached"]
        assert not any("torch" in line for line in environments()[name]["dependencies"])
    # virtualenv writes a file `.venv` where another environment stands beside pyproject.toml.
    paths = {name: environment["path"] for name, environment in environments().items()}
    assert paths.pop("dev") == ".venv"
    assert all(path.startswith(".venv-others/") for path in paths.values())
