"""What the library says to a mistake: one row a mistake, with the value, the names and the way out that the answer has.

The rest of a sentence may be worded otherwise. Each mistake is made with a real trainer. Nothing may have
changed afterwards: the weights, buffers and modes of the model, the optimizer, the random state of python,
numpy and torch, the run history, and the files in the folder.
"""

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from accel_core import (
    AccelError,
    AccelWarning,
    ConfigurationError,
    InMemoryRunHistory,
    LimitBatches,
    LimitBatchesCallback,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
)
from accel_core.foreign_names.tables import FOREIGN_METHODS, FOREIGN_STEPS

SIZE = 10
INPUTS = torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS.sum(1) > 0).long()
DATA = TensorDataset(INPUTS, TARGETS)


class Parts(NamedTuple):
    """What a user holds before the mistake."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trainer: Trainer
    folder: Path

    def trainer_of(self, step: Any = None, **attributes: Any) -> Trainer:
        """A trainer of a class of the user's own, whose loss step is `step`."""
        own = {} if step is None else {"calculate_train_batch_loss": step, "calculate_eval_batch_loss": step}
        trainer_class = type("OwnTrainer", (Trainer,), own)
        trainer: Trainer = trainer_class(
            self.model, nn.functional.cross_entropy, self.optimizer, callbacks=[], seed=5
        )
        for name, value in attributes.items():
            setattr(trainer, name, value)
        return trainer

    def train(self, train_dataset: Any = DATA, num_epochs: int | None = 1, **arguments: Any) -> None:
        self.trainer.train(train_dataset, num_epochs, **arguments)

    def create(self, **changed: Any) -> Trainer:
        """A trainer with other parts."""
        parts = {"model": self.model, "loss_func": nn.functional.cross_entropy, "optimizer": self.optimizer}
        return Trainer(**{**parts, **changed})


class Fails(Dataset[Any]):
    """The sample 7 cannot be read."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise OSError("photo_7.png is truncated")
        return INPUTS[index], TARGETS[index]


class Lies(Fails):
    """The length is more than there is."""

    def __len__(self) -> int:
        return SIZE + 3

    def __getitem__(self, index: int) -> Any:
        return [(x, y) for x, y in zip(INPUTS, TARGETS, strict=True)][index]


class Unsized(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


class Misspelled(TrainerCallback):
    def on_train_epoch_strat(self, trainer: Trainer) -> None: ...


class FromReference(TrainerCallback):
    def on_stop_training_error(self, trainer: Trainer) -> None: ...


class FromLightning(TrainerCallback):
    def on_train_batch_end(self, trainer: Trainer) -> None: ...


class WithoutArguments(TrainerCallback):
    def on_train_step_end(self, trainer: Trainer) -> None: ...


class NeedsArguments(TrainerCallback):
    def __init__(self, path: str) -> None:
        self.path = path


class TrainsInside(TrainerCallback):
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        trainer.train(DATA, num_epochs=1)


class RecordsWords(TrainerCallback):
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("accuracy", "good")


class RecordsVectors(TrainerCallback):
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("accuracy", torch.ones(3))


def correct(self: Trainer, batch: Any) -> dict[str, Any]:
    return {"loss": self.model(batch[0]).mean(), "model_outputs": None, "batch_size": len(batch[0])}


def returning(**changed: Any) -> Callable[[Trainer, Any], dict[str, Any]]:
    """A loss step that returns something wrong; a function in the place of a value gets the loss."""

    def step(self: Trainer, batch: Any) -> dict[str, Any]:
        output = correct(self, batch)
        made = {name: value(output["loss"]) if callable(value) else value for name, value in changed.items()}
        return {name: value for name, value in {**output, **made}.items() if value is not ...}

    return step


def foreign_scheduler(optimizer: Any) -> Any:
    return StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 1)


def predictions_of_a_scalar(parts: Parts) -> Any:
    trainer = parts.trainer
    trainer.calculate_predictions = lambda batch: 3.0  # type: ignore[method-assign]
    return trainer.predict(DATA)


def frozen(parts: Parts) -> Trainer:
    model = copy.deepcopy(parts.model).requires_grad_(False)
    return Trainer(model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters()))


def with_environment(parts: Parts, value: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_LIMIT_BATCHES", value)
        parts.train()


def batch_norm_of_one(parts: Parts) -> None:
    parts.train(
        per_device_batch_size=3,
        train_dataloader_kwargs={"sampler": torch.utils.data.SequentialSampler(INPUTS[:1])},
    )


def prepared_loader(parts: Parts) -> None:
    parts.train(parts.trainer.accelerator.prepare_data_loader(DataLoader(DATA)))


class Case(NamedTuple):
    """A mistake, and what the answer has to have: value, names and way out, each by itself."""

    name: str
    make: Callable[[Parts], Any]
    says: tuple[str, ...]
    raises: type[Exception] = AccelError
    """The error of accel, or that of the user's own code or of torch, which gets the way out as a note."""


