"""Arrows point one way, files stay small, and importing a package does nothing: read from the source itself."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = {
    "accel_core": REPOSITORY / "packages/accel-core/src/accel_core",
    "accel_callbacks": REPOSITORY / "packages/accel-callbacks/src/accel_callbacks",
    "accel_integrations": REPOSITORY / "packages/accel-integrations/src/accel_integrations",
}
SIBLINGS = {"accel_callbacks": "accel_integrations", "accel_integrations": "accel_callbacks"}
THIRD_PARTY_OF_CORE = {"torch", "accelerate", "numpy", "safetensors", "fsspec"}

MAX_LINES_OF_A_FILE = 300
MAX_LINES_OF_TRAINER = 800
MAX_LINES_OF_A_FUNCTION = 45
MAX_FILES_BESIDE_THE_ROOMS = 12
MIN_COMMENTS_IN_100_LINES_OF_CODE = 4

LEVELS_OF_CORE = (
    ("trainer", "extending", "verify", "compare", "testing"),
    ("proving",),
    ("replay",),
    ("run",),
    ("callbacks", "engines"),
    ("data",),
    ("state",),
    ("checks", "foreign_names"),
    ("processes",),
    ("notices", "representation"),
    ("errors", "text", "screen", "__about__"),
)
"""The rooms of the core from the top down: a room imports itself and what stands below it."""


class Import(NamedTuple):
    """One imported name: `from accel_core.errors import AccelError` is `accel_core.errors.AccelError`."""

    target: str
    line: int
    only_for_types: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path) -> dict[str, Path]:
    return {module_name(path, root): path for path in sorted(root.rglob("*.py"))}


def imports_of(source: str, module: str = "", is_package: bool = False) -> list[Import]:
    """Every import in the file, in functions too."""
    return list(_imports(ast.parse(source).body, module if is_package else module.rpartition(".")[0], False))


def _imports(nodes: list[ast.AST], package: str, only_for_types: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, only_for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            yield from (Import(f"{base}.{alias.name}", node.lineno, only_for_types) for alias in node.names)
        elif isinstance(node, ast.If) and _tests_type_checking(node.test):
            yield from _imports(node.body, package, True)
            yield from _imports(node.orelse, package, only_for_types)
        else:
            yield from _imports(list(ast.iter_child_nodes(node)), package, only_for_types)


def _tests_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@functools.cache
def imports_in(path: Path, root: Path) -> list[Import]:
    """The imports of a file, parsed once for all tests."""
    return imports_of(path.read_text(encoding="utf-8"), module_name(path, root), path.name == "__init__.py")


def imported_module(target: str, modules: dict[str, Path]) -> str | None:
    """The module among `modules` that is imported: a name in a module stands for the module."""
    if target in modules:
        return target
    parent = target.rpartition(".")[0]
    return parent if parent in modules else None


def find_circle(arrows: dict[str, set[str]]) -> list[str] | None:
    finished: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            for target in sorted(arrows.get(module, ())):
                if circle := follow(target, [*path, module]):
                    return circle
            finished.add(module)
        return None

    for module in sorted(arrows):
        if circle := follow(module, []):
            return circle
    return None


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_core_imports_only_what_it_depends_on():
    allowed = sys.stdlib_module_names | THIRD_PARTY_OF_CORE | {"accel_core"}
    root = SOURCES["accel_core"]
    foreign = [
        f"{path.name}:{found.line} imports {found.target}"
        for path in modules_of(root).values()
        for found in imports_in(path, root)
        if found.target.partition(".")[0] not in allowed
    ]
    assert not foreign


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_do_not_import_each_other(package):
    root = SOURCES[package]
    found_siblings = [
        f"{path.name}:{found.line} imports {found.target}"
        for path in modules_of(root).values()
        for found in imports_in(path, root)
        if found.target.partition(".")[0] == SIBLINGS[package]
    ]
    assert not found_siblings


DOORS = ("accel_core", "accel_core.extending")


def behind_the_doors(target: str, modules_of_core: Iterable[str]) -> bool:
    """Whether an import of the core is neither one of its doors nor a name in one of them."""
    if target.partition(".")[0] != "accel_core" or target in DOORS:
        return False
    return target in modules_of_core or target.rpartition(".")[0] not in DOORS


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_come_by_the_doors_of_the_core(package):
    root, modules_of_core = SOURCES[package], modules_of(SOURCES["accel_core"])
    behind = [
        f"{path.name}:{found.line} imports {found.target}"
        for path in modules_of(root).values()
        for found in imports_in(path, root)
        if behind_the_doors(found.target, modules_of_core)
    ]
    assert not behind


PRIVATE_OF_TRAINER = re.compile(r"\b(trainer|trial)\._(?!_)")


@pytest.mark.parametrize("package", SIBLINGS)
def test_siblings_touch_no_private_attribute_of_a_trainer(package):
    touched = [
        f"{path.name}:{number}: {line.strip()}"
        for path in modules_of(SOURCES[package]).values()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if PRIVATE_OF_TRAINER.search(line)
    ]
    assert not touched


@pytest.mark.parametrize("package", SOURCES)
def test_modules_import_each_other_without_a_circle_also_for_types(package):
    root = SOURCES[package]
    modules = modules_of(root)
    arrows = {
        module: {
            target
            for found in imports_in(path, root)
            if (target := imported_module(found.target, modules)) is not None
            # The one circle there is: callbacks name the trainer that calls them.
            and not (found.only_for_types and target == "accel_core.trainer")
        }
        for module, path in modules.items()
    }
    assert find_circle(arrows) is None


def test_nothing_imports_the_trainer_but_the_door_of_the_package():
    """Callbacks name it, for types only."""
    importers = [
        f"{module}:{found.line}"
        for root in SOURCES.values()
        for module, path in modules_of(root).items()
        for found in imports_in(path, root)
        if f"{found.target}.".startswith("accel_core.trainer.") and module != "accel_core"
        if not (found.only_for_types and module.startswith("accel_core.callbacks."))
    ]
    assert not importers


def room_of(module: str) -> str:
    """The room of the core in which a module lives, or the module itself: `accel_core.data.order` is in `data`."""
    return module.split(".")[1] if "." in module else ""


def test_rooms_import_only_what_stands_below_them():
    modules = modules_of(SOURCES["accel_core"])
    level_of = {room: level for level, rooms in enumerate(LEVELS_OF_CORE) for room in rooms}
    assert {room_of(module) for module in modules} - {""} == set(level_of)
    upwards = [
        f"{module}:{found.line} imports {target}"
        for module, path in modules.items()
        for found in imports_in(path, SOURCES["accel_core"])
        if (target := imported_module(found.target, modules))
        and room_of(module) != room_of(target)
        and room_of(module)
        # Callbacks name the trainer, for types only.
        if not (room_of(target) == "trainer" and found.only_for_types)
        if room_of(target) and level_of[room_of(target)] <= level_of[room_of(module)]
    ]
    assert not upwards


def test_few_files_stand_beside_the_rooms():
    files = [path.name for path in SOURCES["accel_core"].glob("*.py")]
    assert len(files) <= MAX_FILES_BESIDE_THE_ROOMS


@pytest.mark.parametrize("package", SOURCES)
def test_files_stay_small(package):
    root = SOURCES[package]
    limits = {"accel_core/trainer.py": MAX_LINES_OF_TRAINER}
    too_long = [
        f"{name} has {lines_of(path)} lines"
        for path in modules_of(root).values()
        if lines_of(path) > limits.get(name := path.relative_to(root.parent).as_posix(), MAX_LINES_OF_A_FILE)
    ]
    assert not too_long


def test_the_trainer_is_one_class():
    tree = ast.parse((SOURCES["accel_core"] / "trainer.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [(node.name, node.bases) for node in classes] == [("Trainer", [])]


def test_the_trainer_has_few_private_attributes_all_made_in_its_constructor():
    tree = ast.parse((SOURCES["accel_core"] / "trainer.py").read_text())
    methods = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    stored = {name: private_attributes_stored_in(method) for name, method in methods.items()}
    made = stored.pop("__init__")
    assert len(made) <= 6
    assert set().union(*stored.values()) <= made


def private_attributes_stored_in(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr.startswith("_")
        if ast.unparse(node.value) == "self"
    }


@pytest.mark.parametrize("package", SOURCES)
def test_functions_fit_on_a_screen(package):
    long = [
        f"{path.name}: {node.name} has {lines_of_code(node)} lines"
        for path in modules_of(SOURCES[package]).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and lines_of_code(node) > MAX_LINES_OF_A_FUNCTION
    ]
    assert not long


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and its docstring."""
    body = function.body
    first = body[1:] if ast.get_docstring(function) is not None else body
    return function.end_lineno - first[0].lineno + 1 if first else 0


