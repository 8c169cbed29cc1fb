"""Each way out that an error of an engine names works, on each layout: the mistake is made, then what the message says.

The file is its own script, once for each layout: processes, folder of results, layout, folder of states.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

from accel_core import AccelError, CheckpointError, Trainer, TrainerCallback
from accel_core.engines.choose import REFUSED, choose_engine
from accel_core.errors import NotFiniteError
from accel_core.processes.group import DataGroup
from case_runner import Outcome, compare, run_as_script
from layouts import fsdp2, tensor_parallel
from replaying import Numbered, numbered_trainer, saving
from sharding import create_accelerator, environment_of
from states import edit
from tiny import SaveAt, Stream
from ways_out import (
    NOTHING,
    Row,
    check_every_error_is_known,
    check_told,
    make_mistake_and_ways_out,
    name_of,
    told,
)

PLACES = ("accel-core/src/accel_core/engines", "accel-core/src/accel_core/processes")
NUM_CLASSES = 3


def make_data(size: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(
        torch.randn(size, 5, generator=generator), torch.randint(0, NUM_CLASSES, (size,), generator=generator)
    )


def make_model(middle: int = 8) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, middle), nn.Tanh(), nn.Linear(middle, NUM_CLASSES))


def make_trainer(
    kind: Any = Trainer,
    model: Any = None,
    optimizer_class: Any = torch.optim.SGD,
    callbacks: Any = (),
    beside: Any = None,
    **kwargs: Any,
) -> Trainer:
    """A trainer, perhaps with a loss that its optimizer trains too."""
    model = make_model() if model is None else model
    held = [*model.parameters(), *([] if beside is None else beside.parameters())]
    loss_func = nn.CrossEntropyLoss() if beside is None else beside
    return kind(model, loss_func, optimizer_class(held, lr=0.05), callbacks, seed=7, **kwargs)


def train(trainer: Any = None, data: Any = None, **kwargs: Any) -> Trainer:
    trainer = make_trainer() if trainer is None else trainer
    data = make_data() if data is None else data
    trainer.train(data, **{"num_epochs": 1, "per_device_batch_size": 4, **kwargs})
    assert trainer.run_progress.updates_completed > 0
    return trainer


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self, size: int = NUM_CLASSES) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs * self.scale[:NUM_CLASSES], targets)


class WithLoss(nn.Module):
    """The loss's parameter is a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.loss = make_model(), Scaled()

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs) * self.loss.scale


class OfTwo(Trainer):
    """Trains a second model inside each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.second = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        self.second_optimizer: Any = torch.optim.SGD(self.second.parameters(), lr=0.1)

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        self.accelerator.backward(self.second(output["model_outputs"].detach()).square().mean())
        self.step_second()
        return output

    def step_second(self) -> None:
        self.step_optimizer(self.second_optimizer)


class StepsOwn(OfTwo):
    def step_second(self) -> None:
        self.step_optimizer(self.optimizer)


class StepsUnknown(OfTwo):
    def step_second(self) -> None:
        self.step_optimizer(torch.optim.SGD(self.second.parameters(), lr=0.1))


class StepsWrapped(OfTwo):
    def step_second(self) -> None:
        self.step_optimizer(self.wrapped[0])

    def prepare(self) -> None:
        super().prepare()
        second, self.second_optimizer = self.second_optimizer, None
        self.wrapped = [self.accelerator.prepare(second)]


class StepsWrappedItself(StepsWrapped):
    def step_second(self) -> None:
        self.wrapped[0].step()


class StepsBare(OfTwo):
    def step_second(self) -> None:
        self.second_optimizer.step()
        self.second_optimizer.zero_grad()


class SecondOrder(torch.optim.SGD):
    is_second_order = True


class Poisons(TrainerCallback):
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == 3:
            with torch.no_grad():
                next(trainer.get_model().parameters()).fill_(torch.nan)


def with_scaler() -> Any:
    """With a float16 scaler, which Accelerate gives to GPUs only."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return accelerator


def in_bfloat16() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=True)


LAYOUT = sys.argv[3] if len(sys.argv) > 4 else "alone"
NUMBERS = itertools.count()
STATES = Path(sys.argv[4]) if len(sys.argv) > 4 else Path()
"""The folder that all launches share, in the script."""


def new_folder() -> Path:
    """The same on all processes, which count alike."""
    return STATES / f"{LAYOUT} {next(NUMBERS)}"


