"""One library at real work, as JSON: samples per second and peak memory.

Started by run.py in a fresh process for each library and workload, in the environment that has it:

    python benchmarks/real_work.py WORKLOAD LIBRARY

`resnet` is a ResNet-18 on JPEG files with two workers, `gpt` a small GPT in bf16 that accumulates 4 batches, `bert`
a BERT-like classifier that is fine-tuned on texts of very different lengths in batches of similar length. All libraries get
the same loader in the same order, and have to end with the same loss. `train.py` of timm is a script of its
repository and no part of the package, so that it is not measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import Terminal
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Sampler, TensorDataset

WARM_UP_FORWARDS = 4
EPOCHS = 2
CLASSES = 4
VOCABULARY = 512


class Task:
    """The model, the data and the settings of one workload, and a clock in the model's forward."""

    accumulation = 1
    in_bf16 = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = self.create_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loader = self.create_loader()
        self.num_forwards = EPOCHS * len(self.loader)
        self.num_samples = 0
        self.marks: list[tuple[float, int]] = []
        self._forwards = 0
        self._hook = self.model.register_forward_pre_hook(self._tick)

    def create_model(self) -> nn.Module:
        raise NotImplementedError

    def create_loader(self) -> DataLoader[Any]:
        raise NotImplementedError

    def loss_func(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def _tick(self, model: nn.Module, arguments: Any) -> None:
        self._forwards += 1
        inputs = arguments[0]
        size = len(inputs["input_ids"] if isinstance(inputs, dict) else inputs)
        if self._forwards in (WARM_UP_FORWARDS, self.num_forwards):
            self.marks.append((time.perf_counter(), self.num_samples))
        self.num_samples += size

    def figures(self) -> dict[str, float]:
        """Samples per second between the first forwards and the last one, peak memory, and the loss at the end."""
        if self._forwards != self.num_forwards:
            raise RuntimeError(f"The loop did {self._forwards} forwards instead of {self.num_forwards}.")
        self._hook.remove()
        (began, samples_before), (ended, samples) = self.marks
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        inputs, targets = next(iter(self.loader))
        with torch.no_grad():
            loss = float(self.loss_func(self.model.eval()(inputs), targets))
        return {
            "rate": (samples - samples_before) / (ended - began),
            "megabytes": peak / (2**20 if sys.platform == "darwin" else 2**10),
            "loss": loss,
        }


class ResNet(Task):
    """A ResNet-18 on JPEG files of 160 by 160 pixels, cut to 64 by 64."""

    def create_model(self) -> nn.Module:
        from torchvision.models import resnet18

        return resnet18(num_classes=CLASSES)

    def create_loader(self) -> DataLoader[Any]:
        from PIL import Image
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        generator = torch.Generator().manual_seed(0)
        for index in range(256):
            kind = self.folder / f"class_{index % CLASSES}"
            kind.mkdir(exist_ok=True)
            pixels = torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).resize((160, 160)).save(kind / f"{index:05d}.jpg")
        steps = [v2.PILToTensor(), v2.CenterCrop(64), v2.ToDtype(torch.float32, scale=True)]
        return DataLoader(ImageFolder(self.folder, v2.Compose(steps)), 16, num_workers=2)


class _Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embed(tokens), mask=mask, is_causal=True))


class Gpt(Task):
    """A GPT of 4 layers on 128 tokens, in bf16; each update accumulates 4 batches."""

    accumulation = 4
    in_bf16 = True

    def create_model(self) -> nn.Module:
        return _Gpt()

    def create_loader(self) -> DataLoader[Any]:
        tokens = torch.randint(0, VOCABULARY, (256, 129), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), 8)

    def loss_func(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1).float(), targets.flatten())


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=512,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.inner = BertForSequenceClassification(config)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.inner(**inputs).logits


class Bert(Task):
    """A BERT of 3 layers on texts of 4 to 256 tokens."""

    def create_model(self) -> nn.Module:
        return _Bert()

    def create_loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.empty(768).log_normal_(3.3, 0.8, generator=generator).clamp(4, 256).long().tolist()
        texts = [
            (torch.randint(1, VOCABULARY, (length,), generator=generator), length % CLASSES)
            for length in lengths
        ]
        by_length = sorted(range(len(texts)), key=lambda index: -lengths[index])
        batches = [by_length[first : first + 16] for first in range(0, len(texts), 16)]
        # Long and short batches take turns, as in an epoch that is shuffled.
        batches = [batches[number * 5 % len(batches)] for number in range(len(batches))]
        return DataLoader(texts, batch_sampler=_Batches(batches), collate_fn=_pad)  # type: ignore[arg-type]


