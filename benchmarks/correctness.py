"""How far one epoch of a library is from the loop by hand, as JSON: the difference of the weights over the change.

Started by run.py in a fresh process for each library and case, on two processes if the case has two:

    python benchmarks/correctness.py LIBRARY CASE

By hand, an update is one step on the mean over all samples, or all tokens, of all its batches on all
processes. Each library is used as its documentation shows it for a model, a loss and an optimizer of one's
own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, DistributedSampler, default_collate

BATCH_SIZE = 4
VOCABULARY = 11
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: samples of five numbers, or sequences of tokens, in steps of `BATCH_SIZE` on each process."""

    num_samples: int
    steps_of_update: int = 3
    has_tokens: bool = False
    processes: int = 1
    model: str | None = None
    """The name of a model of transformers, which computes its loss itself; None is a model of one's own."""


CASES = {
    "accumulation": Case(36),
    "uneven end": Case(33),
    "tokens": Case(36, has_tokens=True),
    "two processes": Case(48, processes=2),
    "two processes, uneven end": Case(41, processes=2),
    "two processes, tokens": Case(48, has_tokens=True, processes=2),
    "Llama": Case(24, has_tokens=True, model="Llama"),
    "BERT": Case(24, has_tokens=True, model="BERT"),
    "T5": Case(24, has_tokens=True, model="T5"),
}


class TokenModel(nn.Module):
    """Predicts a class for each token; its outputs are of shape `(batch, classes, time)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.layer = nn.Linear(6, VOCABULARY)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embedding(inputs)).transpose(1, 2)  # type: ignore[no-any-return]


def create_model(case: Case) -> Any:
    """The same weights at each call."""
    torch.manual_seed(0)
    if case.model is not None:
        return _create_transformer(case.model)
    return TokenModel() if case.has_tokens else nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))


def _create_transformer(name: str) -> Any:
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "Llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, intermediate_size=24, pad_token_id=0)
        )
    if name == "BERT":
        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, intermediate_size=24, **dropouts)
        )
    small = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**small, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0)
    )


def create_samples(case: Case) -> list[Any]:
    """Pairs of inputs and targets; sequences have 2 to 11 tokens."""
    generator = torch.Generator().manual_seed(1)
    if not case.has_tokens:
        inputs = torch.randn(case.num_samples, 5, generator=generator)
        return list(zip(inputs, (inputs.sum(1) > 0).long(), strict=True))
    lengths = [2 + (7 * number) % 10 for number in range(case.num_samples)]
    sequences = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [(sequence, sequence.flip(0)) for sequence in sequences]


def collate(samples: list[Any]) -> Any:
    """Stack samples, or pad sequences."""
    if samples[0][1].ndim == 0:
        return default_collate(samples)
    inputs, targets = zip(*samples, strict=True)
    return pad_sequence(inputs, True, 0), pad_sequence(targets, True, IGNORED)


def collate_names(samples: list[Any]) -> dict[str, torch.Tensor]:
    """The batch of a model of transformers."""
    inputs, targets = collate(samples)
    return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": targets}


def collate_inputs(samples: list[Any]) -> dict[str, torch.Tensor]:
    """The batch of a model of one's own for the trainer of transformers."""
    return dict(zip(("inputs", "labels"), collate(samples), strict=True))


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3)


