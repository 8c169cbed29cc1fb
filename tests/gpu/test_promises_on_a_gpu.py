"""What is promised of a run holds on a GPU: `python -m pytest -c tests/gpu/gpu.ini tests/gpu`.

The ini file is apart, so that a machine needs only torch, accelerate, torchmetrics, pytest and the checkout.
`ACCEL_TEST_DEVICE=cpu` tries the tests themselves where there is no GPU; those of CUDA alone are skipped.
"""

import os

# Read when CUDA is first used: without it deterministic kernels of matrix products raise an error.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback
from accel_core import Trainer, TrainerCallback

DEVICE = os.environ.get("ACCEL_TEST_DEVICE", "cuda")
HAS_GPU = torch.cuda.is_available()
# Adaptive optimizers divide by the size of a gradient, which magnifies rounding.
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
SEES_NO_GPU = "needs a CUDA GPU, and torch sees none"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not HAS_GPU, reason=SEES_NO_GPU),
]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason=SEES_NO_GPU)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Equal bits need kernels that add in one order."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    yield
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def create_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1024, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10)),
    )


def create_data(size: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(0, 10, (size,), generator=generator))


def create_trainer(
    callbacks: list[TrainerCallback] | None = None,
    precision: str = "no",
    dropout: float = 0.0,
    loss_func: Any = None,
    **optimizer: Any,
) -> Trainer:
    model = create_model(dropout)
    return Trainer(
        model,
        loss_func or nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), **{**SGD, **optimizer}),
        callbacks=callbacks or [],
        seed=0,
        accelerator=Accelerator(mixed_precision=precision, cpu=DEVICE == "cpu"),
    )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in trainer.get_model(False).state_dict().items()}


class SaveAt(TrainerCallback):
    """Saves the training state once, after update `update`."""

    def __init__(self, update: int, folder: Path) -> None:
        self.update, self.folder = update, folder

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == self.update:
            trainer.save_training_state(self.folder)


@pytest.mark.parametrize("precision", ["no", "bf16", pytest.param("fp16", marks=only_cuda)])
def test_a_resumed_run_has_the_same_bits(precision: str, tmp_path: Path) -> None:
    """From the middle of an epoch, with dropout, whose random numbers are those of the GPU."""
    kwargs = {"num_epochs": 3, "per_device_batch_size": 8, "gradient_accumulation_steps": 2}
    whole = create_trainer([SaveAt(6, tmp_path / "state")], precision, dropout=0.5)
    whole.train(create_data(), **kwargs)
    rest = create_trainer([], precision, dropout=0.5)
    rest.train(create_data(), **kwargs, resume_from=tmp_path / "state")
    torch.testing.assert_close(weights_of(rest), weights_of(whole), rtol=0, atol=0)


def train_by_hand(
    updates: int, precision: str, channels_last: bool, size: int = 64, **optimizer: Any
) -> dict[str, Any]:
    """The whole data is one batch, so that their order is of no account."""
    model = create_model().to(DEVICE)
    inputs, targets = (tensor.to(DEVICE) for tensor in create_data(size).tensors)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(model.parameters(), **{**SGD, **optimizer})
    for _ in range(updates):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(inputs)
        nn.functional.cross_entropy(outputs.float(), targets).backward()
        sgd.step()
        sgd.zero_grad()
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("precision", "channels_last", "compiled", "optimizer"),
    [
        ("no", False, False, {}),
        ("bf16", False, False, {}),
        ("no", True, False, {}),
        ("no", False, False, {"fused": True}),
        pytest.param("no", False, True, {}, marks=only_cuda),
    ],
    ids=["float32", "bfloat16", "channels last", "fused", "compiled"],
)
def test_weights_are_those_of_the_loop_by_hand(
    precision: str, channels_last: bool, compiled: bool, optimizer: dict[str, Any]
) -> None:
    trainer = create_trainer([], precision, **optimizer)
    if channels_last:
        trainer.model.to(memory_format=torch.channels_last)
    if compiled:
        trainer.model.compile()
    trainer.train(create_data(), num_epochs=5, per_device_batch_size=64)
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    expected = train_by_hand(5, precision, channels_last, **optimizer)
    torch.testing.assert_close(weights_of(trainer), expected, rtol=tolerance, atol=tolerance)
    first = trainer.get_model(False)[0].weight  # type: ignore[index]
    assert first.is_contiguous(memory_format=torch.channels_last) >= channels_last


def test_metrics_of_the_gpu_are_those_of_all_samples() -> None:
    metrics = MetricsCallback({"accuracy": MulticlassAccuracy(10, average="micro")})
    trainer = create_trainer([metrics])
    data = create_data(37)
    history = trainer.evaluate(data, per_device_batch_size=8)
    predicted = trainer.predict(TensorDataset(data.tensors[0]), per_device_batch_size=8).cpu()
    expected = (predicted.argmax(1) == data.tensors[1]).double().mean().item()
    measured = next(value for name, value in history.items() if "accuracy" in name)
    assert measured == pytest.approx(expected, abs=1e-6)


@only_cuda
def test_float16_skips_updates_that_overflow_and_trains_on() -> None:
    """The first scale of torch is 65,536, which times this loss is more than float16 holds."""

    def large_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) * 1e4

    trainer = create_trainer([], "fp16", loss_func=large_loss, lr=1e-6)
    before = weights_of(trainer)
    trainer.train(create_data(), num_epochs=20, per_device_batch_size=16)
    after = weights_of(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert trainer.accelerator.scaler.get_scale() < 65536


class NoSynchronisation(TrainerCallback):
    """From the second update of an epoch to its last but one, CUDA raises where the host waits for it."""

    def __init__(self, updates: int) -> None:
        self.updates, self.watched = updates, 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        update = trainer.run_progress.updates_completed
        is_inside = 2 <= update < self.updates - 1
        self.watched += is_inside
        torch.cuda.set_sync_debug_mode("error" if is_inside else "default")


@only_cuda
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_no_step_waits_for_the_gpu(clip_norm: float | None) -> None:
    watcher = NoSynchronisation(16)
    trainer = create_trainer([watcher], fused=True)
    try:
        trainer.train(create_data(128), num_epochs=1, per_device_batch_size=8, gradient_clip_norm=clip_norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watcher.watched == 13


@only_cuda
def test_batches_come_from_pinned_memory_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the host waits until a batch is on the GPU."""
    copies: list[tuple[bool, Any]] = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved = original(tensor, *args, **kwargs)
        if tensor.ndim == 4 and tensor.device.type == "cpu" and moved.device.type == "cuda":
            copies.append((tensor.is_pinned(), kwargs.get("non_blocking")))
        return moved

    trainer = create_trainer()
    trainer.model.to(DEVICE)
    monkeypatch.setattr(torch.Tensor, "to", to)
    trainer.train(create_data(), num_epochs=1, per_device_batch_size=8)
    assert copies == [(True, True)] * 8


@only_cuda
def test_the_peak_of_memory_is_that_of_the_loop_by_hand() -> None:
    """Of a batch whose activations take more than weights and workspaces; each loop runs once before."""
    size, peaks = 8192, []
    for train in (
        lambda: train_by_hand(3, "no", False, size),
        lambda: create_trainer().train(create_data(size), num_epochs=3, per_device_batch_size=size),
    ):
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    by_hand, ours = peaks
    assert ours <= by_hand * 1.1