def saved(name: str = "", **kwargs: Any) -> Path:
    """The state after the second update."""
    folder = STATES / name if name else new_folder()
    train(make_trainer(callbacks=[SaveAt(2, folder)], **kwargs))
    return folder


def resume(
    folder: Path, trusts: bool = False, partly: bool = False, trainer: Any = None, **kwargs: Any
) -> Trainer:
    trainer = make_trainer(**kwargs) if trainer is None else trainer
    trainer.trust_engine_files, trainer.load_partial_states = trusts, partly
    return train(trainer, resume_from=folder)


def exported(name: str) -> Path:
    train().save_checkpoint(STATES / name)
    return STATES / name


def from_export(path: Path) -> Trainer:
    trainer = make_trainer()
    trainer.load_checkpoint(path, load_optimizer=False)
    return train(trainer)


def saved_poisoned(folder: Path | None = None) -> Trainer:
    folder = new_folder() if folder is None else folder
    savers = [Poisons(), *(SaveAt(update, folder / str(update)) for update in (2, 3))]
    return train(make_trainer(callbacks=savers))


def after_poison(lr: float = 0.05, **kwargs: Any) -> Trainer:
    folder = new_folder()
    with pytest.raises(NotFiniteError):
        saved_poisoned(folder)
    trainer = make_trainer()
    trainer.optimizer.param_groups[0]["lr"] = lr
    return train(trainer, resume_from=folder / "2", **kwargs)


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs)


def of_kind(kind: Any, num_processes: int = 4, more: int = 1, is_fsdp2: bool = True, **sizes: int) -> Any:
    """What an accelerator of machines says that no test has."""
    config = SimpleNamespace(non_data_parallel_size=max(more, sizes.get("tp_size", 1)), **sizes)
    return SimpleNamespace(
        gradient_accumulation_steps=1,
        distributed_type=kind,
        state=SimpleNamespace(parallelism_config=config),
        is_fsdp2=kind is DistributedType.FSDP and is_fsdp2,
        num_processes=num_processes,
        process_index=0,
        scaler=None,
    )


def choose(kind: Any, asks_for: str = "", **kwargs: Any) -> Any:
    """Choose an engine, perhaps with a plugin that Accelerate has dropped."""
    with pytest.MonkeyPatch.context() as patch:
        if asks_for:
            patch.setenv(f"ACCELERATE_USE_{asks_for}", "true")
        return choose_engine(of_kind(kind, **kwargs), DataGroup(4))


def launched_as_two() -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        return train()


ALONE: tuple[Row, ...] = (
    Row(
        "which accel does not know. Use one process, DDP",
        lambda: choose(SimpleNamespace(value="ANOTHER")),
        (
            lambda: choose(DistributedType.NO),
            lambda: choose(DistributedType.MULTI_GPU),
            lambda: choose(DistributedType.FSDP),
            lambda: choose(DistributedType.DEEPSPEED),
        ),
    ),
    Row(
        "but must have 1, since the trainer accumulates itself. Pass gradient_accumulation_steps={} to train instead.",
        lambda: train(make_trainer(accelerator=Accelerator(gradient_accumulation_steps=2))),
        (lambda: train(gradient_accumulation_steps=2),),
    ),
    Row(
        "step_optimizer was called with trainer.optimizer, which each update steps itself. Pass a further one.",
        lambda: train(make_trainer(StepsOwn)),
        (lambda: train(make_trainer(OfTwo)),),
    ),
    Row(
        " that is no attribute of the trainer, which has {}. Make it one, so that it is saved and restored; one that",
        lambda: train(make_trainer(StepsUnknown)),
        (lambda: train(make_trainer(OfTwo)),),
    ),
    Row(
        "accelerator.prepare has wrapped is stepped by its own step().",
        lambda: train(make_trainer(StepsWrapped)),
        (lambda: train(make_trainer(StepsWrappedItself)),),
    ),
    Row(
        " holds the state of another model than {}: no name fits. It has {}, and the model {}. Load a state of this model.",
        lambda: resume(saved(), partly=True, model=OtherNames()),
        (lambda: resume(saved(model=OtherNames()), partly=True, model=OtherNames()),),
        CheckpointError,
    ),
    Row(
        " holds the state of another model than {}: {}{}",
        lambda: resume(saved(), model=make_model(9)),
        (lambda: resume(saved(), model=make_model(9), partly=True),),
        CheckpointError,
        says=" To load what fits, set trainer.load_partial_states = True.",
    ),
    Row(
        " does not fit the {} of this run: {}: {} Build it as in the run that was saved.",
        lambda: resume(saved(), optimizer_class=torch.optim.Adam),
        (lambda: resume(saved()),),
        CheckpointError,
    ),
    Row(
        " is not finite, so the state was not saved and the checkpoints before it stay. Go on from the newest of them",
        saved_poisoned,
        (lambda: after_poison(lr=0.001), lambda: after_poison(gradient_clip_norm=0.1)),
        AccelError,
    ),
    Row(
        " uses second derivatives, which mixed_precision='fp16' would scale. Use 'bf16' or 'no'.",
        lambda: train(make_trainer(optimizer_class=SecondOrder, accelerator=with_scaler())),
        (
            lambda: train(make_trainer(optimizer_class=SecondOrder, accelerator=in_bfloat16())),
            lambda: train(make_trainer(optimizer_class=SecondOrder)),
        ),
    ),
    Row(
        "accelerate launch started {} processes, but this Accelerator does not see the others, so each would train",
        launched_as_two,
        # Each launch of these tests does what it says.
        (),
        says="set ACCELERATE_USE_CPU=true and launch with --multi_gpu",
    ),
)

