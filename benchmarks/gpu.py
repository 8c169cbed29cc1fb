"""Time a step on a GPU against the loop by hand, for a ResNet-50 and a GPT of 124 million parameters.

    PYTHONPATH=packages/accel-core/src python benchmarks/gpu.py     with torch and accelerate, nothing of the checkout installed
    hatch run bench-gpu --device cpu --tiny                         tries the script where there is no GPU

Both loops run in bfloat16 autocast with fused SGD. They are measured in turns, in pairs back to back. Prints the name of the
device, and for each model the milliseconds of a step and the median ratio over the pairs. Without a GPU it says so, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from accel_core import Trainer

WARM_UP_STEPS = 5


class Bottleneck(nn.Module):
    """Source: He et al. 2015, arXiv:1512.03385, figure 5."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            self.shortcut.append(nn.Conv2d(channels, 4 * width, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(4 * width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(inputs) + self.shortcut(inputs))


def create_resnet(blocks: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, number in enumerate(blocks):
        for block in range(number):
            layers.append(Bottleneck(channels, 64 * 2**stage, 2 if stage and not block else 1))
            channels = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class GPT(nn.Module):
    """The sizes are those of the smallest GPT-2: 12 layers of width 768, 50,257 tokens, 1,024 places."""

    def __init__(self, layers: int, width: int, tokens: int, places: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.place = nn.Embedding(places, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """From ids of shape (samples, places) to scores of shape (samples, tokens, places)."""
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=ids.device)
        hidden = self.token(ids) + self.place(torch.arange(length, device=ids.device))
        hidden = self.body(hidden, mask=mask, is_causal=True)
        return F.linear(hidden, self.token.weight).transpose(1, 2)


def create_task(name: str, steps: int, tiny: bool) -> tuple[nn.Module, TensorDataset, int]:
    """Return model, data and batch size."""
    torch.manual_seed(0)
    if name == "ResNet-50":
        batch_size, pixels = (2, 32) if tiny else (64, 224)
        images = torch.randn(batch_size * steps, 3, pixels, pixels)
        model = create_resnet((1, 1) if tiny else (3, 4, 6, 3))
        return model, TensorDataset(images, torch.randint(0, 1000, (len(images),))), batch_size
    batch_size, places, tokens = (2, 16, 100) if tiny else (8, 1024, 50257)
    ids = torch.randint(0, tokens, (batch_size * steps, places))
    model = GPT(1, 64, tokens, places) if tiny else GPT(12, 768, tokens, places)
    return model, TensorDataset(ids, ids.roll(-1, dims=1)), batch_size


class Clock:
    """Seconds from the forward after the warm-up to the last one, with all work of the device done at both."""

    def __init__(self, model: nn.Module, steps: int, device: str) -> None:
        self.steps, self.forwards, self.device = steps, 0, device
        self.marks: list[float] = []
        model.register_forward_pre_hook(self.tick)

    def tick(self, *_: Any) -> None:
        self.forwards += 1
        if self.forwards in (WARM_UP_STEPS, self.steps):
            if self.device == "cuda":
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        begin, end = self.marks
        return (end - begin) / (self.steps - WARM_UP_STEPS)


def train_by_hand(model: nn.Module, data: TensorDataset, batch_size: int, device: str) -> None:
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    for inputs, targets in DataLoader(data, batch_size, shuffle=True, pin_memory=device == "cuda"):
        inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16):
            outputs = model(inputs)
        F.cross_entropy(outputs.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_by_accel(model: nn.Module, data: TensorDataset, batch_size: int, device: str) -> None:
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=1e-3, fused=True),
        callbacks=(),
        accelerator=Accelerator(mixed_precision="bf16", cpu=device == "cpu"),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(data, num_epochs=1, per_device_batch_size=batch_size)


def measure(name: str, pairs: int, steps: int, device: str, tiny: bool) -> str:
    """Return the row of a table. The first pair only warms up."""
    loops: list[Callable[..., None]] = [train_by_hand, train_by_accel]
    seconds: dict[str, list[float]] = {loop.__name__: [] for loop in loops}
    created, data, batch_size = create_task(name, steps, tiny)
    for number in range(pairs + 1):
        for loop in loops[:: 1 if number % 2 else -1]:
            # Drawing weights and images anew would take longer than the steps.
            model = copy.deepcopy(created)
            clock = Clock(model, steps, device)
            loop(model, data, batch_size, device)
            if number:
                seconds[loop.__name__].append(clock.seconds_per_step())
    by_hand, ours = seconds.values()
    ratios = [mine / theirs for mine, theirs in zip(ours, by_hand, strict=True)]
    times = f"{statistics.median(by_hand) * 1e3:.2f} | {statistics.median(ours) * 1e3:.2f}"
    return f"| {name} | {times} | {statistics.median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25, help="of each run")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("Skipped: torch sees no GPU. `--device cpu --tiny` tries the script without one.")
        return
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "- torch", torch.__version__, "\n")
    print("| model | by hand, ms a step | accel, ms a step | ratio | of all pairs |\n|---|---|---|---|---|")
    for name in ("ResNet-50", "GPT 124M"):
        print(measure(name, arguments.pairs, arguments.steps, device, arguments.tiny), flush=True)


if __name__ == "__main__":
    main()
