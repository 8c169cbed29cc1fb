"""Each way out that an error of an engine names works, on each layout: the mistake is made, then what the message says.

The file is its own script, once for each layout: processes, folder of results, layout, folder of states.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from accel_callbacks import ModelEmaCallback
from accel_core import CheckpointError, Trainer, TrainerCallback, latest_checkpoint
from accel_core.engines.choose import REFUSED, choose_engine
from accel_core.errors import NotFiniteError
from accel_core.processes.group import DataGroup
from case_runner import Outcome, compare, run_as_script
from layouts import ParallelismConfig, fsdp2, set_parallelism, tensor_parallel
from replaying import Numbered, numbered_trainer, saving
from schedule_free import ScheduleFreeSGD
from sharding import create_accelerator, environment_of, shard_by_fsdp2
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


def with_scaler() -> Any:
    """With a float16 scaler, which Accelerate gives to GPUs only."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return accelerator


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


def exported(name: str, **kwargs: Any) -> Path:
    train(**kwargs).save_checkpoint(STATES / name)
    return STATES / name


def from_export(path: Path, trainer: Trainer | None = None, **kwargs: Any) -> Trainer:
    trainer = make_trainer() if trainer is None else trainer
    trainer.load_checkpoint(path, **{"load_optimizer": False, **kwargs})
    return train(trainer)


class Roots(Trainer):
    """Makes the root of a number small, which has none once a step of the optimizer was too large."""

    def calculate_train_batch_loss(self, batch: Any) -> Any:
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": output["loss"] + self.get_model().number.sqrt()}


class LowersRate(TrainerCallback):
    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        trainer.optimizer.param_groups[0]["lr"] = 0.05


POISONED = Path("poisoned")


def poisoned(*callbacks: Any, **kwargs: Any) -> Trainer:
    """After the sixth of eight updates the number is below zero, after the seventh it is nan."""
    model: Any = make_model()
    model.number = nn.Parameter(torch.ones(()))
    trainer = make_trainer(Roots, model, callbacks=callbacks)
    trainer.optimizer.param_groups[0]["lr"] = 0.3
    return train(trainer, make_data(32), **kwargs)


def saved_poisoned() -> Trainer:
    return poisoned(*(SaveAt(update, POISONED / f"update_{update:08d}") for update in (4, 8)))


def after_poison(*callbacks: Any, **kwargs: Any) -> Trainer:
    """The very run that was poisoned comes to its end."""
    return poisoned(*callbacks, resume_from=latest_checkpoint(POISONED), **kwargs)


def save_after_poison(*callbacks: Any, **kwargs: Any) -> None:
    trainer = after_poison(*callbacks, **kwargs)
    assert trainer.run_progress.updates_completed == 8
    trainer.save_training_state(new_folder())


def poisoned_again() -> None:
    """The rate of the script is not that of the state, so that lowering it there has no effect."""
    with pytest.raises(NotFiniteError):
        save_after_poison()


class OtherNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs)


def of_another_kind() -> Any:
    """An accelerator that only a later version of Accelerate could make."""
    return SimpleNamespace(
        gradient_accumulation_steps=1,
        distributed_type=SimpleNamespace(value="ANOTHER"),
        state=SimpleNamespace(parallelism_config=None),
        num_processes=1,
        process_index=0,
    )


ADAM = torch.optim.Adam
by_steps = partial(torch.optim.lr_scheduler.StepLR, step_size=1)


def by_parts(optimizer: Any) -> Any:
    """A scheduler with a state of another form."""
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [by_steps(optimizer), by_steps(optimizer)], [2])


def scheduled(create_scheduler_fn: Any) -> Trainer:
    """A trainer that has a scheduler, from its first run."""
    return train(create_scheduler_fn=create_scheduler_fn)


def launched_as_two() -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        return train()


