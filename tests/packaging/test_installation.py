"""Each distribution and each extra, installed from wheels or sdists into an environment that has only what they ask for."""

import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from installing import IMPORT_NAMES, REPOSITORY, Environment, run

pytestmark = pytest.mark.slow

# What a new user would try first with what is installed. Each trains.
TRAIN = """
    import torch
    from torch.utils.data import TensorDataset
    from accel_core import Trainer

    data = TensorDataset(torch.randn(64, 5), torch.arange(64) % 2)
    model = torch.nn.Linear(5, 2)
    parts = (model, torch.nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    """
CORE = """
    trainer = Trainer(*parts)
    trainer.train(data, num_epochs=2, eval_dataset=data)
    assert len(trainer.run_history.get_metric_values("eval_loss_epoch")) == 2
    """
CALLBACKS = """
    from accel_callbacks import DEFAULT_CALLBACKS, SaveTrainingStateCallback
    from accel_core import latest_checkpoint

    trainer = Trainer(*parts, callbacks=(SaveTrainingStateCallback("states", save_every_n_epochs=1), *DEFAULT_CALLBACKS))
    trainer.train(data, num_epochs=2)
    trainer.train(data, num_epochs=3, resume_from=latest_checkpoint("states"))
    assert trainer.run_progress.epochs_completed == 3
    """
TORCHMETRICS = """
    from accel_callbacks import MetricsCallback
    from torchmetrics.classification import MulticlassAccuracy

    trainer = Trainer(*parts, callbacks=[MetricsCallback({"accuracy": MulticlassAccuracy(num_classes=2)})])
    trainer.train(data, num_epochs=1, eval_dataset=data)
    assert 0 <= trainer.run_history.get_latest_metric("accuracy") <= 1
    """
MATPLOTLIB = """
    from pathlib import Path
    from accel_callbacks import plot_history

    plot_history(Trainer(*parts).train(data, num_epochs=1), "history.png")
    assert Path("history.png").stat().st_size > 1000
    """
TRACKERS = """
    from pathlib import Path
    from accel_callbacks import TrackerCallback

    Trainer(*parts, callbacks=[TrackerCallback("tensorboard", "digits", logging_dir="logs")]).train(data, num_epochs=1)
    assert list(Path("logs").rglob("events.out.tfevents*"))
    """
SCHEDULERS = """
    from accel_integrations.schedulers import CosineLrScheduler

    Trainer(*parts).train(data, num_epochs=2, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn())
    assert parts[2].param_groups[0]["lr"] < 0.1
    """
TIMM = """
    from accel_integrations.timm_adapter import TimmTrainer, create_timm_model

    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    model = create_timm_model("test_resnet", num_classes=2, pretrained=False)
    TimmTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), num_classes=2).train(images, num_epochs=1)
    """
TRANSFORMERS = """
    from transformers import BertConfig, BertForSequenceClassification
    from accel_integrations.transformers_adapter import TransformersTrainer

    sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    bert = BertForSequenceClassification(BertConfig(**sizes))
    texts = [{"input_ids": torch.arange(6), "attention_mask": torch.ones(6), "labels": torch.tensor(n % 2)} for n in range(8)]
    TransformersTrainer(bert, optimizer=torch.optim.SGD(bert.parameters(), lr=0.1)).train(texts, num_epochs=1)
    """

MATRIX = {
    "accel-core": (CORE,),
    "accel-core[callbacks]": (CORE, CALLBACKS),
    "accel-core[timm]": (CORE, TIMM),
    "accel-core[transformers]": (CORE, TRANSFORMERS),
    "accel-callbacks[torchmetrics]": (CALLBACKS, TORCHMETRICS),
    "accel-callbacks[matplotlib]": (CALLBACKS, MATPLOTLIB),
    "accel-callbacks[tensorboard]": (CALLBACKS, TRACKERS),
    "accel-integrations": (SCHEDULERS,),
}
EVERYTHING = (CORE, CALLBACKS, TORCHMETRICS, MATPLOTLIB, TRACKERS, SCHEDULERS, TIMM, TRANSFORMERS)


def program(*parts: str) -> str:
    return "".join(textwrap.dedent(part) for part in (TRAIN, *parts))


@pytest.fixture(scope="module")
def with_everything(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment") / "everything")
    environment.install("accel-core[all]", wheels=distributions)
    return environment


@pytest.mark.parametrize("wanted", MATRIX)
def test_what_was_asked_for_trains(wanted: str, distributions: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install(wanted, wheels=distributions)
    environment.run("-c", program(*MATRIX[wanted]))


def test_all_of_it_trains(with_everything: Environment) -> None:
    with_everything.run("-c", program(*EVERYTHING))
    with_everything.pip("check")


def test_sdists_install_outside_the_repository(distributions: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install("accel-core[callbacks]", "accel-integrations", wheels=distributions, sdists=True)
    environment.run("-c", program(CORE, CALLBACKS, SCHEDULERS))


def test_core_brings_torch_and_accelerate_and_nothing_of_ours(distributions: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.install("accel-core", wheels=distributions)
    for name in (
        "accel_callbacks",
        "accel_integrations",
        "torchmetrics",
        "timm",
        "transformers",
        "matplotlib",
    ):
        assert (
            environment.run("-c", f"import importlib.util; print(importlib.util.find_spec({name!r}))").strip()
            == "None"
        )


def test_the_wheels_pass_tests_without_the_repository(with_everything: Environment, tmp_path: Path) -> None:
    """The core of the suite: the loop, resuming, saving, and a launch of two processes."""
    wanted = (
        "accel-core/test_training_loop.py",
        "accel-core/test_resume.py",
        "accel-core/test_distributed.py",
    )
    shutil.copytree(
        REPOSITORY / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "packaging")
    )
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with_everything.borrow(
        map(Requirement, ("pytest", "pytest-timeout", "hypothesis", "psutil", "scikit-learn", "pandas"))
    )
    for name in IMPORT_NAMES.values():
        where = with_everything.run("-c", f"import {name}; print({name}.__file__)").strip()
        assert Path(where).is_relative_to(with_everything.site_packages)
    command = [
        with_everything.python,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        *(f"tests/{name}" for name in wanted),
    ]
    assert " passed" in run(command, cwd=tmp_path, timeout=250)


def test_a_typed_program_passes_a_strict_type_checker(with_everything: Environment, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("typed_program.py"), tmp_path)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--python-executable",
        with_everything.python,
        "typed_program.py",
    ]
    assert "Success" in run(command, cwd=tmp_path, timeout=280)
    # In a folder of its own: where the environment lies, other tests have left states of theirs.
    folder = repr(str(tmp_path))
    import_and_run = (
        f"import sys; sys.path.insert(0, {folder}); import typed_program as t; t.main(t.Path({folder}))"
    )
    with_everything.run("-c", import_and_run)


def test_pip_itself_installs_a_core_that_trains(distributions: Path, tmp_path: Path) -> None:
    """With nothing borrowed: pip chooses and installs torch and accelerate."""
    environment = Environment(tmp_path / "environment")
    (wheel,) = distributions.glob("accel_core-*.whl")
    environment.pip("install", "--no-compile", wheel, timeout=290)
    environment.run("-c", program(CORE))
    shutil.rmtree(environment.folder)
