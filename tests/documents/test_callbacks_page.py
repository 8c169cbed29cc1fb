"""The page of the callbacks has each of them, in its true place in the order."""

import importlib
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_callbacks import EarlyStoppingCallback, ModelEmaCallback, SaveBestModelCallback
from accel_core import CallbackList, ConfigurationError, Trainer, TrainerCallback
from tiny import tiny_data, tiny_trainer

PAGE = Path(__file__).parents[2] / "docs/callbacks.md"
PACKAGES = (
    "accel_core",
    "accel_callbacks",
    "accel_integrations.schedulers",
    "accel_integrations.timm_adapter",
)


def rows() -> list[tuple[int, str, str]]:
    """Order, name and package of each row of the table. The link into the reference names the package."""
    found = re.findall(
        r"^\| (-?\d+) \| \[`(\w+)`\]\(api/\w+\.md#([\w.]+)\.\2\) \|",
        PAGE.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    return [(int(order), name, package) for order, name, package in found]


def public_callbacks() -> dict[str, type[TrainerCallback]]:
    modules = [
        importlib.import_module(package) for package in (*PACKAGES, "accel_integrations.transformers_adapter")
    ]
    named = {
        name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)
    }
    bases = (TrainerCallback, CallbackList)
    return {
        name: value
        for name, value in named.items()
        if issubclass(value, TrainerCallback) and value not in bases
    }


def test_every_callback_is_in_the_table_with_its_order_and_its_package() -> None:
    assert {name: order for order, name, _ in rows()} == {
        name: kind.order for name, kind in public_callbacks().items()
    }
    assert len(rows()) == len(public_callbacks())
    for _, name, package in rows():
        assert public_callbacks()[name] is getattr(importlib.import_module(package), name)
        assert public_callbacks()[name].__module__.startswith(package)


def test_the_table_is_sorted_by_order() -> None:
    orders = [order for order, _, _ in rows()]
    assert orders == sorted(orders)


def test_callbacks_are_called_in_the_order_of_the_table_however_they_are_listed() -> None:
    kinds = public_callbacks()
    wanted = [name for order, name, _ in rows() if order != 0]
    listed = random.Random(0).sample(wanted, len(wanted))
    arguments: dict[str, tuple[Any, ...]] = {
        "UnfreezeCallback": ({2: 0},),
        "TrackerCallback": ("tensorboard", "any"),
        "StepBasedEvaluationCallback": (5,),
        "ProfileCallback": ("profile",),
        "OptunaPruningCallback": (None,),
    }
    trainer = tiny_trainer(callbacks=[kinds[name](*arguments.get(name, ())) for name in listed])
    called = [type(callback).__name__ for callback in trainer.callbacks]
    told = re.findall(r"^  (\w+) \(order (-?\d+)\): on_", trainer.describe(), flags=re.MULTILINE)
    assert listed != wanted
    # These two have the same order, so that they are called as they are listed.
    savers = ("SaveTrainingStateCallback", "WSDCheckpointCallback")
    assert [name for name in called if name not in savers] == [name for name in wanted if name not in savers]
    assert [name for name, _ in told] == called
    assert [int(order) for _, order in told] == [kinds[name].order for name in called]


class Late(TrainerCallback):
    """Records a metric after all that could watch it."""

    order = 950

    def on_training_run_epoch_end(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("late", 1.0)


@pytest.mark.parametrize("kind", [EarlyStoppingCallback, SaveBestModelCallback, ModelEmaCallback])
def test_a_metric_that_is_recorded_behind_the_callback_that_watches_it_is_told(
    kind: Any, tmp_path: Path
) -> None:
    arguments = {} if kind is EarlyStoppingCallback else {"save_path": tmp_path / "model.pt"}
    trainer = tiny_trainer(callbacks=[Late, kind(watch_metric="late", **arguments)])
    with pytest.raises(ConfigurationError, match=rf"{kind.__name__}.*'late'.*\['"):
        trainer.train(tiny_data(), num_epochs=2, eval_dataset=tiny_data(5))


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.index("ModelEmaCallback (order 20)") < printed.index("EarlyStoppingCallback (order 800)")
    assert isinstance(namespace["average"].ema_model, nn.Module)
    assert torch.isfinite(namespace["average"].ema_model.weight).all()