GPUS, SHARDED, DEEP = DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED
BY_DDP, BY_FSDP2, BY_DEEPSPEED = (partial(choose, kind) for kind in (GPUS, SHARDED, DEEP))
BY_TENSORS = partial(choose, GPUS, tp_size=4)

REFUSED_LAYOUTS: tuple[Row, ...] = (
    Row("XLA", lambda: choose(DistributedType.XLA), (BY_DDP, partial(choose, DistributedType.MULTI_CPU))),
    Row("Megatron-LM", lambda: choose(DistributedType.MEGATRON_LM), (BY_FSDP2, BY_DEEPSPEED, BY_TENSORS)),
    Row("version 1 of FSDP", lambda: choose(SHARDED, is_fsdp2=False), (BY_FSDP2,)),
    Row("context parallelism", lambda: choose(SHARDED, cp_size=2), (BY_FSDP2,)),
    Row("sequence parallelism", lambda: choose(DEEP, sp_size=2), (BY_FSDP2, BY_DEEPSPEED)),
    Row("tensor parallelism with FSDP2", lambda: choose(SHARDED, tp_size=2), (BY_TENSORS, BY_FSDP2)),
    Row(
        "tensor parallelism with several copies of the model",
        lambda: choose(GPUS, tp_size=2, dp_replicate_size=2),
        (BY_TENSORS, BY_FSDP2, partial(choose, GPUS, dp_replicate_size=4)),
    ),
    Row("in a way that accel does not know", lambda: choose(GPUS, more=2), (BY_TENSORS, BY_FSDP2, BY_DDP)),
    Row(
        ", which does not shard. Pass fsdp_plugin=",
        lambda: choose(GPUS, dp_shard_size=4),
        (partial(choose, SHARDED, dp_shard_size=4), BY_DDP),
    ),
    Row(
        "given DeepSpeed, but Accelerate has dropped it",
        lambda: choose(DistributedType.MULTI_CPU, "DEEPSPEED"),
        (partial(choose, DEEP, "DEEPSPEED"), partial(choose, DistributedType.MULTI_CPU)),
    ),
    Row(
        "given FSDP, but Accelerate has dropped it",
        lambda: choose(DistributedType.MULTI_CPU, "FSDP"),
        (partial(choose, SHARDED, "FSDP"), partial(choose, DistributedType.MULTI_CPU)),
    ),
)
"""A piece of each message of `REFUSED`, and layouts that it leads to."""

# ---------------------------------------------------------------------- DDP


class SetsRates(TrainerCallback):
    """Each process has a learning rate of its own, or all have one."""

    def __init__(self, differ: bool) -> None:
        self.differ = differ

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 0.1 * (1 + self.differ * trainer.accelerator.process_index)