CASES = [
    # the parts of a trainer
    Case("model_class", lambda p: p.create(model=nn.Linear), ("model is", "class Linear", "model = Net()")),
    Case("model_is_a_name", lambda p: p.create(model="resnet18"), ("model is 'resnet18'", "torch.nn.Module")),
    Case(
        "loss_is_a_word",
        lambda p: p.create(loss_func="mse"),
        ("loss_func is 'mse'", "torch.nn.functional.cross_entropy"),
    ),
    Case(
        "loss_class", lambda p: p.create(loss_func=nn.MSELoss), ("loss_func is", "class MSELoss", "MSELoss()")
    ),
    Case(
        "optimizer_class",
        lambda p: p.create(optimizer=torch.optim.SGD),
        ("optimizer is", "class SGD", "SGD(model.parameters())"),
    ),
    Case(
        "optimizer_is_a_word",
        lambda p: p.create(optimizer="adam"),
        ("optimizer is 'adam'", "SGD(model.parameters(), lr=0.1)"),
    ),
    Case(
        "parts_swapped",
        lambda p: p.create(loss_func=p.optimizer),
        ("loss_func is SGD (", "function", "torch.nn.functional.cross_entropy"),
    ),
    Case(
        "history_is_a_class",
        lambda p: p.create(run_history=InMemoryRunHistory),
        ("run_history is", "class InMemoryRunHistory", "instance", "leave it out"),
    ),
    Case(
        "accelerator_is_a_class",
        lambda p: p.create(accelerator=Accelerator),
        ("accelerator is", "class Accelerator", "instance", "leave it out"),
    ),
    Case("seed_negative", lambda p: p.create(seed=-1), ("seed is -1", "from 0", "Use None")),
    Case("seed_is_a_float", lambda p: p.create(seed=1.5), ("seed is 1.5", "whole number", "Use None")),
    Case("seed_is_a_boolean", lambda p: p.create(seed=True), ("seed is True", "whole number", "Use None")),
    # callbacks
    Case(
        "callbacks_none",
        lambda p: p.create(callbacks=None),
        ("callbacks is None", "DEFAULT_CALLBACKS", "callbacks=()"),
    ),
    Case(
        "callback_alone",
        lambda p: p.create(callbacks=Misspelled),
        ("callbacks is <class", "callbacks=(Misspelled"),
    ),
    Case(
        "callback_is_a_word",
        lambda p: p.create(callbacks=["bar"]),
        ("callbacks", "'bar'", "accel_core.TrainerCallback"),
    ),
    Case(
        "callback_needs_arguments",
        lambda p: p.create(callbacks=[NeedsArguments]),
        ("NeedsArguments needs", "'path'", "NeedsArguments(...)"),
    ),
    Case(
        "event_misspelled",
        lambda p: p.create(callbacks=[Misspelled]),
        ("Misspelled.on_train_epoch_strat", "Did you mean 'on_train_epoch_start'"),
    ),
    Case(
        "event_of_reference",
        lambda p: p.create(callbacks=[FromReference]),
        ("FromReference.on_stop_training_error", "Use on_training_run_end", "trainer.stop_reason"),
    ),
    Case(
        "event_of_lightning",
        lambda p: p.create(callbacks=[FromLightning]),
        ("FromLightning.on_train_batch_end", "Use on_train_step_end"),
    ),
    Case(
        "event_arguments",
        lambda p: p.create(callbacks=[WithoutArguments]),
        (
            "WithoutArguments.on_train_step_end",
            "'batch'",
            "def on_train_step_end(self, trainer, batch, batch_output, step)",
        ),
    ),
    Case(
        "event_of_the_trainers_own",
        lambda p: p.trainer.callbacks.call_event("on_run_close"),
        ("'on_run_close'", "trainer.callbacks.on_run_close("),
    ),
    Case(
        "custom_event_unheard",
        lambda p: p.trainer.callbacks.call_event("verify_batch", required=True),
        ("'verify_batch'", "required", "Add a callback", "[]"),
    ),
    # sizes and limits
    Case(
        "no_limit",
        lambda p: p.train(num_epochs=None),
        ("num_epochs", "max_num_train_steps", "None", "num_epochs=1"),
    ),
    Case("epochs_zero", lambda p: p.train(num_epochs=0), ("num_epochs is 0", "at least 1", "Use 1")),
    Case("epochs_float", lambda p: p.train(num_epochs=1.0), ("num_epochs is 1.0", "whole number", "Use 1")),
    Case(
        "epochs_boolean", lambda p: p.train(num_epochs=True), ("num_epochs is True", "whole number", "Use 1")
    ),
    Case(
        "updates_zero",
        lambda p: p.train(max_num_train_steps=0),
        ("max_num_train_steps is 0", "at least 1", "use 1"),
    ),
    Case(
        "batch_size_zero",
        lambda p: p.train(per_device_batch_size=0),
        ("per_device_batch_size is 0", "at least 1", "Use 1"),
    ),
    Case(
        "batch_size_negative",
        lambda p: p.train(per_device_batch_size=-8),
        ("per_device_batch_size is -8", "at least 1", "Use 1"),
    ),
    Case(
        "batch_size_none",
        lambda p: p.train(per_device_batch_size=None),
        ("per_device_batch_size is None", "whole number", "Use 1"),
    ),
    Case(
        "batch_size_word",
        lambda p: p.train(per_device_batch_size="8"),
        ("per_device_batch_size is '8'", "whole number", "Use 1"),
    ),
    Case(
        "eval_batch_size",
        lambda p: p.train(eval_per_device_batch_size=0),
        ("eval_per_device_batch_size is 0", "at least 1", "Leave it out"),
    ),
    Case(
        "accumulation_zero",
        lambda p: p.train(gradient_accumulation_steps=0),
        ("gradient_accumulation_steps is 0", "at least 1", "Use 1"),
    ),
    Case(
        "accumulation_boolean",
        lambda p: p.train(gradient_accumulation_steps=False),
        ("gradient_accumulation_steps is False", "whole number", "Use 1"),
    ),
    Case(
        "accumulation_of_accelerate",
        lambda p: p.create(accelerator=Accelerator(gradient_accumulation_steps=4)).train(DATA, 1),
        ("Accelerator", "gradient_accumulation_steps=4", "Pass gradient_accumulation_steps=4 to train"),
    ),
    Case(
        "clip_value_zero",
        lambda p: p.train(gradient_clip_value=0),
        ("gradient_clip_value is 0", "above 0", "Use None"),
    ),
    Case(
        "clip_norm_negative",
        lambda p: p.train(gradient_clip_norm=-1.0),
        ("gradient_clip_norm is -1.0", "above 0", "Use None"),
    ),
    Case(
        "clip_norm_nan",
        lambda p: p.train(gradient_clip_norm=float("nan")),
        ("gradient_clip_norm is nan", "above 0", "Use None"),
    ),
    Case("limit_zero", lambda p: LimitBatchesCallback(0), ("num_batches is 0", "at least 1", "Use 1")),
    Case(
        "limit_overfit",
        lambda p: LimitBatchesCallback(1, eval_only=True, overfit=True),
        ("overfit is True", "eval_only", "intermediate_only", "Drop one"),
    ),
    Case("limit_context", lambda p: LimitBatches(-1), ("num_batches is -1", "at least 1", "Use 1")),
    Case(
        "limit_of_environment",
        lambda p: with_environment(p, "few"),
        ("ACCEL_LIMIT_BATCHES is 'few'", "whole number", "3:overfit", "unset it"),
    ),
    Case(
        "limit_of_environment_zero",
        lambda p: with_environment(p, "0"),
        ("ACCEL_LIMIT_BATCHES is '0'", "at least 1", "3:overfit", "unset it"),
    ),
    # data
    Case("data_none", lambda p: p.train(None), ("train_dataset is None", "DataLoader", "TensorDataset")),
    Case("data_number", lambda p: p.train(7), ("train_dataset is 7", "DataLoader", "TensorDataset")),
    Case(
        "data_path",
        lambda p: p.train("images/"),
        ("train_dataset is 'images/'", "DataLoader", "TensorDataset"),
    ),
    Case(
        "data_class",
        lambda p: p.train(Fails),
        ("train_dataset is", "class Fails", "DataLoader", "TensorDataset"),
    ),
    Case(
        "data_dictionary",
        lambda p: p.train({"x": INPUTS}),
        ("train_dataset is {'x': tensor", "DataLoader", "TensorDataset"),
    ),
    Case(
        "data_scalar",
        lambda p: p.train(torch.tensor(1.0)),
        ("train_dataset is tensor(1.)", "DataLoader", "TensorDataset"),
    ),
    Case("data_empty", lambda p: p.train([]), ("train_dataset is empty", "length", " 0", "Check how")),
    Case(
        "eval_data_empty",
        lambda p: p.train(eval_dataset=[]),
        ("eval_dataset is empty", "length", " 0", "Check how"),
    ),
    Case(
        "eval_data_wrong",
        lambda p: p.train(eval_dataset=3),
        ("eval_dataset is 3", "DataLoader", "TensorDataset"),
    ),
    Case(
        "data_smaller_than_a_batch",
        lambda p: p.train(per_device_batch_size=16, train_dataloader_kwargs={"drop_last": True}),
        ("train_dataset", "no batch", "per_device_batch_size", "leave out drop_last"),
    ),
    Case(
        "stream_empty",
        lambda p: p.train(iter([])),
        ("list_iterator", "no batch", "drop_last=True", "Pass more data"),
    ),
    Case(
        "eval_data_smaller_than_a_batch",
        lambda p: p.trainer.evaluate(DATA, 16, {"drop_last": True}),
        ("TensorDataset", "no batch", "drop_last=True", "Pass more data"),
    ),
    Case(
        "generator_read_twice",
        lambda p: p.train(iter(DATA), 2),
        ("train_dataset", "only once", "num_epochs is 2", "num_epochs=1", "__iter__"),
    ),
    Case(
        "loader_prepared_already",
        prepared_loader,
        ("train_dataset", "DataLoaderShard", "before accelerator.prepare"),
    ),
    Case(
        "sampler_of_several_processes",
        lambda p: p.train(
            train_dataloader_kwargs={"sampler": DistributedSampler(DATA, num_replicas=2, rank=0)}
        ),
        ("DistributedSampler", "Pass the data set alone"),
    ),
    Case(
        "samples_differ_in_shape",
        lambda p: p.train([(torch.ones(1 + i), 0) for i in range(4)]),
        ("samples", "shape", "[4]", "Pass a collate_fn"),
        RuntimeError,
    ),
    Case(
        "samples_of_no_kind",
        lambda p: p.train([object(), object()]),
        ("collate_fn", "class 'object'", "Pass your own collate_fn", "tensors"),
        TypeError,
    ),
    Case(
        "batch_of_mappings",
        lambda p: p.train([{"x": 1.0}] * 4),
        ("dict", "['x']", "(inputs, targets)", "Override calculate_train_batch_loss", "return pairs"),
    ),
    Case(
        "batch_of_tensors",
        lambda p: p.train(INPUTS),
        ("Tensor", "(inputs, targets)", "Override calculate_train_batch_loss", "return pairs"),
    ),
    Case(
        "batch_of_one_part",
        lambda p: p.train(TensorDataset(INPUTS)),
        ("list of 1", "(inputs, targets)", "Override calculate_train_batch_loss", "return pairs"),
    ),
    Case(
        "batch_norm_of_one_sample",
        batch_norm_of_one,
        ("one sample", "train_dataloader_kwargs={'drop_last': True}", "per_device_batch_size"),
        ValueError,
    ),
    # arguments of the loader
    Case(
        "kwargs_list",
        lambda p: p.train(train_dataloader_kwargs=[2]),
        ("train_dataloader_kwargs is [2]", "dict(num_workers=2)"),
    ),
    Case(
        "kwargs_misspelled",
        lambda p: p.train(train_dataloader_kwargs={"num_worker": 2}),
        ("dataloader_kwargs", "'num_worker'", "Did you mean 'num_workers'?"),
    ),
    Case(
        "kwargs_of_evaluation",
        lambda p: p.train(eval_dataloader_kwargs={"batch_size": 0}),
        ("eval_dataloader_kwargs['batch_size'] is 0", "at least 1", "Use 1"),
    ),
    Case(
        "kwargs_do_not_fit",
        lambda p: p.train(train_dataloader_kwargs={"num_workers": 0, "prefetch_factor": 2}),
        ("dataloader_kwargs", "{'num_workers': 0, 'prefetch_factor': 2}", "TensorDataset", "Leave out"),
    ),
    Case(
        "kwargs_for_ready_loader",
        lambda p: p.train(DataLoader(DATA), train_dataloader_kwargs={"num_workers": 1}),
        ("train_dataloader_kwargs is {'num_workers': 1}", "DataLoader", "Leave train_dataloader_kwargs out"),
    ),
    Case(
        "collate_is_a_word",
        lambda p: p.train(collate_fn="pad"),
        ("collate_fn is 'pad'", "function", "list of samples"),
    ),
    Case(
        "collate_for_ready_loader",
        lambda p: p.train(DataLoader(DATA), collate_fn=list),
        ("collate_fn is", "class list", "DataLoader", "Give the loader its collate_fn"),
    ),
    Case(
        "seed_of_stream",
        lambda p: p.train(Unsized(), seed_each_sample=True),
        ("seed_each_sample is True", "Unsized", "Leave it out", "__getitem__"),
    ),
    Case(
        "seed_each_sample", lambda p: p.train(seed_each_sample=7), ("seed_each_sample is 7", "[True, False]")
    ),
    Case(
        "reset_run_history",
        lambda p: p.train(reset_run_history="no"),
        ("reset_run_history is 'no'", "[True, False]"),
    ),
    # the scheduler
    Case(
        "scheduler_instance",
        lambda p: p.train(create_scheduler_fn=StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 1)),
        ("create_scheduler_fn is", "StepLR", "functools.partial(StepLR, ...)", "without the optimizer"),
    ),
    Case(
        "scheduler_is_a_word",
        lambda p: p.train(create_scheduler_fn="cosine"),
        ("create_scheduler_fn is 'cosine'", "function", "optimizer"),
    ),
    Case(
        "scheduler_needs_arguments",
        lambda p: p.train(create_scheduler_fn=OneCycleLR),
        ("create_scheduler_fn", "OneCycleLR", "'max_lr'", "functools.partial(OneCycleLR, ...)"),
        TypeError,
    ),
    Case(
        "scheduler_none",
        lambda p: p.train(create_scheduler_fn=lambda o: None),
        ("create_scheduler_fn returned None", "step()", "Return a scheduler"),
    ),
    Case(
        "scheduler_lost",
        lambda p: p.train(create_scheduler_fn=lambda o: bool(LambdaLR(o, lambda n: 0.5))),
        ("create_scheduler_fn returned True", "step()", "Return a scheduler"),
    ),
    Case(
        "scheduler_of_another",
        lambda p: p.train(create_scheduler_fn=foreign_scheduler),
        ("create_scheduler_fn", "StepLR", "another optimizer", "Build it"),
    ),
    Case(
        "scheduler_step_every",
        lambda p: p.train(scheduler_step_every="step"),
        ("scheduler_step_every is 'step'", "['update', 'epoch', 'evaluation']"),
    ),
    Case(
        "scheduler_metric",
        lambda p: p.train(scheduler_metric=3),
        ("scheduler_metric is 3", "string", "'eval_loss_epoch'"),
    ),
    Case(
        "scheduler_without_its_metric",
        lambda p: p.train(create_scheduler_fn=ReduceLROnPlateau),
        (
            "scheduler_metric is 'eval_loss_epoch'",
            "ReduceLROnPlateau",
            "eval_dataset is None",
            "scheduler_metric='train_loss_epoch'",
        ),
    ),
    Case(
        "placeholder_of_unsized_data",
        lambda p: p.train(
            Unsized(),
            create_scheduler_fn=partial(
                OneCycleLR, max_lr=1, total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS
            ),
        ),
        ("NUM_UPDATE_STEPS", "no length", "Write the number"),
    ),
    Case(
        "placeholder_of_missing_evaluation",
        lambda p: p.train(
            create_scheduler_fn=partial(StepLR, step_size=TrainerPlaceholderValues.EVAL_DATALOADER_LEN)
        ),
        ("EVAL_DATALOADER_LEN", "not given", "Write the number"),
    ),
    # the model and its optimizer
    Case(
        "optimizer_missing",
        lambda p: p.create(optimizer=None).train(DATA, 1),
        ("optimizer is None", "Pass an optimizer", "call evaluate"),
    ),
    Case(
        "model_frozen",
        lambda p: frozen(p).train(DATA, 1),
        ("model", "no parameter", "requires_grad=True", "Unfreeze"),
    ),
    Case(
        "optimizer_of_a_copy",
        lambda p: p.create(model=copy.deepcopy(p.model)).train(DATA, 1),
        ("optimizer", "trainable parameters", "optimizer from its parameters"),
    ),
    Case(
        "optimizer_of_a_moved_copy",
        lambda p: p.create(model=copy.deepcopy(p.model).to(torch.float64)).train(DATA, 1),
        ("optimizer", "trainable parameters", "after", "move"),
    ),
    Case(
        "optimizer_of_a_compiled_copy",
        lambda p: p.create(model=torch.compile(copy.deepcopy(p.model), backend="eager")).train(DATA, 1),
        ("optimizer", "trainable parameters", "optimizer from its parameters"),
    ),
    Case(
        "model_as_attribute",
        lambda p: p.trainer_of(network=p.model).train(DATA, 1),
        ("trainer.network is the model", "Call trainer.model", "remove trainer.network"),
    ),
    # what a loss step returns
    Case(
        "loss_func_missing",
        lambda p: p.create(loss_func=None).train(DATA, 1),
        ("loss_func is None", "Pass a loss function", "override calculate_train_batch_loss"),
    ),
    Case(
        "loss_func_missing_in_evaluation",
        lambda p: p.create(loss_func=None).evaluate(DATA),
        ("loss_func is None", "Pass a loss function", "override calculate_eval_batch_loss"),
    ),
    Case(
        "loss_func_refuses",
        lambda p: p.train([(x, torch.ones(3)) for x in INPUTS]),
        ("loss_func", "shape (8, 2)", "shape (8, 3)", "override calculate_train_batch_loss"),
        RuntimeError,
    ),
    Case(
        "step_returns_loss",
        lambda p: p.trainer_of(lambda s, b: 1.0).train(DATA, 1),
        ("calculate_train_batch_loss returned 1.0", "dictionary", "'loss', 'model_outputs' and 'batch_size'"),
    ),
    Case(
        "step_without_batch_size",
        lambda p: p.trainer_of(returning(batch_size=...)).train(DATA, 1),
        (
            "calculate_train_batch_loss",
            "['loss', 'model_outputs']",
            "'batch_size' is missing",
            "number of samples",
        ),
    ),
    Case(
        "step_with_the_loss_alone",
        lambda p: p.trainer_of(returning(model_outputs=..., batch_size=...)).train(DATA, 1),
        ("calculate_train_batch_loss", "['loss']", "'batch_size' is missing", "number of samples"),
    ),
    Case(
        "step_without_loss",
        lambda p: p.trainer_of(returning(loss=...)).train(DATA, 1),
        ("calculate_train_batch_loss", "['model_outputs', 'batch_size']", "'loss' is missing", "mean loss"),
    ),
    Case(
        "loss_by_sample",
        lambda p: p.trainer_of(returning(loss=lambda loss: loss.expand(8))).train(DATA, 1),
        ("calculate_train_batch_loss", "shape (8,)", "'loss'", "scalar", "loss.mean()"),
    ),
    Case(
        "loss_is_a_number",
        lambda p: p.trainer_of(returning(loss=0.5)).train(DATA, 1),
        ("calculate_train_batch_loss", "0.5", "'loss'", "scalar", "loss.mean()"),
    ),
    Case(
        "loss_without_gradient",
        lambda p: p.trainer_of(returning(loss=torch.Tensor.detach)).train(DATA, 1),
        ("calculate_train_batch_loss", "'loss'", "gradient", "without detach()"),
    ),
    Case(
        "loss_nan",
        lambda p: p.trainer_of(returning(loss=lambda loss: loss * float("nan"))).train(DATA, 1),
        ("calculate_train_batch_loss", "loss nan", "first batch", "finite", "Look for nan or inf"),
    ),
    Case(
        "loss_infinite",
        lambda p: p.trainer_of(returning(loss=lambda loss: loss + float("inf"))).train(DATA, 1),
        ("calculate_train_batch_loss", "loss inf", "first batch", "finite", "Look for nan or inf"),
    ),
    Case(
        "batch_size_none",
        lambda p: p.trainer_of(returning(batch_size=None)).train(DATA, 1),
        ("calculate_train_batch_loss", "None", "'batch_size'", "at least 1", "len(xb)"),
    ),
    Case(
        "no_items",
        lambda p: p.trainer_of(returning(num_items_in_batch=0)).train(DATA, 1, gradient_accumulation_steps=2),
        (" 0 items", "Leave out samples", "num_items_in_batch above 0"),
    ),
    Case(
        "log_of_words",
        lambda p: p.trainer_of(returning(log={"note": "fine"})).train(DATA, 1),
        (
            "calculate_train_batch_loss",
            "{'note': 'fine'}",
            "'log'",
            "dictionary of numbers",
            "another key",
        ),
    ),
    Case(
        "log_of_vectors",
        lambda p: p.trainer_of(returning(log={"a": torch.ones(2)})).evaluate(DATA),
        ("calculate_eval_batch_loss", "{'a': tensor([1., 1.])}", "'log'", "Take the mean"),
    ),
    Case(
        "metric_is_a_word",
        lambda p: p.create(callbacks=[RecordsWords]).train(DATA, 1),
        ("'accuracy' is 'good'", "number", "several names"),
    ),
    Case(
        "metric_is_a_vector",
        lambda p: p.create(callbacks=[RecordsVectors]).train(DATA, 1),
        ("'accuracy' is tensor([1., 1., 1.])", "number", "several names"),
    ),
    Case(
        "metric_unknown",
        lambda p: p.trainer.run_history.get_latest_metric("val_loss"),
        ("'val_loss'", "['accuracy']"),
    ),
    # running, evaluating, predicting
    Case(
        "train_inside_train",
        lambda p: p.create(callbacks=[TrainsInside]).train(DATA, 1),
        ("train was called inside", "Call train afterwards", "run_eval_epoch"),
    ),
    Case(
        "evaluate_nothing",
        lambda p: p.trainer.evaluate(),
        ("dataset is None", "eval_dataset", "Pass the data"),
    ),
    Case(
        "evaluate_batch_size",
        lambda p: p.trainer.evaluate(DATA, 0),
        ("per_device_batch_size is 0", "at least 1", "Use 1"),
    ),
    Case(
        "evaluate_kwargs",
        lambda p: p.trainer.evaluate(DATA, 2, {"shufle": 1}),
        ("dataloader_kwargs", "'shufle'", "Did you mean 'shuffle'?"),
    ),
    Case(
        "evaluate_epoch_of_nothing",
        lambda p: p.trainer.run_eval_epoch(),
        ("run_eval_epoch", "outside of a run", "Call train or evaluate"),
    ),
    Case(
        "predict_nothing",
        lambda p: p.trainer.predict(None),
        ("dataset is None", "eval_dataset", "Pass the data"),
    ),
    Case(
        "predict_empty",
        lambda p: p.trainer.predict([]),
        ("dataset is empty", "at least one sample", "Check how"),
    ),
    Case(
        "predict_collate",
        lambda p: p.trainer.predict(DATA, collate_fn=3),
        ("collate_fn is 3", "function", "list of samples"),
    ),
    Case(
        "predict_scalars",
        predictions_of_a_scalar,
        ("calculate_predictions returned 3.0", "first dimension", "dictionaries"),
    ),
    # resuming and saving
    Case(
        "resume_true",
        lambda p: p.train(resume_from=True),
        ("resume_from is True", "folder of a training state", "latest_checkpoint('checkpoints')"),
    ),
    Case(
        "resume_empty",
        lambda p: p.train(resume_from=""),
        ("resume_from is ''", "folder of a training state", "latest_checkpoint('checkpoints')"),
    ),
    Case(
        "resume_from_nowhere",
        lambda p: p.train(resume_from=p.folder / "gone"),
        ("gone' does not exist", "complete training state", "None to start afresh"),
    ),
    Case(
        "resume_from_empty_folder",
        lambda p: p.train(resume_from=p.folder),
        ("resume_here'", "trainer_state.json", "['notes.txt']", "None to start afresh"),
    ),
    Case(
        "load_nothing",
        lambda p: p.trainer.load_training_state(p.folder / "gone"),
        ("gone' does not exist", "complete training state"),
    ),
    Case(
        "load_checkpoint_of_nothing",
        lambda p: p.trainer.load_checkpoint(p.folder / "gone.pt"),
        ("gone.pt'", "FileNotFoundError", "another checkpoint"),
    ),
    Case(
        "load_checkpoint_of_folder",
        lambda p: p.trainer.load_checkpoint(p.folder),
        ("resume_here'", "folder", "train(..., resume_from='"),
    ),
    Case(
        "save_before_a_run",
        lambda p: p.trainer.save_training_state(p.folder / "state"),
        ("save_training_state", "before training", "Use save_checkpoint"),
    ),
]


