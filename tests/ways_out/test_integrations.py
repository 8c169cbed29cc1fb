"""Each way out that an error of accel_integrations names works: the mistake is made, then what the message says instead."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import PIL.Image
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.scheduler import CosineLRScheduler, StepLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, StepLR
from torch.utils.data import TensorDataset

from accel_core import Trainer
from accel_integrations.samplers import LengthGroupedSampler
from accel_integrations.schedulers import (
    CosineLrScheduler,
    StatefulSchedulerBase,
    WSDCheckpointCallback,
    WSDLrScheduler,
    estimate_checkpoint_steps,
)
from accel_integrations.timm_adapter import (
    AdaptiveGradientClippingCallback,
    TimmTrainer,
    create_timm_model,
    create_timm_optimizer,
    create_timm_transforms,
    timm_parameter_groups,
    timm_scheduler_fn,
)
from accel_integrations.transformers_adapter import (
    TransformersTrainer,
    transformers_parameter_groups,
    transformers_scheduler_fn,
)
from local_hub import NOWHERE
from sms_spam import MINILM
from tiny import optimizer_of_rates, tiny_data, tiny_network, tiny_trainer
from tiny_transformers import collate, create_model, create_samples
from ways_out import (
    Row,
    check_every_error_is_known,
    check_every_way_out_is_known,
    make_mistake_and_ways_out,
    name_of,
    without,
)

DATA = tiny_data(16)
NAME = "test_resnet"


def train(*callbacks: Any, **kwargs: Any) -> Trainer:
    """Two epochs of four updates."""
    trainer = tiny_trainer(callbacks=callbacks)
    trainer.train(DATA, **{"num_epochs": 2, "per_device_batch_size": 4, **kwargs})
    return trainer


def scheduled(create_scheduler_fn: Any) -> Trainer:
    return train(create_scheduler_fn=create_scheduler_fn)


def in_groups_of_length(lengths: list[int], batch_size: int) -> Trainer:
    return train(train_dataloader_kwargs={"sampler": LengthGroupedSampler(lengths, batch_size)})


def trained_by(optimizer: Any, model: nn.Module, data: Any = DATA) -> Trainer:
    """A run of two updates, after which the weights are others than before."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=(), seed=3)
    trainer.train(data, 1, per_device_batch_size=4, max_num_train_steps=2)
    assert not all(map(torch.equal, before, model.parameters()))
    return trainer


def images(size: int = 32) -> TensorDataset:
    return TensorDataset(torch.rand(4, 3, size, size), torch.arange(4) % 3)


def trains_on_images(model: nn.Module, size: int = 32) -> Trainer:
    return trained_by(torch.optim.SGD(model.parameters(), lr=0.1), model, images(size))


def export(create_scheduler_fn: Any) -> str:
    scheduled(create_scheduler_fn).save_checkpoint("model.pt")
    return "model.pt"


# ---------------------------------------------------------------------- schedules