class PassesBy(Trainer):
    """Computes with the bare model, whose gradients nothing averages."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs = self.get_model()(batch[0])
        return {
            "loss": self.loss_func(outputs, batch[1]),
            "model_outputs": outputs,
            "batch_size": len(outputs),
        }


def drift(kind: Any = Trainer, differ: bool = False) -> Trainer:
    """Parameters are compared when a state is saved."""
    return train(make_trainer(kind, callbacks=[SetsRates(differ), SaveAt(2, new_folder())]))


def sharded_by_hand() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


DDP: tuple[Row, ...] = (
    Row(
        "The processes have different values of the parameter {}: by {} of its norm",
        lambda: drift(differ=True),
        (drift,),
        says="Do the same on all processes",
    ),
    Row(
        "The processes have different values of the parameter {}: by {} of its norm",
        lambda: drift(PassesBy),
        (drift,),
        says="let the step call self.model.",
    ),
    Row(
        " is a DTensor: you have sharded the model yourself, as by fully_shard or parallelize_module, but the",
        lambda: train(make_trainer(model=sharded_by_hand())),
        (train,),
    ),
    Row(
        " uses second derivatives, which no engine averages over {} processes: each would train a model of its own.",
        lambda: train(make_trainer(optimizer_class=SecondOrder)),
        (train,),
    ),
    Row(
        ".step() was called with a float16 scaler on several processes, of which each would step or skip by itself.",
        lambda: train(make_trainer(StepsBare, accelerator=with_scaler())),
        (lambda: train(make_trainer(OfTwo, accelerator=with_scaler())),),
    ),
)

# ---------------------------------------------------------------------- FSDP2


def holding(**attributes: Any) -> Trainer:
    trainer = make_trainer()
    for name, value in attributes.items():
        setattr(trainer, name, value(trainer.model))
    return trainer


class ReadsBias(Trainer):
    """Reads the parameter from the model in each step."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        bias = self.model[2].bias
        return {**output, "loss": output["loss"] + 0.0 * output["model_outputs"].sum() * len(bias)}


def grouped(foreach: bool | None, separately: bool = False) -> Trainer:
    trainer = make_trainer(beside=Scaled())
    model, beside = [list(each.parameters()) for each in (trainer.model, trainer.loss_func)]
    groups = [{"params": model}, {"params": beside}] if separately else [{"params": [*model, *beside]}]
    trainer.optimizer = torch.optim.SGD(groups, lr=0.1, foreach=foreach)
    return trainer


def with_group_of_its_own() -> Trainer:
    trainer = make_trainer()
    first, last = (list(trainer.model[place].parameters()) for place in (0, 2))
    trainer.optimizer = torch.optim.SGD([{"params": first}, {"params": last, "lr": 0.01}], lr=0.1)
    return trainer


