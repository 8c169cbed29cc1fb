"""What holds for every test: one thread for each process, no state of accelerate left behind, and whether it is quick."""

import os
from collections.abc import Iterator

# Read when torch is imported, here and in the processes that tests start: several of them share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from case_runner import Outcome, compare
from quick import Stopwatch, is_quick, read_lengthy_tests

torch.set_num_threads(1)
# Modules that hold assertions, which tell what they compare only where pytest rewrites them.
pytest.register_assert_rewrite(
    "ways_out", "notices", "layout_promises", "layout_limits", "sharding_promises", "fsdp2_promises"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-lengthy-tests",
        action="store_true",
        help="with -m quick: measure all that might be quick, and write tests/lengthy_tests.txt",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "quick":
        config.pluginmanager.register(Stopwatch(config.option.write_lengthy_tests))
    elif config.option.write_lengthy_tests:
        raise pytest.UsageError("--write-lengthy-tests measures what `-m quick` chooses: pass that too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what belongs to the inner loop, before `-m` chooses."""
    lengthy = frozenset() if config.option.write_lengthy_tests else frozenset(read_lengthy_tests())
    for item in items:
        if isinstance(item, pytest.Function) and is_quick(item, lengthy):
            item.add_marker("quick")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Forget accelerate's singletons, as a second `Accelerator` with other settings would fail in the same process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def deepspeed_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every accelerator the configuration that the engine of DeepSpeed reads, without DeepSpeed."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {}})
    monkeypatch.setattr(Accelerator, "deepspeed_plugin", plugin)


@pytest.fixture(scope="module")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What the CASES of the test file give on two processes: see case_runner."""
    return compare(request.module.CASES, request.module.__file__, 2, tmp_path_factory.mktemp("cases"))
