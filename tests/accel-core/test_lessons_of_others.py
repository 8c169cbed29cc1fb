"""Mistakes that other trainers made, by their number: each test fails on a loop that makes the mistake."""

import ast
import copy
import pickle
import random
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from accel_core import ConfigurationError, TerminateOnNaNCallback, Trainer, TrainerCallback
from tiny import Seen, largest_difference, tiny_data, tiny_trainer, weights_of

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {path.name: path for path in sorted((REPOSITORY / "packages").iterdir()) if path.is_dir()}


# ---------------------------------------------------------------------- numbers and training


def test_lesson_1_the_logged_loss_is_not_divided_by_the_accumulation_steps() -> None:
    losses = []
    for steps in (1, 4):
        trainer = tiny_trainer(lr=0.0)
        history = trainer.train(
            tiny_data(), num_epochs=1, per_device_batch_size=4, gradient_accumulation_steps=steps
        )
        losses.append(history.get_latest_metric("train_loss_epoch"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)


def test_lesson_8_gradients_are_clipped_once_an_update_and_not_on_each_partial_sum() -> None:
    clipped_at: list[int] = []

    class Watching(Trainer):
        steps = 0

        def backward_step(self, loss: torch.Tensor) -> None:
            super().backward_step(loss)
            self.steps += 1

        def clip_gradients(self) -> None:
            clipped_at.append(self.steps)
            super().clip_gradients()

    trainers = [tiny_trainer(Watching), tiny_trainer()]
    for trainer, (batch_size, steps) in zip(trainers, ((3, 4), (12, 1)), strict=True):
        arguments = {"per_device_batch_size": batch_size, "gradient_accumulation_steps": steps}
        trainer.train(tiny_data(24), num_epochs=1, gradient_clip_value=0.01, **arguments)  # type: ignore[arg-type]
    assert clipped_at == [4, 8]
    assert largest_difference(*trainers) < 1e-14


def test_lesson_9_the_short_last_window_is_divided_by_the_steps_that_it_has() -> None:
    """Of 10 samples in batches of 2, the window of 4 steps leaves one of a single step."""
    gradients: list[torch.Tensor] = []

    class Watching(TrainerCallback):
        def on_optimizer_step_start(self, trainer: Trainer) -> None:
            gradients.append(
                torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
            )  # type: ignore[union-attr]

    arguments = {"num_epochs": 1, "per_device_batch_size": 2, "train_dataloader_kwargs": {"shuffle": False}}
    trainer = tiny_trainer(callbacks=[Watching], lr=0.0)
    trainer.train(tiny_data(10), gradient_accumulation_steps=4, **arguments)  # type: ignore[arg-type]
    inputs, targets = (tensor[8:] for tensor in tiny_data(10).tensors)
    loss = nn.functional.cross_entropy(trainer.model(inputs), targets)
    by_hand = torch.cat(
        [gradient.flatten() for gradient in torch.autograd.grad(loss, list(trainer.model.parameters()))]
    )
    assert len(gradients) == 2
    assert torch.allclose(gradients[-1], by_hand, rtol=1e-12, atol=0)


def test_lesson_10_tokens_are_counted_over_the_steps_of_an_update() -> None:
    """A mean of the means of batches would weigh the tokens of short batches more."""

    class Tokens(Trainer):
        def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
            tokens = (batch[0][:, 1].abs() * 100).long() + 1
            losses = nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            loss = (losses * tokens).sum() / tokens.sum()
            return {
                "loss": loss,
                "model_outputs": None,
                "batch_size": len(tokens),
                "num_items_in_batch": tokens.sum(),
            }

    whole, parts = tiny_trainer(Tokens), tiny_trainer(Tokens)
    whole.train(tiny_data(), num_epochs=2, per_device_batch_size=12)
    parts.train(tiny_data(), num_epochs=2, per_device_batch_size=3, gradient_accumulation_steps=4)
    assert largest_difference(whole, parts) < 1e-14


def test_lesson_11_accelerate_does_not_divide_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --gradient_accumulation_steps 4` sets this variable."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerators = (None, Accelerator(cpu=True, gradient_accumulation_steps=4))
    for accelerator in accelerators:
        trainer = tiny_trainer(accelerator=accelerator)
        before = weights_of(trainer)
        with pytest.raises(
            ConfigurationError, match=r"Accelerator .*Pass gradient_accumulation_steps=4 to train"
        ):
            trainer.train(tiny_data(), num_epochs=1)
        assert torch.equal(weights_of(trainer), before)


# ---------------------------------------------------------------------- callbacks


def test_lesson_24_a_typo_in_a_callback_is_heard() -> None:
    class Typo(TrainerCallback):
        def on_train_epoch_end(self, trainer: Trainer) -> None:
            trainer.run_histroy.reset()  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="run_histroy"):
        tiny_trainer(callbacks=[Typo]).train(tiny_data(), num_epochs=1)


def test_lesson_24_asking_copying_and_pickling_a_callback_work_as_for_any_object() -> None:
    for callback in (TrainerCallback(), TerminateOnNaNCallback(), Seen()):
        assert not hasattr(callback, "no_such_thing")
        for copied in (copy.copy(callback), copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert type(copied) is type(callback)
            assert vars(copied) == vars(callback)


def test_lesson_25_a_class_of_callbacks_may_be_used_twice() -> None:
    first, second = Seen(), Seen()
    tiny_trainer(callbacks=[first, second]).train(tiny_data(), num_epochs=1)
    assert first.samples == second.samples != []


# ---------------------------------------------------------------------- seeds


def random_state() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_lesson_26_importing_and_training_leave_the_users_seed_alone() -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
                import random, numpy, torch, accelerate
                random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
                import accel_core
                assert torch.initial_seed() == 5
                drawn = random.random(), numpy.random.rand(), torch.rand(1).item()
                random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
                assert drawn == (random.random(), numpy.random.rand(), torch.rand(1).item())
            """),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    trainer = tiny_trainer(seed=None)
    before = random_state()
    for _ in range(2):
        trainer.train(tiny_data(), num_epochs=1, eval_dataset=tiny_data(5))
    assert random_state() == before


def test_lesson_26_the_users_seed_decides_what_happens() -> None:
    def samples() -> list[float]:
        seen = Seen()
        tiny_trainer(callbacks=[seen], seed=None).train(tiny_data(), num_epochs=1)
        return seen.samples

    orders = []
    for seed in (42, 43, 42):
        torch.manual_seed(seed)
        orders.append(samples())
    assert orders[0] == orders[2] != orders[1]


class Drawing(Dataset[Any]):
    """Augments at random, in the workers too."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return torch.rand(5) + np.random.rand() + random.random(), index % 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lesson_26_what_workers_draw_can_be_had_again(num_workers: int) -> None:
    drawn = []
    for seed in (7, 7, 8):
        seen = Seen()
        trainer = tiny_trainer(callbacks=[seen], seed=seed, model=nn.Linear(5, 2))
        trainer.train(Drawing(), num_epochs=2, train_dataloader_kwargs={"num_workers": num_workers})
        drawn.append(seen.samples)
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    assert len(set(drawn[0])) == 24, "each epoch draws anew"


# ---------------------------------------------------------------------- ends of a run


class NotFinite(Trainer):
    """From the fourth update on."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        factor = float("nan") if self.run_progress.updates_completed >= 3 else 1.0
        return {**output, "loss": output["loss"] * factor}


def test_lesson_30_a_loss_that_is_not_finite_does_not_end_the_interpreter() -> None:
    """`sys.exit` would raise SystemExit here."""
    trainer = tiny_trainer(NotFinite, callbacks=[TerminateOnNaNCallback])
    history = trainer.train(tiny_data(), num_epochs=3)
    assert history is trainer.run_history
    assert "nan" in str(trainer.stop_reason)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")])
def test_lesson_31_an_exception_closes_everything_and_leaves_the_users_own_model(
    error: BaseException,
) -> None:
    closed: list[str] = []

    class Bar(TrainerCallback):
        def on_run_close(self, trainer: Trainer) -> None:
            closed.append("bar")

    class Failing(TrainerCallback):
        def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
            raise error

    trainer = tiny_trainer(callbacks=[Failing, Bar])
    model, optimizer = trainer.model, trainer.optimizer
    with pytest.raises(type(error)):
        trainer.train(tiny_data(), num_epochs=1)
    assert closed == ["bar"]
    assert trainer.model is model and trainer.optimizer is optimizer


def test_lesson_31_a_stop_skips_neither_the_later_callbacks_nor_the_count_of_the_epoch() -> None:
    heard: list[str] = []

    class Stopping(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            trainer.request_stop("early")

    class Later(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            heard.append("epoch end")

        def on_training_run_end(self, trainer: Trainer) -> None:
            heard.append("run end")

    trainer = tiny_trainer(callbacks=[Stopping, Later])
    trainer.train(tiny_data(), num_epochs=3)
    assert heard == ["epoch end", "run end"]
    assert trainer.run_progress.epochs_completed == 1


# ---------------------------------------------------------------------- the run history


def test_lesson_33_asking_for_an_unknown_metric_raises_and_creates_nothing() -> None:
    history = tiny_trainer().train(tiny_data(), num_epochs=1)
    for ask in (history.get_metric_values, history.get_latest_metric):
        with pytest.raises(
            ConfigurationError, match=r"'eval_loss_epoch'.*\['train_loss_epoch'\].*Did you mean"
        ):
            ask("eval_loss_epoch")
    assert history.get_metric_names() == {"train_loss_epoch"}


def test_lesson_33_values_know_when_they_were_recorded_and_lists_are_copies() -> None:
    history = tiny_trainer().train(tiny_data(), num_epochs=2)
    assert [(record["epoch"], record["update"]) for record in history.to_records()] == [(1, 5), (2, 10)]
    history.get_metric_values("train_loss_epoch").clear()
    assert len(history.get_metric_values("train_loss_epoch")) == 2


# ---------------------------------------------------------------------- packages and tests


def imported_names(root: Path) -> set[str]:
    found: set[str] = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize("name", PACKAGES)
def test_lesson_36_a_package_has_one_import_name_is_typed_and_declares_what_it_imports(name: str) -> None:
    """What a wheel really holds is in tests/packaging."""
    root = PACKAGES[name]
    import_name = name.replace("-", "_")
    assert [path.name for path in (root / "src").iterdir() if path.is_dir()] == [import_name]
    assert (root / "src" / import_name / "py.typed").is_file()
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    declared = (root / "pyproject.toml").read_text(encoding="utf-8") + (root / "hatch_build.py").read_text(
        encoding="utf-8"
    )
    assert project["project"]["name"] == name
    undeclared = {found for found in imported_names(root / "src") if found.replace("_", "-") not in declared}
    assert undeclared - {import_name} == set()


def functions_of_tests() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield f"{path.name}::{node.name}", node


def checks_something(function: ast.FunctionDef) -> bool:
    """Whether a test asserts, expects an error, or calls something that does."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return any(
        isinstance(node, (ast.Assert, ast.Raise, ast.Call))
        for statement in body
        for node in ast.walk(statement)
    )


def test_lesson_37_no_test_is_empty_and_none_mocks_the_accelerator() -> None:
    assert [name for name, function in functions_of_tests() if not checks_something(function)] == []
    mocking = [
        path.name
        for path in sorted((REPOSITORY / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any("mock" in alias.name for alias in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and ("mock" in str(node.module) or any("mock" in a.name for a in node.names))
        )
    ]
    assert mocking == []
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    assert type(trainer.accelerator) is Accelerator