def by_hand(case: Case, model: Any) -> None:
    optimizer = create_optimizer(model)
    samples = create_samples(case)
    size = BATCH_SIZE * case.steps_of_update * case.processes
    for first in range(0, len(samples), size):
        group = samples[first : first + size]
        if case.model is None:
            inputs, targets = collate(group)
            loss = F.cross_entropy(model(inputs), targets)
        else:
            loss = model(**collate_names(group)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accel(case: Case, model: Any) -> None:
    from accel_core import Trainer

    samples = create_samples(case)
    arguments: dict[str, Any] = {"num_epochs": 1, "per_device_batch_size": BATCH_SIZE}
    arguments |= {
        "gradient_accumulation_steps": case.steps_of_update,
        "train_dataloader_kwargs": {"shuffle": False},
    }
    if case.model is not None:
        from accel_integrations.transformers_adapter import TransformersTrainer

        transformer = TransformersTrainer(model, None, create_optimizer(model), callbacks=())
        transformer.train(samples, collate_fn=collate_names, **arguments)
        return
    trainer = Trainer(model, F.cross_entropy, create_optimizer(model), callbacks=())
    trainer.train(samples, collate_fn=collate, **arguments)


def accelerate(case: Case, model: Any) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=case.steps_of_update)
    loader = DataLoader(create_samples(case), batch_size=BATCH_SIZE, collate_fn=collate)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, create_optimizer(model), loader)
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()


def pytorch_accelerated(case: Case, model: Any) -> None:
    from pytorch_accelerated.trainer import Trainer

    trainer = Trainer(model, F.cross_entropy, create_optimizer(model), callbacks=())
    trainer.train(
        create_samples(case),
        num_epochs=1,
        per_device_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=case.steps_of_update,
        collate_fn=collate,
        train_dataloader_kwargs={"shuffle": False, "num_workers": 0},
    )


def lightning(case: Case, model: Any) -> None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return create_optimizer(self.model)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=case.processes,
        strategy="ddp" if case.processes > 1 else "auto",
        accumulate_grad_batches=case.steps_of_update,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    samples: Any = create_samples(case)
    # The sampler that it makes by itself shuffles, and the loop by hand goes in order.
    rank = int(os.environ.get("RANK", "0"))
    sampler = DistributedSampler(samples, case.processes, rank, shuffle=False) if case.processes > 1 else None
    trainer.fit(Module(), DataLoader(samples, BATCH_SIZE, sampler=sampler, collate_fn=collate))


def transformers(case: Case, model: Any) -> None:
    from transformers import Trainer, TrainingArguments

    class ReturnsLoss(nn.Module):
        """A model of one's own as the trainer wants it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(
            self, inputs: torch.Tensor, labels: torch.Tensor | None = None
        ) -> dict[str, torch.Tensor]:
            outputs = self.inner(inputs)
            # The trainer takes the labels out if a function of its own computes the loss.
            loss = {} if labels is None else {"loss": F.cross_entropy(outputs, labels)}
            return {**loss, "logits": outputs}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def loss_of_tokens(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    is_own = case.model is None
    trained = ReturnsLoss() if is_own else model
    optimizer = create_optimizer(trained)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=case.steps_of_update,
            num_train_epochs=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
        )
        InOrder(
            trained,
            arguments,
            collate_inputs if is_own else collate_names,
            create_samples(case),
            compute_loss_func=loss_of_tokens if is_own and case.has_tokens else None,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        ).train()


LIBRARIES: dict[str, Callable[[Case, Any], None]] = {
    "accel": accel,
    "accelerate": accelerate,
    "pytorch-accelerated": pytorch_accelerated,
    "lightning": lightning,
    "transformers": transformers,
}
WITH_TRANSFORMERS = ("accel", "transformers")
"""Those that take the loss from a model of transformers by themselves."""


def cases_of(library: str) -> list[str]:
    """The cases that a library is asked for."""
    return [name for name, case in CASES.items() if case.model is None or library in WITH_TRANSFORMERS]


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


def main() -> None:
    library, name = sys.argv[1:]
    warnings.simplefilter("ignore")
    case = CASES[name]
    begun, wanted, trained = (create_model(case) for _ in range(3))
    before = weights_of(begun)
    by_hand(case, wanted)
    LIBRARIES[library](case, trained)
    change = (weights_of(wanted) - before).norm()
    difference = float((weights_of(trained) - weights_of(wanted)).norm() / change)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"difference": difference}), flush=True)


if __name__ == "__main__":
    main()