class Layer(nn.Linear):
    """Is repeated."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.last = nn.Linear(5, 5), Layer(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, inputs: Any) -> Any:
        return self.last(self.middle(self.first(inputs)))


def tied(policy: str = "size_based_wrap", **kwargs: Any) -> Trainer:
    state = Accelerator().state
    before = state.fsdp_plugin
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=policy,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        **({"min_num_params": 10} if policy == "size_based_wrap" else kwargs),
    )
    try:
        return train(make_trainer(model=Tied()))
    finally:
        state.fsdp_plugin = before


def replay_sharded() -> Any:
    """A run of FSDP2 is replayed on its own processes."""
    trainer = numbered_trainer([saving(STATES / "replayed", 3)], norm=False)
    given: dict[str, Any] = {"num_epochs": 2, "per_device_batch_size": 6}
    trainer.train(Numbered(), **given)
    return trainer.replay(Numbered(), update=5, folder=STATES / "replayed", **given)


FSDP2: tuple[Row, ...] = (
    Row(
        " holds a parameter of the model, which {} has exchanged for one in parts: what it holds would keep its first",
        lambda: train(holding(bias=lambda model: model[2].bias)),
        (lambda: train(make_trainer(ReadsBias)),),
    ),
    Row(
        " holds a parameter of the model, which {} has exchanged for one in parts: what it holds would keep its first",
        lambda: train(holding(second=lambda model: torch.optim.SGD(model[2].parameters(), lr=0.1))),
        (lambda: train(with_group_of_its_own()),),
        says="train it by trainer.optimizer alone (a group may have settings of its own)",
    ),
    Row(
        " is trained beside the model, and mixed_precision is 'fp16', but a scaler does not unscale it together with",
        lambda: train(make_trainer(beside=Scaled(), accelerator=with_scaler())),
        (
            lambda: train(make_trainer(beside=Scaled())),
            lambda: train(make_trainer(model=WithLoss(), accelerator=with_scaler())),
        ),
    ),
    Row(
        "=True and a group with DTensors beside plain tensors, which torch does not compute together. Leave",
        lambda: train(grouped(foreach=True)),
        (lambda: train(grouped(foreach=None)), lambda: train(grouped(foreach=True, separately=True))),
    ),
    Row(
        " are one tensor that several layers share, but the auto_wrap_policy 'size_based_wrap' shards each layer",
        tied,
        (
            lambda: tied("transformer_based_wrap", transformer_cls_names_to_wrap=["Layer"]),
            lambda: tied("no_wrap"),
        ),
    ),
    Row(
        " holds the state of another model than {}: {}. Build the model as in the run that was saved.",
        lambda: resume(saved(), model=make_model(9)),
        (lambda: resume(saved()),),
    ),
    Row(
        " does not fit the {} of this run: it holds {}, and this one {}. Build it as in the run that was saved.",
        lambda: resume(saved(), trainer=with_group_of_its_own()),
        (lambda: resume(saved()),),
    ),
    Row(
        "replay trains a copy of the model, but {} spreads the model over the processes, where it cannot be copied.",
        replay_sharded,
        (),
    ),
)

# ---------------------------------------------------------------------- tensor parallelism


def laid_out(mesh: Any = None) -> nn.Module:
    mesh = Accelerator().torch_device_mesh["tp"] if mesh is None else mesh
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(make_model(), mesh, plan)


def on_other_mesh() -> nn.Module:
    """One layer lies on a mesh of this process alone."""
    model = laid_out()
    alone = DeviceMesh("cpu", [Accelerator().process_index])
    model[0].bias = nn.Parameter(DTensor.from_local(torch.zeros(8), alone, [Shard(0)]))
    return model


def laid_out_late() -> Trainer:
    trainer = make_trainer()
    mesh = Accelerator().torch_device_mesh["tp"]
    parallelize_module(trainer.model, mesh, {"0": ColwiseParallel()})
    return trainer


def all_laid_out() -> Trainer:
    return train(make_trainer(model=laid_out()))


TENSOR_PARALLEL: tuple[Row, ...] = (
    Row(
        "but no parameter of {} is a DTensor: each process has the whole model. Lay it out before you make the",
        train,
        (all_laid_out,),
    ),
    Row(
        "tp_size={}. Use the mesh accelerator.torch_device_mesh['tp'] for all of the model.",
        lambda: train(make_trainer(model=on_other_mesh())),
        (all_laid_out,),
    ),
    Row(
        " holds none of the DTensors of {}, whose parameters were exchanged when it was laid out. Make the optimizer",
        lambda: train(laid_out_late()),
        (all_laid_out,),
    ),
    Row(
        "but a scaler would look at the gradients of each process by itself. Use mixed_precision='bf16' or 'no'.",
        lambda: train(make_trainer(model=laid_out(), accelerator=with_scaler())),
        (all_laid_out,),
    ),
)

# ---------------------------------------------------------------------- DeepSpeed


class OwnStep(Trainer):
    def optimizer_step(self) -> None:
        super().optimizer_step()


class Counts(Trainer):
    def count_items(self, batch: Any) -> int:
        return len(batch[0])


class CountsLate(Trainer):
    """The mean over the even targets alone, of which each batch has another number."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        outputs, targets = self.model(batch[0]), torch.where(batch[1] == 1, -100, batch[1])
        loss = nn.functional.cross_entropy(outputs, targets, reduction="sum") / (targets >= 0).sum().clip(1)
        count = (targets >= 0).sum()
        return {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(outputs),
            "num_items_in_batch": count,
        }


class CountsAhead(CountsLate):
    def count_items(self, batch: Any) -> int:
        return int((batch[1] != 1).sum())


def unknown_loss(kind: Any) -> Trainer:
    """A loss of which accel does not know that it is a mean over targets."""
    trainer = make_trainer(kind)
    trainer.loss_func = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets) + 0.0
    return trainer


def clipped(configured: Any, **kwargs: Any) -> Trainer:
    accelerator = Accelerator()
    config = accelerator.deepspeed_plugin.deepspeed_config
    before = config.get("gradient_clipping", "auto")
    config["gradient_clipping"] = configured
    try:
        return train(make_trainer(accelerator=accelerator), **kwargs)
    finally:
        config["gradient_clipping"] = before


