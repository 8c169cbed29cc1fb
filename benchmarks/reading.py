"""Samples per second where reading is the work, as JSON: JPEG files, and texts of very different lengths.

Started by run.py:

    python benchmarks/reading.py IMAGES TEXTS
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from accel_core import Trainer
from accel_integrations.samplers import LengthGroupedSampler

ROUNDS = 5
BATCH_SIZE = 16
CLASSES = 4


def write_images(folder: Path, number: int) -> None:
    """JPEG files of 160 by 160 pixels, in a folder for each class."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        kind = folder / f"class_{index % CLASSES}"
        kind.mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((160, 160)).save(kind / f"{index:05d}.jpg")


def open_images(folder: Path) -> ImageFolder:
    steps = [
        v2.PILToTensor(),
        v2.RandomResizedCrop(64, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
    ]
    return ImageFolder(folder, v2.Compose(steps))


def create_trainer(model: nn.Module) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[], seed=1)


def create_convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 15 * 15, CLASSES))


def train_images_by_hand(data: ImageFolder, num_workers: int) -> None:
    model = create_convnet()
    optimizer, loss_func = torch.optim.SGD(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
    model.train()
    for images, targets in DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=num_workers):
        loss_func(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_images(data: ImageFolder, num_workers: int) -> None:
    loading = {"num_workers": num_workers}
    create_trainer(create_convnet()).train(
        data, 1, per_device_batch_size=BATCH_SIZE, train_dataloader_kwargs=loading
    )


class Recurrent(nn.Module):
    """Classifies padded sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.recur = nn.GRU(32, 64, batch_first=True)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classify(self.recur(self.embed(tokens))[0][:, -1])


def create_texts(number: int) -> list[Any]:
    """Most texts are short and few are long, as in most corpora."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(number).log_normal_(3.0, 0.8, generator=generator).clamp(4, 300).long().tolist()
    return [
        (torch.randint(0, 100, (length,), generator=generator), number % CLASSES)
        for number, length in enumerate(lengths)
    ]


def collate(samples: list[Any]) -> Any:
    tokens = pad_sequence([text for text, _ in samples], batch_first=True)
    return tokens, torch.tensor([target for _, target in samples])


def train_texts(texts: list[Any], grouped: bool) -> None:
    lengths = [len(text) for text, _ in texts]
    loading = {"sampler": LengthGroupedSampler(lengths, BATCH_SIZE)} if grouped else {}
    torch.manual_seed(0)
    create_trainer(Recurrent()).train(
        texts, 1, per_device_batch_size=BATCH_SIZE, collate_fn=collate, train_dataloader_kwargs=loading
    )


def padding_of(texts: list[Any], grouped: bool) -> float:
    """Percent of the tokens of an epoch that are padding."""
    lengths = [len(text) for text, _ in texts]
    order: Any = LengthGroupedSampler(lengths, BATCH_SIZE) if grouped else torch.randperm(len(texts)).tolist()
    batches = DataLoader(texts, BATCH_SIZE, sampler=order, collate_fn=collate)  # type: ignore[arg-type]
    return 100 * (1 - sum(lengths) / sum(tokens.numel() for tokens, _ in batches))


def rates(samples: int, **loops: Callable[[], None]) -> dict[str, float]:
    """Median samples per second of each loop; all are run in turn, once before for the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                loop()
            seconds[name].append(time.perf_counter() - start)
    return {name: samples / statistics.median(each[1:]) for name, each in seconds.items()}


def main() -> None:
    torch.set_num_threads(1)
    num_images, num_texts = map(int, sys.argv[1:3])
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name), num_images)
        data = open_images(Path(name))
        for workers in (0, 2):
            measured = rates(
                num_images,
                hand=lambda workers=workers: train_images_by_hand(data, workers),
                accel=lambda workers=workers: train_images(data, workers),
            )
            for loop, rate in measured.items():
                title = "by hand" if loop == "hand" else loop
                figures[f"JPEG files, {workers} workers, {title}, samples/s"] = rate
    texts = create_texts(num_texts)
    measured = rates(
        num_texts,
        shuffled=lambda: train_texts(texts, grouped=False),
        grouped=lambda: train_texts(texts, grouped=True),
    )
    for order, rate in measured.items():
        figures[f"texts, {order}, samples/s"] = rate
        figures[f"texts, {order}, padding, %"] = padding_of(texts, order == "grouped")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