def whole_state(parts: Parts) -> dict[str, Any]:
    """All that a mistake must leave alone, as values that can be compared."""
    return {
        "weights": {name: value.tolist() for name, value in parts.model.state_dict().items()},
        "modes": [module.training for module in parts.model.modules()],
        "gradients": [parameter.grad for parameter in parts.model.parameters()],
        "optimizer": repr(parts.optimizer.state_dict()),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state().tolist(),
        "history": parts.trainer.run_history.to_records(),
        "files": sorted(path.relative_to(parts.folder) for path in parts.folder.rglob("*")),
        "user's objects": (parts.trainer.model is parts.model, parts.trainer.optimizer is parts.optimizer),
    }


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """A model with buffers, random numbers and a mode to lose, and a trainer that has a history already."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=[], seed=3)
    trainer.run_history.update_metric("accuracy", 0.5)
    folder = tmp_path / "resume_here"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    return Parts(model, optimizer, trainer, folder)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_told_with_its_way_out_and_changes_nothing(
    case: Case, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts.folder)
    before = whole_state(parts)
    with pytest.raises(case.raises) as caught:
        case.make(parts)
    # In a worker torch makes the traceback, with the notes, a part of the message.
    told = "\n".join(
        [str(caught.value), type(caught.value).__name__, *getattr(caught.value, "__notes__", ())]
    )
    assert "Traceback" not in told or case.name.endswith("in_worker")
    for words in case.says:
        assert words in told
    assert whole_state(parts) == before


class Together(Fails):
    """Reads whole batches."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