def of_another_number() -> Path:
    folder = saved()
    if Accelerator().is_main_process:
        edit(folder, "launched", "num_processes", value=1)
    torch.distributed.barrier()
    return folder


DEEPSPEED: tuple[Row, ...] = (
    Row(
        " clips by norm only. Pass gradient_clip_norm instead.",
        lambda: train(gradient_clip_value=0.1),
        (lambda: train(gradient_clip_norm=0.1),),
    ),
    Row(
        " are overridden, but {} does that inside backward. Remove them, or use DDP or FSDP",
        lambda: train(make_trainer(OwnStep)),
        (train,),
    ),
    Row(
        "The data has no length, so it is not known what a batch weighs in its update, and {} changes the parameters",
        lambda: train(unknown_loss(Trainer), Stream(make_data())),
        (lambda: train(unknown_loss(Counts), Stream(make_data())),),
    ),
    Row(
        "The items of an update differ from the plan, but {} has changed the parameters inside backward already.",
        lambda: train(make_trainer(CountsLate)),
        (lambda: train(make_trainer(CountsAhead)),),
    ),
    Row(
        "but the configuration of DeepSpeed has gradient_clipping={}. Leave one of them out.",
        lambda: clipped(0.5, gradient_clip_norm=1.0),
        (lambda: clipped(0.5), lambda: clipped("auto", gradient_clip_norm=1.0)),
    ),
    Row(
        " has parameters that the optimizer holds, but is no part of the model, and {} trains what is in the model only.",
        lambda: train(make_trainer(beside=Scaled())),
        (lambda: train(make_trainer(model=WithLoss())),),
    ),
    Row(
        " is a further optimizer, but {} trains by one. Use DDP or FSDP2.",
        lambda: train(make_trainer(OfTwo)),
        (),
    ),
    Row(
        " has sharded files, which {} unpickles: code in them would run. If you trust them, set",
        lambda: resume(saved("pickled")),
        (lambda: resume(STATES / "pickled", trusts=True),),
    ),
    Row(
        " was saved without an engine that shards the model, and this run is with one ({}). Resume as it was saved, or",
        lambda: resume(STATES / "ddp"),
        (lambda: from_export(STATES / "ddp.safetensors"),),
    ),
    Row(
        " was saved by FSDP2, and this run is with {}. Resume with FSDP2, DDP or one process, or begin a new run from",
        lambda: resume(STATES / "fsdp2", trusts=True),
        (lambda: from_export(STATES / "fsdp2.safetensors"),),
    ),
    Row(
        " was saved by {}, and {} continues with that number only, not with {}. Start as many, or begin a",
        lambda: resume(of_another_number(), trusts=True),
        (
            lambda: resume(saved(), trusts=True),
            lambda: from_export(exported("deepspeed.safetensors")),
        ),
    ),
)

ROWS = {"ddp": DDP, "fsdp2": FSDP2, "tp": TENSOR_PARALLEL, "zero2": DEEPSPEED}

ON_OTHER_LAYOUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "ddp": {
        "a state and an export": lambda: [saved("ddp"), exported("ddp.safetensors")],
        "resumed as it was saved": lambda: resume(STATES / "ddp"),
        "steps of one's own": lambda: train(make_trainer(OwnStep)),
        "a parameter beside the model": lambda: train(make_trainer(beside=Scaled())),
        "a further optimizer": lambda: train(make_trainer(OfTwo)),
        "an attribute with a parameter": lambda: train(holding(bias=lambda model: model[2].bias)),
        "a state of FSDP2": lambda: resume(STATES / "fsdp2"),
    },
    "fsdp2": {
        "a state and an export": lambda: [saved("fsdp2"), exported("fsdp2.safetensors")],
        "steps of one's own": lambda: train(make_trainer(OwnStep)),
        "a parameter beside the model": lambda: train(make_trainer(beside=Scaled())),
        "a further optimizer": lambda: train(make_trainer(OfTwo)),
        "a state of FSDP2": lambda: resume(STATES / "fsdp2"),
        "a whole model, which FSDP2 shards": train,
    },
    "tp": {"a model that is laid out": all_laid_out},
    "zero2": {
        "a state and an export": lambda: [saved("zero2"), exported("zero2.safetensors")],
        "resumed as it was saved": lambda: resume(STATES / "zero2", trusts=True),
    },
}
"""Ways out of errors of one layout that lead to another one, and what the other launches need."""