@pytest.mark.parametrize("package", SOURCES)
def test_comments_give_reasons_often_enough(package):
    comments = code = 0
    for path in modules_of(SOURCES[package]).values():
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        comments += len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})
        blank = (
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENCODING,
            tokenize.ENDMARKER,
        )
        code += len({token.start[0] for token in tokens if token.type not in blank})
    assert 100 * comments / code >= MIN_COMMENTS_IN_100_LINES_OF_CODE


def test_one_file_asks_accelerate_which_engine_runs():
    root = SOURCES["accel_core"]
    asking = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if "distributed_type" in path.read_text()
    ]
    assert asking == ["engines/choose.py"]


@pytest.mark.parametrize("package", SOURCES)
def test_importing_has_no_side_effect(package):
    """Compared with importing torch and accelerate alone, which every user of the package has imported anyway."""
    script = f"""
        import logging, random, sys, warnings
        import accelerate, numpy, torch, torch.distributed

        def state():
            return {{
                "python's random state": random.getstate(),
                "numpy's random state": [part.tolist() if hasattr(part, "tolist") else part
                                         for part in numpy.random.get_state()],
                "torch's random state": torch.random.get_rng_state().tolist(),
                "CUDA": torch.cuda.is_initialized(),
                "process group": torch.distributed.is_initialized(),
                "threads": torch.get_num_threads(),
                "accelerate": accelerate.state.PartialState._shared_state.copy(),
                "logging": (logging.getLogger().handlers, logging.getLogger().level),
                "logging of accel": logging.getLogger("accel_core").handlers,
                "warnings": list(warnings.filters),
            }}

        before, modules_before = state(), set(sys.modules)
        import {package}
        after = state()
        assert before == after, [name for name in before if before[name] != after[name]]

        added = {{name.partition(".")[0] for name in set(sys.modules) - modules_before}}
        added |= {{name for name in set(sys.modules) - modules_before if name == "tqdm.notebook"}}
        print(*added)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    never = {
        "torchmetrics",
        "timm",
        "transformers",
        "torchvision",
        "matplotlib",
        "tensorboard",
        "tqdm.notebook",
    }
    never |= {"accel_callbacks", "accel_integrations"} - {package}
    assert set(finished.stdout.split()) & never == set()


class TestTheReadingItself:
    """The rules above would pass on any source if reading it found nothing."""

    def test_imports_inside_functions_are_found(self):
        source = "def f():\n    try:\n        import timm.data\n    except ImportError:\n        from torch import nn\n"
        assert imports_of(source) == [Import("timm.data", 3, False), Import("torch.nn", 5, False)]

    def test_imports_for_types_are_told_apart(self):
        source = "if TYPE_CHECKING:\n    from a import b\nelse:\n    import c\n"
        assert imports_of(source) == [Import("a.b", 2, True), Import("c", 4, False)]

    def test_relative_imports_are_resolved(self):
        assert imports_of("from . import b\nfrom .c import d", "package.a") == [
            Import("package.b", 1, False),
            Import("package.c.d", 2, False),
        ]
        assert imports_of("from .a import b", "package", is_package=True) == [Import("package.a.b", 1, False)]

    def test_ways_around_the_doors_are_found(self):
        modules = ["accel_core", "accel_core.errors", "accel_core.extending", "accel_core.run.run"]
        for target in (
            "accel_core.errors",
            "accel_core.errors.AccelError",
            "accel_core.run.run",
            "accel_core.run.x.y",
        ):
            assert behind_the_doors(target, modules)
        for target in (
            "accel_core",
            "accel_core.Trainer",
            "accel_core.extending.files",
            "accel_callbacks.periodic.Periodic",
        ):
            assert not behind_the_doors(target, modules)

    def test_private_attributes_of_a_trainer_are_found(self):
        for line in ("trainer._run = 1", "x = self.trainer._run", "trial._engine"):
            assert PRIVATE_OF_TRAINER.search(line)
        for line in ("trainer.run", "retrainer._run", "self._trainer.run", "trainer.__class__"):
            assert not PRIVATE_OF_TRAINER.search(line)

    def test_circles_are_found(self):
        assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
        assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None

    def test_every_package_has_source_files(self):
        assert all(modules_of(root) for root in SOURCES.values())