class _Batches(Sampler[list[int]]):
    """Gives the same batches in every epoch. Accelerate sets attributes of a batch sampler, which a list has not."""

    batch_size = 16
    drop_last = False

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _pad(samples: list[Any]) -> Any:
    tokens = pad_sequence([text for text, _ in samples], batch_first=True)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}, torch.tensor(
        [target for _, target in samples]
    )


def by_hand(task: Task) -> None:
    task.model.train()
    for _ in range(EPOCHS):
        total = 0.0
        for number, (inputs, targets) in enumerate(task.loader, start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=task.in_bf16):
                loss = task.loss_func(task.model(inputs), targets)
            total += loss.item()
            (loss / task.accumulation).backward()
            if number % task.accumulation == 0:
                task.optimizer.step()
                task.optimizer.zero_grad()


def accel(task: Task) -> None:
    from accelerate import Accelerator

    from accel_core import Trainer

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if task.in_bf16 else "no")
    trainer = Trainer(task.model, task.loss_func, task.optimizer, accelerator=accelerator)
    trainer.train(task.loader, EPOCHS, gradient_accumulation_steps=task.accumulation)


def pytorch_accelerated(task: Task) -> None:
    from pytorch_accelerated.callbacks import ProgressBarCallback
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer

    # Accelerate takes it from here when the trainer makes its Accelerator.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if task.in_bf16 else "no"

    class Given(Trainer):
        def create_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
            return task.loader

    callbacks = [callback for callback in DEFAULT_CALLBACKS if callback is not ProgressBarCallback]
    trainer = Given(task.model, task.loss_func, task.optimizer, callbacks=callbacks)
    trainer.train(
        task.loader.dataset,
        EPOCHS,
        per_device_batch_size=task.loader.batch_size or 16,
        gradient_accumulation_steps=task.accumulation,
    )


def lightning(task: Task) -> None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            loss = task.loss_func(self.model(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]))
            return loss

        def configure_optimizers(self) -> Any:
            return task.optimizer

    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if task.in_bf16 else "32-true",
        accumulate_grad_batches=task.accumulation,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Module(), task.loader)


def transformers(task: Task) -> None:
    from transformers import Trainer, TrainingArguments

    class Given(Trainer):
        def get_train_dataloader(self) -> Any:
            return task.loader

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return task.loss_func(model(inputs[0]), inputs[1])

        def get_batch_samples(self, iterator: Any, num_batches: int, device: Any) -> Any:
            # Batches are pairs here, in which it would look for labels to count.
            return [batch for _, batch in zip(range(num_batches), iterator, strict=False)], None

        def floating_point_ops(self, inputs: Any) -> int:
            return 0

    arguments = TrainingArguments(
        str(task.folder / "output"),
        num_train_epochs=EPOCHS,
        gradient_accumulation_steps=task.accumulation,
        max_grad_norm=0.0,
        bf16=task.in_bf16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="epoch",
        remove_unused_columns=False,
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(task.optimizer, factor=1.0)
    trainer = Given(
        task.model, arguments, train_dataset=task.loader.dataset, optimizers=(task.optimizer, schedule)
    )
    # It divides by the steps of an update only if the loss takes no number of items.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()


TASKS: dict[str, type[Task]] = {"resnet": ResNet, "gpt": Gpt, "bert": Bert}
LIBRARIES: dict[str, Callable[[Task], None]] = {
    "by hand": by_hand,
    "accel": accel,
    "lightning": lightning,
    "transformers": transformers,
    "pytorch-accelerated": pytorch_accelerated,
}
OWN = ("by hand", "accel")
"""Those of the environment of the project; the rest live in that of the other libraries."""


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        task = TASKS[sys.argv[1]](Path(name))
        with (
            contextlib.redirect_stdout(Terminal()),
            contextlib.redirect_stderr(Terminal()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            LIBRARIES[sys.argv[2]](task)
        print(json.dumps(task.figures()))


if __name__ == "__main__":
    main()