class Halved(StatefulSchedulerBase):
    """Halves all values every second update, or does whatever `values` says."""

    def __init__(self, optimizer: Any, field: str = "lr", values: Any = None) -> None:
        self.values = values
        super().__init__(optimizer, field)

    def get_updated_values(self, num_updates: int) -> Any:
        if self.values is not None:
            return self.values(self)
        return [base * 0.5 ** (num_updates // 2) for base in self.base_values]


def halved(**kwargs: Any) -> Trainer:
    return scheduled(functools.partial(Halved, **kwargs))


def cosine(**kwargs: Any) -> Trainer:
    return scheduled(CosineLrScheduler.create_scheduler_fn(**kwargs))


def wsd(**kwargs: Any) -> WSDLrScheduler:
    return WSDLrScheduler(optimizer_of_rates(0.1), **{"total_steps": 100, **kwargs})


def by_wsd(*args: Any, **kwargs: Any) -> Trainer:
    schedule = WSDLrScheduler.create_scheduler_fn()
    return train(WSDCheckpointCallback(*args, **kwargs), create_scheduler_fn=schedule)


def in_groups(number: int) -> Trainer:
    """A run with a schedule, whose optimizer has one or two groups of parameters."""
    trainer = tiny_trainer()
    parameters = list(trainer.model.parameters())
    parts = [parameters] if number == 1 else [parameters[:2], parameters[2:]]
    trainer.optimizer = torch.optim.SGD([{"params": part} for part in parts], lr=0.1)
    schedule = CosineLrScheduler.create_scheduler_fn()
    trainer.train(DATA, 1, per_device_batch_size=4, create_scheduler_fn=schedule)
    return trainer


def load_of_another_class(**kwargs: Any) -> None:
    path = export(functools.partial(ConstantLR, total_iters=1))
    cosine().load_checkpoint(path, **kwargs)


def load_own() -> None:
    path = export(CosineLrScheduler.create_scheduler_fn())
    cosine().load_checkpoint(path)


def load_of_two_groups(number: int, **kwargs: Any) -> None:
    in_groups(2).save_checkpoint("model.pt")
    in_groups(number).load_checkpoint("model.pt", **kwargs)


def through(**kwargs: Any) -> None:
    """All steps of a schedule, whose rates never rise above that of the optimizer."""
    schedule = wsd(**kwargs)
    for _ in range(schedule.total_steps):
        schedule.step()
        assert 0 <= schedule.optimizer.param_groups[0]["lr"] <= 0.1


def continue_to(total_steps: int) -> None:
    first = wsd()
    for _ in range(10):
        first.step()
    wsd(total_steps=total_steps, is_continuation_from_checkpoint=True).load_state_dict(first.state_dict())


def continue_with_trainer(num_epochs: int) -> None:
    scheduled(WSDLrScheduler.create_scheduler_fn()).save_training_state("state")
    schedule = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    train(num_epochs=num_epochs, create_scheduler_fn=schedule, resume_from="state")


def load_of_another_timm_class(kind: Any, **kwargs: Any) -> None:
    path = export(timm_scheduler_fn(CosineLRScheduler, t_initial=3))
    scheduled(timm_scheduler_fn(kind, **kwargs)).load_checkpoint(path)


# ---------------------------------------------------------------------- timm


@contextlib.contextmanager
def no_network() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
        yield


def create_without_network(**kwargs: Any) -> nn.Module:
    """A model whose weights are not on this machine."""
    with no_network():
        return create_timm_model(NAME, 10, **{"cache_dir": "empty", **kwargs})


def weights() -> str:
    """A file of weights."""
    save_file(timm.create_model(NAME).state_dict(), "weights.safetensors")
    return "weights.safetensors"


def from_weights(**overlay: Any) -> nn.Module:
    return create_timm_model(NAME, 10, pretrained_cfg_overlay=overlay)


def vit(name: str = "test_vit", **kwargs: Any) -> nn.Module:
    return create_timm_model(name, 10, pretrained=False, **kwargs)


def reads_images(model: nn.Module, size: tuple[int, int, int]) -> None:
    """An image of another size goes through the transforms into the model."""
    transforms = create_timm_transforms(model, size)
    image = PIL.Image.new("L" if size[0] == 1 else "RGB", (200, 190))
    for transform in (transforms.train, transforms.evaluation):
        assert model.eval()(transform(image)[None]).shape == (1, 10)


def groups(model: nn.Module | None = None, data: Any = DATA, **kwargs: Any) -> Trainer:
    model = tiny_network() if model is None else model
    return trained_by(torch.optim.AdamW(timm_parameter_groups(model, **{"lr": 0.1, **kwargs})), model, data)


def by_timm(name: str = "adamw", **kwargs: Any) -> Trainer:
    model = tiny_network()
    return trained_by(create_timm_optimizer(model, name, **kwargs), model)


def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def train_images(targets: torch.Tensor, **kwargs: Any) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = TimmTrainer(model, optimizer=optimizer, callbacks=(), **{"num_classes": 3, **kwargs})
    trainer.train(TensorDataset(torch.rand(4, 3, 2, 2), targets), 1)


def indices() -> torch.Tensor:
    return torch.arange(4) % 3


def rows() -> torch.Tensor:
    return torch.eye(3)[indices()]


def classes_of(num_classes: int) -> None:
    model = create_timm_model(NAME, 10, pretrained=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    TimmTrainer(model, optimizer=optimizer, callbacks=(), num_classes=num_classes).train(images(), 1)


def own_loss(**kwargs: Any) -> None:
    train_images(indices(), loss_func=nn.functional.cross_entropy, **kwargs)


# ---------------------------------------------------------------------- transformers


class Bare(nn.Module):
    """A model that computes no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 8), nn.Linear(8, 3)

    def forward(self, input_ids: Any) -> Any:
        return {"logits": self.head(self.embedding(input_ids).mean(1))}

    def save_parts(self) -> None:
        """Has no save_pretrained."""


def cross_entropy(outputs: Any, labels: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs["logits"], labels)


def fine_tune_without_labels(**kwargs: Any) -> Any:
    samples = [{"input_ids": sample["input_ids"]} for sample in create_samples("classes")]
    return fine_tune(samples, tokenizer=tokenizer(), collate_fn=None, **kwargs)


def fine_tune(samples: Any, model: Any = None, kind: Any = TransformersTrainer, **kwargs: Any) -> Any:
    model = create_model("classes") if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    collate_fn = kwargs.pop("collate_fn", collate)
    trainer = kind(model, optimizer=optimizer, callbacks=(), **kwargs)
    trainer.train(samples, 1, per_device_batch_size=4, collate_fn=collate_fn)
    return trainer


def as_pairs(samples: Any) -> Any:
    batch = collate(samples)
    return batch["input_ids"], batch["labels"]


class OfPairs(TransformersTrainer):
    """Makes mappings of pairs."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss({"input_ids": batch[0], "labels": batch[1]})


def mappings_of(pairs: Any) -> Any:
    return collate([{"input_ids": tokens, "labels": label} for tokens, label in pairs])


def pairs() -> Any:
    return [(sample["input_ids"], sample["labels"]) for sample in create_samples("classes")]


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MINILM)


def fine_tune_without_padding_token(pad_token: str | None = None, **kwargs: Any) -> None:
    reader = tokenizer()
    reader.eos_token = reader.sep_token
    reader.pad_token = None if pad_token is None else getattr(reader, pad_token)
    model = create_model("classes", vocab_size=len(reader))
    fine_tune(create_samples("classes"), model, tokenizer=reader, **{"collate_fn": None, **kwargs})


def parameter_groups(**kwargs: Any) -> None:
    model = create_model("classes")
    groups = transformers_parameter_groups(model, **{"lr": 5e-5, **kwargs})
    trainer = TransformersTrainer(model, optimizer=torch.optim.AdamW(groups), callbacks=())
    trainer.train(create_samples("classes"), 1, per_device_batch_size=4, collate_fn=collate)


def adapted(*modules: str) -> TransformersTrainer:
    model = peft.get_peft_model(create_model("classes"), peft.LoraConfig(r=2, target_modules=list(modules)))
    return TransformersTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=())


def load_adapters(*modules: str, partly: bool = False) -> None:
    adapted("query").save_checkpoint("adapters.pt")
    trainer = adapted(*modules)
    trainer.load_partial_states = partly
    trainer.load_checkpoint("adapters.pt")


def save_pretrained(folder: str, trainer: Any = None, **kwargs: Any) -> None:
    if trainer is None:
        trainer = TransformersTrainer(create_model("classes"), callbacks=())
    trainer.save_pretrained(folder, **kwargs)


def taken() -> str:
    Path("taken").mkdir(exist_ok=True)
    Path("taken", "notes.py").write_text("mine")
    return "taken"


def below_a_file() -> str:
    Path("file").write_text("mine")
    return "file/model"


def save_bare() -> None:
    TransformersTrainer(Bare(), callbacks=()).save_pretrained("bare")


def save_bare_export() -> None:
    TransformersTrainer(Bare(), callbacks=()).save_checkpoint("bare.pt")


ROWS: tuple[Row, ...] = (
    Row(
        "but must be one number of at least 0 for each sample, in the order of the data set.",
        lambda: LengthGroupedSampler([len("ab"), -1], 4),
        (lambda: in_groups_of_length([len(sample[0]) for sample in DATA], 4),),
    ),
    Row(
        "param_group_field {} {}. Schedule one of {}.",
        lambda: halved(field="nesterov"),
        (lambda: halved(field="lr"),),
        says="Schedule one of ['lr'].",
    ),
    Row(
        "param_group_field {} {}. Schedule one of {}.",
        lambda: halved(field="learning_rate"),
        (lambda: halved(field="lr"),),
    ),
    Row(
        "{} is {}, but must be {}. {}",
        lambda: cosine(k_decay=0),
        (lambda: cosine(k_decay=1),),
    ),
    Row(
        "but must return a list with a number for each of the {} parameter groups. To leave them ",
        lambda: halved(values=lambda self: 0.1),
        (lambda: halved(values=lambda self: [0.1]), lambda: halved(values=lambda self: self.base_values)),
    ),
    Row(
        "but {} also needs {}. Load a state that this class has saved, or leave the scheduler's out ",
        load_of_another_class,
        (load_own, lambda: load_of_another_class(load_scheduler=False)),
    ),
    Row(
        "The state is for {} parameter groups, but the optimizer has {}.",
        lambda: load_of_two_groups(1, load_optimizer=False),
        (
            lambda: load_of_two_groups(2),
            lambda: load_of_two_groups(1, load_optimizer=False, load_scheduler=False),
        ),
    ),
    Row(
        "but the length of the run must be given once. Pass the first two, or total_steps alone.",
        lambda: wsd(num_epochs=2, num_update_steps_per_epoch=4),
        (lambda: through(total_steps=None, num_epochs=2, num_update_steps_per_epoch=50), through),
    ),
    Row(
        "WSDCheckpointCallback follows a WSDLrScheduler, but the scheduler of this run is ",
        lambda: train(WSDCheckpointCallback("states")),
        (
            lambda: by_wsd("states"),
            train,
        ),
    ),
    Row(
        "accel_integrations.timm_adapter needs the package '{}', which is not installed.",
        without("timm.utils.agc", AdaptiveGradientClippingCallback),
        (lambda: train(AdaptiveGradientClippingCallback()),),
    ),
    Row(
        " without a pretrained_cfg, so its images are not known.",
        lambda: create_timm_transforms(nn.Sequential(create_timm_model(NAME, 10, pretrained=False))),
        (lambda: reads_images(create_timm_model(NAME, 10, pretrained=False), (3, 160, 160)),),
    ),
    Row(
        "name is {}, but timm has no such model.",
        lambda: create_timm_model("test_resnt", 10, pretrained=False),
        (lambda: trains_on_images(create_timm_model("test_resnet", 10, pretrained=False)),),
    ),
    Row(
        "but does not fit the model: {} Create the model with in_chans or img_size.",
        lambda: create_timm_transforms(vit("test_vit3"), (3, 96, 96)),
        (lambda: reads_images(vit("test_vit3", img_size=96), (3, 96, 96)),),
    ),
    Row(
        "but does not fit the model: {} Create the model with in_chans or img_size.",
        lambda: create_timm_transforms(vit(), (1, 160, 160)),
        (lambda: reads_images(vit(in_chans=1), (1, 160, 160)),),
    ),
    Row(
        "name is {}, but must be the name of a model of timm: {} ",
        lambda: create_timm_model("test_resnet.nothing", 10, pretrained=False),
        (lambda: trains_on_images(create_timm_model("test_resnet.r160_in1k", 10, pretrained=False)),),
    ),
    Row(
        "name is {}, but must be the name of a model of timm: {} ",
        lambda: create_timm_model(18, 10, pretrained=False),  # type: ignore[arg-type]
        (
            lambda: trains_on_images(
                create_timm_model(timm.list_models("test_res*")[0], 10, pretrained=False)
            ),
        ),
    ),
    Row(
        "name is {}, which is no optimizer of timm.",
        lambda: by_timm("adamv"),
        (lambda: by_timm("adamw"),),
    ),
    Row(
        "name is {}, which is no optimizer of timm.",
        lambda: by_timm("?"),
        (lambda: by_timm(timm.optim.list_optimizers()[0]),),
    ),
    Row(
        "pretrained is True, but there are no weights for {}. Pass pretrained=False",
        lambda: from_weights(hf_hub_id=None, url=""),
        (
            lambda: trains_on_images(create_timm_model(NAME, 10, pretrained=False)),
            lambda: trains_on_images(from_weights(file=weights())),
        ),
    ),
    Row(
        # That a call with a network fills the cache is tested in test_models.py, with a hub of its own.
        "pretrained is True, but the weights of {} are not on this machine",
        create_without_network,
        (
            lambda: create_without_network(pretrained=False),
            lambda: create_without_network(pretrained_cfg_overlay={"file": weights()}),
        ),
    ),
    Row(
        "pretrained_cfg_overlay has the file '{}', which is not there.",
        lambda: from_weights(file="nowhere.safetensors"),
        (lambda: from_weights(file=weights()),),
    ),
    Row(
        "but must be a scheduler of timm. Pass a class such as timm.scheduler.CosineLRScheduler",
        lambda: timm_scheduler_fn(StepLR, step_size=1),
        (
            lambda: scheduled(timm_scheduler_fn(CosineLRScheduler, t_initial=4)),
            lambda: scheduled(functools.partial(StepLR, step_size=1)),
        ),
    ),
    Row(
        ", which timm's factory does not take.",
        lambda: timm_scheduler_fn("cosine", warmup_epoch=1),
        (lambda: scheduled(timm_scheduler_fn("cosine", warmup_epochs=1)),),
    ),
    Row(
        "for which timm's factory has no scheduler. Pass a name such as 'cosine', 'step' or 'poly'",
        lambda: timm_scheduler_fn("kosine"),
        (
            *(lambda name=name: scheduled(timm_scheduler_fn(name)) for name in ("cosine", "step", "poly")),
            lambda: scheduled(timm_scheduler_fn(StepLRScheduler, decay_t=1)),
            lambda: scheduled(None),
        ),
    ),
    Row(
        "{} cannot be built from {}: {}. It takes {}.",
        lambda: timm_scheduler_fn(StepLRScheduler, decay_every=1),
        (lambda: scheduled(timm_scheduler_fn(StepLRScheduler, decay_t=1)),),
    ),
    Row(
        "{} could not be built from {}{}. Give timm_scheduler_fn other arguments.",
        lambda: scheduled(timm_scheduler_fn(CosineLRScheduler, t_initial=0)),
        (lambda: scheduled(timm_scheduler_fn(CosineLRScheduler, t_initial=4)),),
    ),
    Row(
        "it is the state of a {}, not of a {}.",
        lambda: load_of_another_timm_class(StepLRScheduler, decay_t=1),
        (lambda: load_of_another_timm_class(CosineLRScheduler, t_initial=3),),
    ),
    Row(
        "The targets of the batch have the shape {}, but must be {}.",
        lambda: train_images(rows()),
        (lambda: train_images(rows(), binary_targets=True), lambda: train_images(indices())),
    ),
    Row(
        "The targets of the batch have the shape {}, but must be {}.",
        lambda: train_images(rows(), binary_targets=True, num_classes=4),
        (lambda: train_images(rows(), binary_targets=True, num_classes=3),),
    ),
    Row(
        "num_classes is {}, but the model was created for {}. Give both the same number.",
        lambda: classes_of(3),
        (lambda: classes_of(10),),
    ),
    Row(
        "{} is {}, but must be a number {}. {}",
        lambda: train_images(indices(), mixup_alpha=-1),
        tuple(functools.partial(train_images, indices(), mixup_alpha=alpha) for alpha in (0, 0.8)),
    ),
    Row(
        "{} is {}, but must be a number {}. {}",
        lambda: train_images(indices(), cutmix_alpha=-1),
        tuple(functools.partial(train_images, indices(), cutmix_alpha=alpha) for alpha in (0, 1)),
    ),
    Row(
        "{} is {}, but must be a number {}. {}",
        lambda: train_images(indices(), mixup_alpha=1, mixup_probability=2),
        (lambda: train_images(indices(), mixup_alpha=1, mixup_probability=1),),
    ),
    Row(
        "{} is {}, but must be a number {}. {}",
        lambda: train_images(indices(), mixup_alpha=1, mixup_switch_probability=2),
        (lambda: train_images(indices(), mixup_alpha=1, cutmix_alpha=1, mixup_switch_probability=0.5),),
    ),
    Row(
        "{} is {}, but must be a number {}. {}",
        lambda: train_images(indices(), label_smoothing=1),
        tuple(functools.partial(train_images, indices(), label_smoothing=part) for part in (0.1, 0)),
    ),
    Row(
        "but loss_func is your own and nothing is mixed, so it would have no effect.",
        lambda: own_loss(label_smoothing=0.1),
        (
            lambda: train_images(
                indices(), loss_func=functools.partial(nn.functional.cross_entropy, label_smoothing=0.1)
            ),
            lambda: train_images(indices(), label_smoothing=0.1),
        ),
    ),
    Row(
        "but belongs to the loss of binary_targets=True. Pass that without a loss_func",
        lambda: own_loss(binary_target_threshold=0.2),
        (
            lambda: train_images(rows(), binary_targets=True, binary_target_threshold=0.2),
            own_loss,
        ),
    ),
    Row(
        "only this model has {}, only the state has {}.",
        lambda: load_adapters("query", "value"),
        (lambda: load_adapters("query"), lambda: load_adapters("query", "value", partly=True)),
    ),
    Row(
        ", but TransformersTrainer needs mappings from the names of the model's inputs to values",
        lambda: fine_tune(pairs(), collate_fn=None),
        (
            lambda: fine_tune(create_samples("classes")[:4], collate_fn=None, tokenizer=tokenizer()),
            lambda: fine_tune(pairs(), collate_fn=mappings_of),
        ),
    ),
    Row(
        " without a padding token, so it cannot pad. Set tokenizer.pad_token = tokenizer.eos_token",
        fine_tune_without_padding_token,
        (
            lambda: fine_tune_without_padding_token(pad_token="eos_token"),
            lambda: fine_tune_without_padding_token(collate_fn=collate),
        ),
    ),
    Row(
        " samples could not be put into one batch: {} If they differ in length, pass tokenizer",
        lambda: fine_tune(create_samples("classes"), collate_fn=None),
        (
            lambda: fine_tune(create_samples("classes"), collate_fn=None, tokenizer=tokenizer()),
            lambda: fine_tune(create_samples("classes")),
        ),
    ),
    Row(
        "accel_integrations.transformers_adapter needs the package 'transformers', which is not installed.",
        without("transformers", lambda: transformers_scheduler_fn("linear")),
        (lambda: scheduled(transformers_scheduler_fn("linear")),),
    ),
    Row(
        "' is in the way: it holds something else than a saved model, so it is not replaced.",
        lambda: save_pretrained(taken()),
        (lambda: save_pretrained("new"), lambda: (Path("empty").mkdir(), save_pretrained("empty"))),
    ),
    Row(
        "' could not be written: {} What was there is untouched. Choose another folder",
        lambda: save_pretrained(below_a_file()),
        (lambda: save_pretrained("other"), lambda: (Path("file").unlink(), save_pretrained("file/model"))),
    ),
    Row(
        "name is {}, which is no schedule of transformers.",
        lambda: transformers_scheduler_fn("linar"),
        (lambda: scheduled(transformers_scheduler_fn("linear")),),
    ),
    Row(
        "The model returned no loss for a batch with the entries {}.",
        fine_tune_without_labels,
        (lambda: fine_tune(create_samples("classes")),),
    ),
    Row(
        "The model returned no loss for a batch with the entries {}.",
        lambda: fine_tune(create_samples("classes"), Bare()),
        (lambda: fine_tune(create_samples("classes"), Bare(), loss_func=cross_entropy),),
    ),
    Row(
        ", but TransformersTrainer needs a mapping from the names of the model's inputs to tensors.",
        lambda: fine_tune(create_samples("classes"), collate_fn=as_pairs),
        (
            lambda: fine_tune(create_samples("classes"), collate_fn=collate),
            lambda: fine_tune(create_samples("classes"), kind=OfPairs, collate_fn=as_pairs),
        ),
    ),
    Row(
        " has no save_pretrained. Use save_checkpoint instead.",
        save_bare,
        (save_bare_export,),
    ),
    Row(
        "base_name is {}, but {}. Leave it out, or give the base of your adapters a name",
        lambda: save_pretrained("model", base_name="organisation/model"),
        (lambda: save_pretrained("model"),),
    ),
    Row(
        "base_name is {}, but {}. Leave it out, or give the base of your adapters a name",
        lambda: save_pretrained("model", adapted("query"), base_name=""),
        (lambda: save_pretrained("model", adapted("query"), base_name="organisation/model"),),
    ),
    Row(
        "loss_func needs 'labels', but the batch has only {}. Add them to the samples.",
        lambda: fine_tune_without_labels(loss_func=cross_entropy),
        (lambda: fine_tune(create_samples("classes"), loss_func=cross_entropy),),
    ),
)
FACTS = {"AdaptiveGradientClippingCallback needs whole parameters": "made with FSDP2 in test_engines.py"}

CHECKS: tuple[Row, ...] = (
    Row(
        "Use the per_device_batch_size.",
        lambda: LengthGroupedSampler([1, 2], 0),
        (lambda: in_groups_of_length([1] * 16, 4),),
    ),
    Row(
        "Give the number of updates in an epoch, or use create_scheduler_fn, which asks the trainer.",
        lambda: CosineLrScheduler(optimizer_of_rates(0.1), 2, 0),
        (
            lambda: scheduled(
                functools.partial(CosineLrScheduler, total_num_epochs=2, num_update_steps_per_epoch=4)
            ),
            cosine,
        ),
    ),
    Row(
        "Shorten them (fractions such as num_warmup_epochs=0.5 are allowed), or train for longer.",
        lambda: cosine(num_warmup_epochs=2),
        (
            lambda: cosine(num_warmup_epochs=0.5),
            lambda: train(
                num_epochs=3, create_scheduler_fn=CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=2)
            ),
        ),
    ),
    Row(
        "Pass a smaller {}, or {}.",
        lambda: cosine(lr_min=1.0),
        (lambda: cosine(lr_min=0.01), lambda: cosine(lr_min=1.0, min_lr_ratio=0.1)),
    ),
    Row(
        "Leave it at 1 for the plain cosine.",
        lambda: cosine(k_decay=-1),
        (lambda: cosine(k_decay=1),),
    ),
    Row(
        "Fractions such as 0.5 are allowed.",
        lambda: cosine(num_cooldown_epochs=-1),
        (lambda: cosine(num_cooldown_epochs=0.5),),
    ),
    Row(
        "It is a fraction of each group's base rate.",
        lambda: cosine(min_lr_ratio=2),
        (lambda: cosine(min_lr_ratio=0.1),),
    ),
    Row(
        "It is the part of each period that is decay.",
        lambda: wsd(decay_phase_ratio=2),
        (lambda: through(decay_phase_ratio=0.1),),
    ),
    Row(
        "Warm up for fewer updates (fractions of an epoch such as 0.5 are allowed), or train for longer.",
        lambda: wsd(num_warmup_steps=95),
        (
            lambda: through(num_warmup_steps=90),
            lambda: through(num_warmup_steps=95, total_steps=200),
            lambda: scheduled(WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5)),
        ),
    ),
    Row(
        "Pass a small number such as 1e-6, or use_inverse_sqrt_decay=True.",
        lambda: wsd(lr_min=0, use_inverse_sqrt_decay=False),
        (
            lambda: through(lr_min=1e-6, use_inverse_sqrt_decay=False),
            lambda: through(lr_min=0, use_inverse_sqrt_decay=True),
        ),
    ),
    Row(
        "Pass a smaller warmup_starting_lr, or num_warmup_steps=0.",
        lambda: wsd(num_warmup_steps=5, warmup_starting_lr=1.0),
        (
            lambda: through(num_warmup_steps=5, warmup_starting_lr=0.01),
            lambda: through(num_warmup_steps=0, warmup_starting_lr=1.0),
        ),
    ),
    Row(
        "Pass the name of a folder.",
        lambda: save_pretrained(3),  # type: ignore[arg-type]
        (lambda: save_pretrained("model"), lambda: by_wsd("states")),
    ),
    Row(
        "Pass an exported file, or None.",
        lambda: WSDCheckpointCallback(initial_checkpoint=3),  # type: ignore[arg-type]
        (
            lambda: by_wsd("states", initial_checkpoint=export(None)),
            lambda: by_wsd("others", initial_checkpoint=None),
        ),
    ),
    Row(
        "1 decays at the end only.",
        lambda: estimate_checkpoint_steps(100, 0),
        (lambda: estimate_checkpoint_steps(100, 1),),
    ),
    Row(
        "Train for longer, or ask for fewer checkpoints.",
        lambda: estimate_checkpoint_steps(3, 3),
        (lambda: estimate_checkpoint_steps(4, 3), lambda: estimate_checkpoint_steps(3, 2)),
    ),
    Row(
        "For 1000 more updates, pass total_steps={}; with the trainer, raise num_epochs.",
        lambda: continue_to(5),
        (lambda: continue_to(1010), lambda: continue_with_trainer(num_epochs=3)),
    ),
    Row(
        "The paper uses 0.01; larger values clip less.",
        lambda: AdaptiveGradientClippingCallback(0),
        (lambda: train(AdaptiveGradientClippingCallback(0.01)),),
    ),
    Row(
        "The paper uses 1e-3.",
        lambda: AdaptiveGradientClippingCallback(eps=0),
        (lambda: train(AdaptiveGradientClippingCallback(eps=1e-3)),),
    ),
    Row(
        "timm.create_model makes models without a classifier.",
        lambda: create_timm_model(NAME, 0),
        (lambda: timm.create_model(NAME, num_classes=0),),
    ),
    Row(
        "Use 1e-3 to begin with AdamW, 0.1 with SGD.",
        lambda: by_timm(lr=0),
        (lambda: by_timm("adamw", lr=1e-3), lambda: by_timm("sgd", lr=0.1)),
    ),
    Row(
        "Use 0.05, or 0.0 for none.",
        lambda: groups(weight_decay=-1),
        (lambda: groups(weight_decay=0.05), lambda: groups(weight_decay=0.0)),
    ),
    Row(
        "Use None for one rate for all layers, 0.75 to change early layers less.",
        lambda: groups(layer_decay=0),
        (lambda: groups(layer_decay=None), lambda: groups(vit(), images(160), layer_decay=0.75)),
    ),
    Row(
        "Pass the number of classes of the targets.",
        lambda: train_images(indices(), num_classes=None),
        (lambda: train_images(indices(), num_classes=3),),
    ),
    Row(
        "Pass a function such as torch.nn.functional.cross_entropy.",
        lambda: train_images(indices(), eval_loss_func="cross entropy"),
        (lambda: train_images(indices(), eval_loss_func=nn.functional.cross_entropy),),
    ),
    Row(
        "Use 0.2, or None for soft targets.",
        lambda: train_images(rows(), binary_targets=True, binary_target_threshold=2),
        tuple(
            functools.partial(train_images, rows(), binary_targets=True, binary_target_threshold=threshold)
            for threshold in (0.2, None)
        ),
    ),
    Row(
        "Use 5e-5, for example.",
        lambda: parameter_groups(lr=0),
        (lambda: parameter_groups(lr=5e-5),),
    ),
    Row(
        "Use 0.01, or 0.0 for none.",
        lambda: parameter_groups(weight_decay=-1),
        tuple(functools.partial(parameter_groups, weight_decay=decay) for decay in (0.01, 0.0)),
    ),
    Row(
        "Use None for the same rate everywhere.",
        lambda: parameter_groups(layer_decay=0),
        (lambda: parameter_groups(layer_decay=None),),
    ),
    Row(
        "Use 0.1 for a tenth of the run.",
        lambda: transformers_scheduler_fn("linear", num_warmup_steps=-1),
        (lambda: scheduled(transformers_scheduler_fn("linear", num_warmup_steps=0.1)),),
    ),
    Row(
        "Leave it out to take all updates of the run.",
        lambda: transformers_scheduler_fn("linear", num_training_steps=0),
        (lambda: scheduled(transformers_scheduler_fn("linear")),),
    ),
)


def test_every_error_of_an_integration_has_a_row() -> None:
    rows = [row.text for row in ROWS]
    check_every_error_is_known("accel-integrations", rows=rows, facts=FACTS)
    check_every_way_out_is_known("accel-integrations", rows=(row.text for row in CHECKS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("row", [*ROWS, *CHECKS], ids=name_of)
def test_what_an_error_of_an_integration_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)