HERE: dict[str, Any] = {"train_dataloader_kwargs": {"num_workers": 0}}


def evaluate_here(parts: Parts, dataset: Any, **kwargs: Any) -> None:
    parts.trainer.evaluate(dataset, dataloader_kwargs={"num_workers": 0, **kwargs})


NOTE_ON_SAMPLE = "accel was reading the sample 7 of a Fails with the length 10. Try dataset[7] on its own"
NOTE_ON_BATCH = "accel was reading the samples [4, 5, 6, 7] of a Together with the length 10. Try dataset.__getitems__([4, 5"
FAILING: dict[str, tuple[Callable[[Parts], Any], type[Exception], str]] = {
    "training": (lambda p: p.train(Fails(), **HERE), OSError, NOTE_ON_SAMPLE),
    "evaluation": (lambda p: evaluate_here(p, Fails()), OSError, NOTE_ON_SAMPLE),
    "seeded samples": (lambda p: p.train(Fails(), seed_each_sample=True, **HERE), OSError, NOTE_ON_SAMPLE),
    "ready batches": (
        lambda p: evaluate_here(p, Subset(Fails(), [7]), batch_size=None),
        OSError,
        "sample 0 of a Subset",
    ),
    "whole batches": (lambda p: evaluate_here(p, Together(), batch_size=4), OSError, NOTE_ON_BATCH),
    "length": (
        lambda p: p.train(Lies(), per_device_batch_size=13, **HERE),
        IndexError,
        "of a Lies with the length 13",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_exception_of_the_data_set_stays_what_it_is_with_a_note_on_the_sample(
    name: str, parts: Parts
) -> None:
    make, kind, note = FAILING[name]
    before = whole_state(parts)
    with pytest.raises(kind) as caught:
        make(parts)
    assert type(caught.value) is kind
    assert str(caught.value) in ("photo_7.png is truncated", "list index out of range")
    assert [note in each for each in caught.value.__notes__] == [True]
    assert whole_state(parts) == before


@pytest.mark.parametrize("data_class", [Fails, Together])
def test_a_worker_sends_the_type_of_the_exception_and_the_note(parts: Parts, data_class: type[Fails]) -> None:
    before = whole_state(parts)
    with pytest.raises(OSError, match="photo_7") as caught:
        parts.train(data_class(), train_dataloader_kwargs={"num_workers": 1})
    assert type(caught.value) is OSError
    assert f"of a {data_class.__name__} with the length 10" in str(caught.value)
    assert whole_state(parts) == before


def test_a_worker_that_cannot_send_the_exception_says_so_and_nobody_waits(parts: Parts) -> None:
    class LocalError(Exception):
        pass

    class FailsLocally(Fails):
        def __getitem__(self, index: int) -> Any:
            raise LocalError("photo_7.png is truncated")

    with pytest.raises(RuntimeError, match="Define the class at the top of a module") as caught:
        parts.train(FailsLocally(), train_dataloader_kwargs={"num_workers": 1})
    for words in (
        "LocalError: photo_7.png is truncated",
        "accel was reading the sample",
        "LocalError in a worker",
    ):
        assert words in str(caught.value)


class CorruptError(Exception):
    pass


@pytest.mark.parametrize("num_runs", [1, 2])
def test_the_object_that_was_raised_is_caught_and_no_sample_is_read_again(
    parts: Parts, num_runs: int
) -> None:
    error = CorruptError("file 0")
    read: list[int] = []

    class Corrupt(Fails):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            raise error

    for _ in range(num_runs):
        with pytest.raises(CorruptError) as caught:
            evaluate_here(parts, Corrupt())
        assert caught.value is error
    assert read == [0] * num_runs
    assert len(error.__notes__) == 1


def test_the_table_is_long_enough_and_every_case_is_one_of_its_own() -> None:
    assert len(CASES) >= 60
    assert len({case.make for case in CASES}) == len(CASES)


def test_a_compiled_or_moved_model_keeps_its_optimizer(parts: Parts) -> None:
    """No false alarm: moving in place and compiling leave the parameters what they are."""
    compiled = torch.compile(parts.model.to(torch.float32).to("cpu"), backend="eager")
    trainer = parts.create(model=compiled, callbacks=[])
    trainer.train(DATA, num_epochs=1)
    assert trainer.run_progress.updates_completed == 2


def test_layers_replaced_after_the_optimizer_was_created_are_told(parts: Parts) -> None:
    parts.model[3] = nn.Linear(6, 2)  # type: ignore[operator]
    with pytest.warns(
        AccelWarning, match=r"optimizer .*2 parameters.*Create it after.*attribute of the trainer"
    ):
        parts.train()


def test_parameters_of_a_loss_module_are_no_foreign_ones(parts: Parts) -> None:
    class ScaledLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, targets) * self.scale

    loss = ScaledLoss()
    optimizer = torch.optim.SGD([*parts.model.parameters(), *loss.parameters()], lr=0.1)
    parts.create(loss_func=loss, optimizer=optimizer, callbacks=[]).train(DATA, num_epochs=1)
    assert loss.scale.item() != 1.0


def test_long_values_are_cut_in_messages(parts: Parts) -> None:
    with pytest.raises(AccelError) as caught:
        parts.create(seed=list(range(1000)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", sorted(FOREIGN_METHODS))
def test_a_method_that_only_pytorch_accelerated_calls_is_refused_with_the_one_to_override(name):
    assert not hasattr(Trainer, name)
    ported = type("PortedTrainer", (Trainer,), {name: lambda self, *args: None})
    with pytest.raises(
        ConfigurationError, match=rf"PortedTrainer\.{name} .*(Override|Use) {FOREIGN_METHODS[name]} "
    ):
        ported(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, None)


@pytest.mark.parametrize("name", sorted(FOREIGN_STEPS))
def test_a_method_that_another_library_calls_is_refused_unless_it_helps_one_of_ours(name):
    ours = FOREIGN_STEPS[name]
    assert not hasattr(Trainer, name)
    assert hasattr(Trainer, ours)
    parts = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, None
    ported = type("PortedTrainer", (Trainer,), {name: lambda self, *args: None})
    with pytest.raises(ConfigurationError, match=rf"PortedTrainer\.{name} .*Override {ours} "):
        ported(*parts)
    helped = type("HelpedTrainer", (Trainer,), {name: lambda self: None, ours: lambda self, batch: None})
    assert helped(*parts).optimizer is None