ALONE: tuple[Row, ...] = (
    Row(
        "which accel does not know. Use one process, DDP",
        lambda: choose_engine(of_another_kind(), DataGroup()),
        # The launches of these tests train by the other three.
        (train,),
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
        "The {} of this run cannot load its state from '{}': {}: {} Create it as in the run that was saved, or {}",
        lambda: resume(saved("whole"), optimizer_class=ADAM),
        (
            lambda: resume(STATES / "whole"),
            lambda: from_export(exported("whole.pt"), make_trainer(optimizer_class=ADAM)),
        ),
        CheckpointError,
        says="or begin a new run from an export: load_checkpoint(path, load_optimizer=False).",
    ),
    Row(
        "The {} of this run cannot load its state from '{}': {}: {} Create it as in the run that was saved, or {}",
        lambda: from_export(exported("whole.pt"), make_trainer(optimizer_class=ADAM), load_optimizer=True),
        (
            lambda: from_export(STATES / "whole.pt", load_optimizer=True),
            lambda: from_export(STATES / "whole.pt", make_trainer(optimizer_class=ADAM)),
        ),
        CheckpointError,
        says="or pass load_optimizer=False to load_checkpoint.",
    ),
    Row(
        "The {} of this run cannot load its state from '{}': {}: {} Create it as in the run that was saved, or {}",
        lambda: from_export(exported("whole.pt", create_scheduler_fn=by_steps), scheduled(by_parts)),
        (
            lambda: from_export(STATES / "whole.pt", scheduled(by_steps)),
            lambda: from_export(STATES / "whole.pt", scheduled(by_parts), load_scheduler=False),
        ),
        CheckpointError,
        says="or pass load_scheduler=False to load_checkpoint.",
    ),
    Row(
        " is not finite, so the state was not saved and the checkpoints before it stay. Resume from the newest of them",
        saved_poisoned,
        (
            lambda: save_after_poison(gradient_clip_norm=0.1),
            poisoned_again,
            lambda: save_after_poison(LowersRate()),
        ),
        NotFiniteError,
    ),
    Row(
        " uses second derivatives, which mixed_precision='fp16' would scale. Use 'bf16' or 'no'.",
        lambda: train(make_trainer(optimizer_class=SecondOrder, accelerator=with_scaler())),
        (
            lambda: in_bfloat16(optimizer_class=SecondOrder),
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

# ---------------------------------------------------------------------- layouts that are refused

SHARDED, SEVERAL = DistributedType.FSDP, DistributedType.MULTI_CPU


class InAnotherWay(ParallelismConfig):
    """Lays a copy of the model over two processes, which a later version of Accelerate may."""

    non_data_parallel_size = 2


def refused(
    kind: Any = None, version: int = 2, dropped: str = "", config: Any = None, **sizes: int
) -> Trainer:
    """Train as a job does whose accelerator is of this kind, and has these sizes in its `ParallelismConfig`.

    Args:
        kind: None leaves that of the launch.
        version: of FSDP.
        dropped: an engine that was asked for, which Accelerate forgets.
    """
    accelerator = Accelerator()
    state = accelerator.state
    if sizes:
        config = ParallelismConfig()
        vars(config).update(sizes)  # Its constructor refuses some.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "distributed_type", state.distributed_type if kind is None else kind)
        patch.setitem(PartialState._shared_state, "distributed_type", state.distributed_type)
        patch.setattr(state, "parallelism_config", config)
        if state.distributed_type is SHARDED:
            plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
            patch.setattr(state, "fsdp_plugin", plugin, raising=False)
        if dropped:
            patch.setenv(f"ACCELERATE_USE_{dropped}", "true")
        return train(make_trainer(accelerator=accelerator))


class Mistake(NamedTuple):
    """A layout that is refused."""

    make: Callable[[], Any]
    says: str
    """A piece of the message, with what the layout was asked for or with its way out."""


REFUSED_LAYOUTS = {
    "XLA": Mistake(partial(refused, DistributedType.XLA), "Use GPUs or CPUs"),
    "Megatron-LM": Mistake(
        partial(refused, DistributedType.MEGATRON_LM),
        "use FSDP2, DeepSpeed or tp_size of a ParallelismConfig",
    ),
    "version 1 of FSDP": Mistake(partial(refused, SHARDED, version=1), "(fsdp_version=2)"),
    "context parallelism": Mistake(partial(refused, cp_size=2), "cp_size=2: context"),
    "sequence parallelism": Mistake(partial(refused, sp_size=2), "sp_size=2: sequence"),
    "tensor parallelism with FSDP2": Mistake(
        partial(refused, SHARDED, tp_size=2, dp_shard_size=2), "tp_size=2 and dp_shard_size=2"
    ),
    "tensor parallelism with several copies of the model": Mistake(
        partial(refused, SEVERAL, tp_size=2, dp_replicate_size=2), "tp_size=2 and dp_replicate_size=2"
    ),
    "in a way that accel does not know": Mistake(
        lambda: refused(SEVERAL, config=InAnotherWay()), "Use tp_size on all processes, FSDP2 or DDP."
    ),
    ", which does not shard. Pass fsdp_plugin=": Mistake(
        partial(refused, SEVERAL, dp_shard_size=2), "dp_shard_size=2, but the Accelerator runs MULTI_CPU"
    ),
    "given DeepSpeed, but Accelerate has dropped it": Mistake(
        partial(refused, SEVERAL, dropped="DEEPSPEED"), "Unset ACCELERATE_USE_CPU and set DS_ACCELERATOR=cpu"
    ),
    "given FSDP, but Accelerate has dropped it": Mistake(
        partial(refused, SEVERAL, dropped="FSDP"), "remove the plugin to train by DDP"
    ),
}
"""Each message of `REFUSED`, by a piece of it."""


def refused_in_favour_of(way_out: Callable[[], Any], *texts: str) -> tuple[Row, ...]:
    """Rows for these layouts, which name a layout that a launch has."""
    return tuple(
        Row(text, REFUSED_LAYOUTS[text].make, (way_out,), says=REFUSED_LAYOUTS[text].says) for text in texts
    )


# What several layouts name.
OF_ANY = ("tensor parallelism with several copies of the model", "in a way that accel does not know")


class Reader(nn.Module):
    """Reads sequences by layers of attention, which may be checkpointed."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = nn.Linear(5, 8), nn.Linear(8, NUM_CLASSES)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.checkpoints, self.calls = checkpoints, 0
        for layer in self.layers:
            layer.register_forward_pre_hook(self.count)

    def count(self, layer: Any, inputs: Any) -> None:
        self.calls += 1

    def forward(self, inputs: Any) -> Any:
        read = self.embedding(inputs)
        for layer in self.layers:
            read = checkpoint(layer, read, use_reentrant=False) if self.checkpoints else layer(read)
        return self.head(read.mean(1))


@contextlib.contextmanager
def sharded_by(policy: str, **kwargs: Any) -> Iterator[None]:
    """Let FSDP2 shard by another policy than that of the launch; nothing changes in other launches."""
    state = Accelerator().state
    if state.distributed_type is not SHARDED:
        yield
        return
    before = state.fsdp_plugin
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=policy,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
        **kwargs,
    )
    try:
        yield
    finally:
        state.fsdp_plugin = before


def read_long(checkpoints: bool, **kwargs: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The weights after two updates on sequences of 512 tokens, and how often layers were computed."""
    trainer = make_trainer(model=Reader(checkpoints))
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randn(8, 512, 5, generator=generator)
    with sharded_by(
        "transformer_based_wrap", transformer_cls_names_to_wrap=["TransformerEncoderLayer"], **kwargs
    ):
        train(trainer, TensorDataset(sequences, torch.arange(8) % NUM_CLASSES), per_device_batch_size=2)
        path = STATES / f"long {LAYOUT} {checkpoints}.pt"
        trainer.save_checkpoint(path)
    model: Any = trainer.get_model(keep_torch_compile=False)
    return torch.load(path)["model_state_dict"], model.calls


def checkpointed() -> None:
    """Activation checkpointing computes each layer twice, and changes nothing, dropout included."""
    (plain, calls), (equal, more_calls) = read_long(False), read_long(True)
    assert (calls, more_calls) == (4, 8)
    torch.testing.assert_close(equal, plain)


def checkpointed_by_fsdp2() -> None:
    """So does that of the plugin of Accelerate."""
    (plain, _), (equal, calls) = read_long(False), read_long(False, activation_checkpointing=True)
    assert calls == 8
    torch.testing.assert_close(equal, plain)


# ---------------------------------------------------------------------- mixed precision


def in_bfloat16(model: Any = None, **kwargs: Any) -> Trainer:
    """Train as with an accelerator of mixed_precision='bf16'. All accelerators share what is set here by hand."""
    state = Accelerator().state
    dtypes = set()
    model = make_model() if model is None else model
    model[0].register_forward_hook(lambda layer, inputs, outputs: dtypes.add(outputs.dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_mixed_precision", "bf16")
        if state.distributed_type is SHARDED:
            patch.setattr(state, "fsdp_plugin", state.fsdp_plugin)
            shard_by_fsdp2(Accelerator()).state.fsdp_plugin.set_mixed_precision("bf16")
        trainer = train(make_trainer(model=model, accelerator=Accelerator(), **kwargs))
        assert trainer.run_config.mixed_precision == "bf16"
    assert dtypes == {torch.bfloat16}
    assert all(value.dtype is torch.float32 for value in trainer.get_model().parameters())
    return trainer


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
    *refused_in_favour_of(
        train,
        "XLA",
        ", which does not shard. Pass fsdp_plugin=",
        "given DeepSpeed, but Accelerate has dropped it",
        "given FSDP, but Accelerate has dropped it",
        *OF_ANY,
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
    by_size = {"min_num_params": 10} if policy == "size_based_wrap" else {}
    with sharded_by(policy, **by_size, **kwargs):
        return train(make_trainer(model=Tied()))


def replay_sharded() -> Any:
    """A run of FSDP2 is replayed on its own processes."""
    trainer = numbered_trainer([saving(STATES / "replayed", 3)], norm=False)
    given: dict[str, Any] = {"num_epochs": 2, "per_device_batch_size": 6}
    trainer.train(Numbered(), **given)
    return trainer.replay(Numbered(), update=5, folder=STATES / "replayed", **given)


def clipped_by_size() -> Trainer:
    from accel_integrations.timm_adapter import AdaptiveGradientClippingCallback

    return train(make_trainer(callbacks=[AdaptiveGradientClippingCallback()]))


def with_shard_size() -> None:
    """The size stays in the `ParallelismConfig`."""
    accelerator = Accelerator()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parallelism_config", "device_mesh"):
            patch.setattr(accelerator.state, name, getattr(accelerator.state, name))
        set_parallelism(accelerator, ParallelismConfig(dp_shard_size=2))
        train(make_trainer(accelerator=accelerator))


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
            lambda: in_bfloat16(beside=Scaled()),
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
        "The {} of this run cannot load its state from '{}', which is for {}, while this one holds {}. Create it as in",
        lambda: resume(saved(), trainer=with_group_of_its_own()),
        (
            lambda: resume(saved()),
            lambda: from_export(exported("of one group.pt"), with_group_of_its_own()),
        ),
    ),
    Row(
        "replay trains a copy of the model, but {} spreads the model over the processes, where it cannot be copied.",
        replay_sharded,
        (),
    ),
    Row(
        "AdaptiveGradientClippingCallback needs whole parameters, but {} shards them. Leave the callback out, or use DDP.",
        clipped_by_size,
        (train,),
    ),
    *refused_in_favour_of(
        train, "Megatron-LM", "version 1 of FSDP", "tensor parallelism with FSDP2", *OF_ANY
    ),
    *refused_in_favour_of(with_shard_size, ", which does not shard. Pass fsdp_plugin="),
    *refused_in_favour_of(checkpointed, "context parallelism"),
    *refused_in_favour_of(checkpointed_by_fsdp2, "sequence parallelism"),
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
        (lambda: in_bfloat16(laid_out()), all_laid_out),
    ),
    *refused_in_favour_of(all_laid_out, "Megatron-LM", "tensor parallelism with FSDP2", *OF_ANY),
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
    Row(
        "The optimizer {} exchanges the weights by its train() and eval(), but {} holds them in a copy",
        lambda: train(make_trainer(optimizer_class=ScheduleFreeSGD)),
        (train,),
    ),
    Row(
        " cannot average a model that {} has sharded. Use DDP or FSDP2, or leave {} out.",
        lambda: train(make_trainer(callbacks=[ModelEmaCallback(save_path=None)])),
        (train,),
    ),
    *refused_in_favour_of(train, "Megatron-LM", "given DeepSpeed, but Accelerate has dropped it"),
    *refused_in_favour_of(checkpointed, "sequence parallelism"),
)

ROWS = {"ddp": DDP, "fsdp2": FSDP2, "tp": TENSOR_PARALLEL, "zero2": DEEPSPEED}

ON_OTHER_LAYOUTS: dict[str, dict[str, Callable[[], Any]]] = {
    "ddp": {
        "a state and an export": lambda: [saved("ddp"), exported("ddp.safetensors")],
        "resumed as it was saved": lambda: resume(STATES / "ddp"),
        "steps of one's own": lambda: train(make_trainer(OwnStep)),
        "a parameter beside the model": lambda: train(make_trainer(beside=Scaled())),
        "a further optimizer": lambda: train(make_trainer(OfTwo)),
        "an optimizer with modes": lambda: train(make_trainer(optimizer_class=ScheduleFreeSGD)),
        "an average": lambda: train(make_trainer(callbacks=[ModelEmaCallback(save_path=None)])),
        "an attribute with a parameter": lambda: train(holding(bias=lambda model: model[2].bias)),
        "a state of FSDP2": lambda: resume(STATES / "fsdp2"),
        "clipping by the size of parameters": clipped_by_size,
    },
    "fsdp2": {
        "a state and an export": lambda: [saved("fsdp2"), exported("fsdp2.safetensors")],
        "steps of one's own": lambda: train(make_trainer(OwnStep)),
        "a parameter beside the model": lambda: train(make_trainer(beside=Scaled())),
        "a further optimizer": lambda: train(make_trainer(OfTwo)),
        "an optimizer with modes": lambda: train(make_trainer(optimizer_class=ScheduleFreeSGD)),
        "an average": lambda: train(make_trainer(callbacks=[ModelEmaCallback(save_path=None)])),
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

OF_OTHER_PARTS = (
    "replay ",
    "The optimizer {} exchanges",
    " cannot average a model",
    "AdaptiveGradientClippingCallback ",
)
"""How the messages of other parts begin that only these engines give."""
NO_WAY_OUT = {
    "beside the model it holds parameters of the shapes {} in": "stands inside the sentence of another error",
    "it has no {}.": "stands inside the sentence of another error",
    "The engine was asked for further optimizers before it was told what is trained.": "no public call gets there",
    "The engine was asked for the prepared model before prepare.": "no public call gets there",
    " was saved with an engine that shards the model, and this run is without one": "below, with a state of DeepSpeed",
}


def test_every_error_of_an_engine_is_known() -> None:
    rows = [row.text for row in (*ALONE, *(row for rows in ROWS.values() for row in rows))]
    rows = [text for text in rows if text not in REFUSED_LAYOUTS and not text.startswith(OF_OTHER_PARTS)]
    check_every_error_is_known(*PLACES, rows=rows, facts=NO_WAY_OUT)


def test_every_layout_that_is_refused_is_known() -> None:
    messages = [layout.message for layout in REFUSED]
    assert [message for message in messages if not any(text in message for text in REFUSED_LAYOUTS)] == []
    assert [text for text in REFUSED_LAYOUTS if not any(text in message for message in messages)] == []
    assert {*REFUSED_LAYOUTS} <= {row.text for rows in ROWS.values() for row in rows}


@pytest.mark.parametrize("row", ALONE, ids=name_of)
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