def cases_of(layout: str) -> dict[str, Callable[[int], Any]]:
    def run(row: Row, batch_size: int) -> list[str]:
        return told(row.mistake, *row.ways_out)

    cases: dict[str, Callable[[int], Any]] = {
        name: partial(lambda act, batch_size: told(act), act)
        for name, act in ON_OTHER_LAYOUTS[layout].items()
    }
    return cases | {f"{place}: {row.text}": partial(run, row) for place, row in enumerate(ROWS[layout])}


ACCELERATORS: dict[str, Callable[[], Accelerator]] = {
    "ddp": Accelerator,
    "fsdp2": fsdp2,
    "tp": tensor_parallel,
    "zero2": partial(create_accelerator, "zero2"),
}
TYPES = {
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "tp": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
}


# ---------------------------------------------------------------------- the tests

NO_WAY_OUT = {
    "beside the model it holds parameters of the shapes {} in": "stands inside the sentence of another error",
    "it has no {}.": "stands inside the sentence of another error",
    "The engine was asked for further optimizers before it was told what is trained.": "no public call gets there",
    "The engine was asked for the prepared model before prepare.": "no public call gets there",
    " was saved with an engine that shards the model, and this run is without one": "below, with a state of DeepSpeed",
}


def test_every_error_of_an_engine_is_known() -> None:
    rows = [row.text for row in (*ALONE, *(row for rows in ROWS.values() for row in rows))]
    rows = [text for text in rows if not text.startswith("replay ")]
    check_every_error_is_known(*PLACES, rows=rows, facts=NO_WAY_OUT)


def test_every_layout_that_is_refused_is_known() -> None:
    known = [row.text for row in REFUSED_LAYOUTS]
    messages = [layout.message for layout in REFUSED]
    assert [message for message in messages if not any(text in message for text in known)] == []
    assert [text for text in known if not any(text in message for message in messages)] == []


@pytest.mark.parametrize("row", [*ALONE, *REFUSED_LAYOUTS], ids=name_of)
def test_what_an_error_of_an_engine_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


def launched(layout: str, states: Path, folder: Path) -> Outcome:
    env = environment_of(layout) if layout == "zero2" else {}
    # DeepSpeed compiles what it needs at its first start.
    return compare(cases_of(layout), __file__, 2, folder, timeout=280, args=[layout, states], env=env)


def assert_ways_out_work(layout: str, outcome: Outcome) -> None:
    for name in ON_OTHER_LAYOUTS[layout]:
        assert outcome.of(name) == [[NOTHING]] * 2, name
    for place, row in enumerate(ROWS[layout]):
        for said in outcome.of(f"{place}: {row.text}"):
            check_told(row.text, said, row.says)


@pytest.mark.slow
def test_what_an_error_on_sharded_layouts_says_instead_works(states: Path, tmp_path: Path) -> None:
    """What is sharded first, since DDP and DeepSpeed are given its state."""
    for layout in ("fsdp2", "tp", "ddp"):
        (tmp_path / layout).mkdir()
        assert_ways_out_work(layout, launched(layout, states, tmp_path / layout))
    # On one process: a state of FSDP2, second derivatives, and a replay without the engine.
    resume(states / "fsdp2")
    train(make_trainer(optimizer_class=SecondOrder))
    given: dict[str, Any] = {"num_epochs": 2, "per_device_batch_size": 6}
    replayed = numbered_trainer(norm=False).replay(Numbered(), update=5, folder=states / "replayed", **given)
    assert replayed.update == 5


@pytest.mark.slow
def test_what_an_error_of_deepspeed_says_instead_works(states: Path, tmp_path: Path) -> None:
    environment_of("zero2")
    assert_ways_out_work("zero2", launched("zero2", states, tmp_path))
    with pytest.raises(CheckpointError, match="this run is without one"):
        resume(states / "zero2", trusts=True)
    from_export(states / "zero2.safetensors")


if __name__ == "__main__":
    run_as_script(
        cases_of(sys.argv[3]),
        ignore=".*",
        create_accelerator=ACCELERATORS[sys.argv[3]],
        distributed_type=TYPES[sys.argv[3]],
    )
