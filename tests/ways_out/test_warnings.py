"""Each way out that a warning or a notice names works: it is made to appear, and then what it says is done."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

from accel_callbacks import ModelEmaCallback, ProfileCallback, SaveTrainingStateCallback
from accel_callbacks.mirrored_saves import MirroredSaves
from accel_core import (
    RunInterrupted,
    TerminateOnNaNCallback,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
    latest_checkpoint,
)
from accel_core.run.background_saves import BackgroundSaves
from accel_core.state import save as save_module
from case_runner import run_as_script, shared_folder
from layouts import fsdp2
from notices import check_every_notice_is_known, check_heard, hear_mistake_and_ways_out, heard
from stores import Unreliable
from tiny import Drawing, SaveAt, tiny_data, tiny_network, tiny_trainer
from ways_out import DATA, Row, name_of, train, training

FOLDER = Path("states")
SECONDS = 60
"""Longer than any of these trainings takes, on a machine with much else to do."""
INPUTS, TARGETS = DATA.tensors


def saver(every: int = 4, **kwargs: Any) -> SaveTrainingStateCallback:
    return SaveTrainingStateCallback(FOLDER, save_every_n_updates=every, if_other_run="set_aside", **kwargs)


def saved(data: Any = DATA, **kwargs: Any) -> Path:
    """A state in the middle of the first epoch."""
    # Whatever another act of the row has saved.
    shutil.rmtree(FOLDER, ignore_errors=True)
    train(data=data, callbacks=[SaveAt(2, FOLDER / "state")], **kwargs)
    return FOLDER / "state"


def on(event: str, act: Callable[[Trainer], Any]) -> TrainerCallback:
    def method(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        act(trainer)

    return type("Acts", (TrainerCallback,), {event: method})()


class PatchedTo:
    """Does `act` while an attribute is another one."""

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.given = (target, name, value)

    def __call__(self, act: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*self.given)
            return act()


# ---------------------------------------------------------------------- model, optimizer, loss


def average_in(dtype: torch.dtype, precision: str = "no") -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = tiny_trainer(
        callbacks=[ModelEmaCallback(save_path=None)],
        model=tiny_network(dtype),
        accelerator=Accelerator(mixed_precision=precision),
    )
    return train(trainer, tiny_data(16, dtype))


class TwoHeads(Trainer):
    """Trains a second head beside the model."""

    head: nn.Module

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        outputs = self.model(batch[0]) + self.head(self.get_model()[:2](batch[0]))
        return {"loss": nn.functional.cross_entropy(outputs, batch[1]), "batch_size": len(outputs)}


def replace_layer(kind: type[Trainer] = Trainer, creates_before: bool = True) -> Trainer:
    """Replace the last layer after or before the optimizer is made; `TwoHeads` trains the old one too."""
    model = tiny_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old, model[2] = model[2], nn.Linear(8, 2, dtype=torch.float64)
    if not creates_before:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = kind(model, nn.functional.cross_entropy, optimizer, (), seed=3)
    if isinstance(trainer, TwoHeads):
        trainer.head = old
    return train(trainer)


class WithOptimizer(Trainer):
    def configure_optimizers(self) -> Any: ...


class OtherName(Trainer):
    def make_optimizers(self) -> Any: ...


class LitModel(nn.Linear):
    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class CallsStep(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": self.model.training_step(batch, 0), "batch_size": len(batch[0])}


def lit(kind: type[Trainer]) -> Trainer:
    return train(tiny_trainer(kind, model=LitModel(5, 2, dtype=torch.float64)))


def regress(
    outputs: tuple[int, ...], targets: tuple[int, ...], change: Any = None, to: Any = None
) -> Trainer:
    """Train a model whose outputs for a sample have the shape `outputs`, on targets of the shape `targets`.

    Args:
        change: is done to the outputs of the model.
        to: is done to each target of the data set.
    """

    class Shaped(nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            made = super().forward(inputs).reshape(len(inputs), *outputs)
            return made if change is None else change(made)

    values = [torch.ones(targets, dtype=torch.float64) for _ in range(16)]
    data = [(INPUTS[index], value if to is None else to(value)) for index, value in enumerate(values)]
    return train(
        tiny_trainer(model=Shaped(5, 1, dtype=torch.float64), loss_func=nn.functional.mse_loss), data
    )


WEIGHTED = TensorDataset(INPUTS, TARGETS, torch.rand(16))


class Weighted(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        inputs, targets, weights = batch
        losses = nn.functional.cross_entropy(self.model(inputs), targets, reduction="none")
        return {"loss": (losses * weights).mean(), "batch_size": len(inputs)}

    calculate_eval_batch_loss = calculate_train_batch_loss


OTHER = tiny_network()


class Outside(Trainer):
    """Computes with a model that is not the trainer's."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return {"loss": nn.functional.cross_entropy(OTHER(batch[0]), batch[1]), "batch_size": len(batch[0])}


class Branches(nn.Module):
    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.first, self.second = tiny_network(), nn.Linear(5, 2, dtype=torch.float64)
        self.uses = uses

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.first(inputs) + self.second(inputs) if self.uses else self.first(inputs)


def branch(uses: bool = False, frozen: bool = False) -> Trainer:
    model = Branches(uses)
    model.second.requires_grad_(not frozen)
    return train(tiny_trainer(model=model))


def keep_in_eval_mode(calls_train: bool) -> Trainer:
    model = nn.Sequential(tiny_network(), nn.Dropout(0.1))
    model[1].eval()
    if calls_train:
        model.train()
    return train(tiny_trainer(model=model))


class OwnTraining(Trainer):
    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        return super().calculate_train_batch_loss(batch)


class OwnBoth(OwnTraining):
    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        return self.calculate_train_batch_loss(batch)


def evaluate_by(kind: type[Trainer]) -> Trainer:
    return train(tiny_trainer(kind), eval_dataset=DATA)


def evaluate_in_callback(**kwargs: Any) -> Trainer:
    return train(callbacks=[on("on_train_epoch_end", lambda trainer: trainer.run_eval_epoch(**kwargs))])


# ---------------------------------------------------------------------- schedules


def cosine(length: Any, **kwargs: Any) -> Trainer:
    schedule = partial(lr_scheduler.CosineAnnealingLR, T_max=length)
    return train(num_epochs=2, create_scheduler_fn=schedule, **kwargs)


def longer_than_its_plan(num_epochs: int) -> Trainer:
    """Resume a run of one epoch with a cosine, for `num_epochs`."""
    schedule = partial(lr_scheduler.CosineAnnealingLR, T_max=TrainerPlaceholderValues.NUM_UPDATE_STEPS)
    state = saved(create_scheduler_fn=schedule)
    return train(num_epochs=num_epochs, create_scheduler_fn=schedule, resume_from=state)


def go_on_in_a_second_call() -> None:
    trainer = longer_than_its_plan(1)
    schedule = partial(lr_scheduler.CosineAnnealingLR, T_max=TrainerPlaceholderValues.NUM_UPDATE_STEPS)
    train(trainer, create_scheduler_fn=schedule, reset_run_history=False)
    assert trainer.run_progress.updates_completed == 8


# ---------------------------------------------------------------------- saving and resuming


def skipped_stage(looks: bool) -> None:
    """Export after a stage that was skipped, unless the script `looks`."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    trainer = tiny_trainer(callbacks=[SaveAt(6, FOLDER / "state")])
    train(trainer)
    train(trainer, reset_run_history=False)
    resumed = tiny_trainer()
    resumed.train(DATA, 1, per_device_batch_size=4, resume_from=FOLDER / "state")
    if not looks or resumed.run_progress.stage_skipped is False:
        resumed.save_checkpoint("first.pt")
    train(resumed, reset_run_history=False, resume_from=FOLDER / "state")


def save_while_writing(every: int) -> None:
    """Save while no save is written to its end before training waits for it."""
    may_write = threading.Event()
    write, finish = save_module.write_contents, BackgroundSaves.finish

    def writes(*args: Any) -> Any:
        assert may_write.wait(SECONDS)
        return write(*args)

    def waits(saves: BackgroundSaves, trainer: Trainer) -> Any:
        if saves.path is not None:
            may_write.set()
        return finish(saves, trainer)

    act = training(callbacks=[saver(every, in_background=True, save_at_end=False)])
    PatchedTo(save_module, "write_contents", writes)(lambda: PatchedTo(BackgroundSaves, "finish", waits)(act))


def mirror_that_is_slow(wait_seconds: float) -> None:
    """A store that takes no file of a state before training waits for it; if that waits at all, for a moment."""
    Unreliable.reset()
    Unreliable.gate = may_write = threading.Event()
    # The probe of the store is no file of a state.
    may_write.set()
    finish = MirroredSaves.finish

    def waits(saves: MirroredSaves, trainer: Trainer, by_all: bool = True) -> None:
        timer = threading.Timer(0.1, may_write.set)
        if wait_seconds:
            timer.start()
        finish(saves, trainer, by_all)

    try:
        begins = on("on_train_epoch_start", lambda trainer: may_write.clear())
        saves = saver(mirror=f"unreliable://run{wait_seconds}", mirror_wait_seconds=wait_seconds)
        PatchedTo(MirroredSaves, "finish", waits)(training(callbacks=[saves, begins]))
    finally:
        may_write.set()
        Unreliable.reset()


def mirrored() -> str:
    train(callbacks=[saver(mirror="memory://run")])
    shutil.rmtree("cache", ignore_errors=True)
    newest = latest_checkpoint("memory://run", cache="cache")
    assert newest is not None
    return newest.name


def state_in_mirror() -> None:
    import fsspec

    mirrored()
    store = fsspec.filesystem("memory")
    name = next(path for path in store.ls("/run", detail=False) if "update" in path)
    assert latest_checkpoint(f"memory:/{name}", cache="other") is None


def finished(num_epochs: int = 1, resumes: bool = True) -> Trainer:
    train(callbacks=[saver()])
    return train(
        callbacks=[saver()], num_epochs=num_epochs, resume_from=latest_checkpoint(FOLDER) if resumes else None
    )


def read_in_workers(seeds: bool) -> Trainer:
    arguments = {"train_dataloader_kwargs": {"num_workers": 1}, "seed_each_sample": seeds}
    return train(data=Drawing(16), num_epochs=1, resume_from=saved(Drawing(16), **arguments), **arguments)


class Shuffles(Sampler[int]):
    """Another order in each epoch."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(16, generator=self.generator).tolist())


class ShufflesByEpoch(Shuffles):
    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(epoch)


def sample_by(kind: type[Shuffles]) -> Trainer:
    def loader() -> DataLoader[Any]:
        return DataLoader(DATA, 4, sampler=kind())

    return train(data=loader(), resume_from=saved(loader()))


class Explodes(Trainer):
    """The loss of the third update is infinite."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        output = super().calculate_train_batch_loss(batch)
        factor = torch.inf if self.run_progress.updates_completed == 2 else 1.0
        return {**output, "loss": output["loss"] * factor}


def find_nan(*savers: TrainerCallback) -> None:
    trainer = tiny_trainer(Explodes, [TerminateOnNaNCallback(find=True), *savers])
    train(trainer)
    assert trainer.stop_reason is not None


def press_ctrl_c(*savers: TrainerCallback) -> None:
    """Ctrl-C in the second update."""

    def press(trainer: Trainer) -> None:
        if trainer.run_progress.updates_completed == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises((KeyboardInterrupt, RunInterrupted)):
        train(callbacks=[*savers, on("on_optimizer_step_end", press)])
    if savers:
        assert latest_checkpoint(FOLDER) is not None


# ---------------------------------------------------------------------- waiting for data


class Slow(Dataset[Any]):
    """Takes longer to read than to train on."""

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.02)
        return DATA[index]


class SlowStream(IterableDataset[Any]):
    def __init__(self, shards: bool) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shards else None
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (Slow()[index] for index in range(first, 16, step))


class SlowBatches:
    """Ready batches, which are read when they are asked for, or ahead."""

    def __init__(self, reads_ahead: bool) -> None:
        self.batches = list(DataLoader(DATA, 4)) if reads_ahead else None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches if self.batches is not None else DataLoader(Slow(), 4))


def wait(data: Any = None, num_workers: int = 0, **kwargs: Any) -> Trainer:
    """Train where one worker is all that is of use."""
    kwargs |= {} if num_workers == 0 else {"train_dataloader_kwargs": {"num_workers": num_workers}}
    act = training(data=Slow() if data is None else data, **kwargs)
    return PatchedTo(os, "sched_getaffinity", lambda process: {0})(act)


MEAN = nn.CrossEntropyLoss()
SUM = nn.CrossEntropyLoss(reduction="sum")
SQUEEZE = partial(torch.squeeze, dim=-1)
UNSQUEEZE = partial(torch.unsqueeze, dim=-1)
ROWS: tuple[Row, ...] = (
    Row(
        " yet. This machine has them in '{}'. To wait longer, pass a mirror_wait_seconds of more than {}.",
        lambda: mirror_that_is_slow(0),
        (lambda: mirror_that_is_slow(SECONDS),),
    ),
    Row(
        " that the model does not have, as happens if layers are replaced after the optimizer was created.",
        replace_layer,
        (lambda: replace_layer(creates_before=False), lambda: replace_layer(TwoHeads)),
    ),
    Row(
        ": the optimizer is the one that was passed to Trainer. Pass create_scheduler_fn to train for a scheduler,",
        lambda: train(tiny_trainer(WithOptimizer)),
        (
            lambda: train(tiny_trainer(OtherName)),
            training(create_scheduler_fn=partial(lr_scheduler.StepLR, step_size=1)),
        ),
    ),
    Row(
        "{} was called with {}, which is called {} now. Pass {}=... instead.",
        lambda: evaluate_in_callback(dataloader=DATA),
        (lambda: evaluate_in_callback(dataset=DATA),),
    ),
    Row(
        "with reduction='sum', but accel weights each batch as if its loss were the mean over its samples",
        lambda: train(tiny_trainer(loss_func=SUM)),
        (lambda: train(tiny_trainer(loss_func=MEAN)),),
    ),
    Row(
        "The outputs have the shape {} and the targets {}, so {} compares every output with every target.",
        lambda: regress((1,), ()),
        (lambda: regress((1,), (), change=SQUEEZE), lambda: regress((1,), (), to=UNSQUEEZE)),
        says="return outputs.squeeze(-1) from the model, or targets.unsqueeze(-1) from the data set.",
    ),
    Row(
        "Give both the same shape: return outputs.{}(-1) from the model, or targets.{}(-1) from the data set.",
        lambda: regress((), (1,)),
        (lambda: regress((), (1,), change=UNSQUEEZE), lambda: regress((), (1,), to=SQUEEZE)),
        says="return outputs.unsqueeze(-1) from the model, or targets.squeeze(-1) from the data set.",
    ),
    Row(
        "Give both the same shape, in the model or in the data set.",
        lambda: regress((1, 1), ()),
        (
            lambda: regress((1, 1), (), change=torch.flatten),
            lambda: regress((1, 1), (), to=lambda target: target.reshape(1, 1)),
        ),
    ),
    Row(
        "The batch has {}, but the default step takes the first two as inputs and targets and ignores the rest.",
        lambda: train(data=WEIGHTED),
        (lambda: train(tiny_trainer(Weighted), WEIGHTED, eval_dataset=WEIGHTED), training()),
    ),
    Row(
        "The loss depends on no parameter that the optimizer holds, so nothing is trained. Compute the loss from",
        lambda: train(tiny_trainer(Outside)),
        (lambda: train(tiny_trainer(OwnTraining)),),
    ),
    Row(
        "The first update has no gradient for {}{}, which the optimizer holds, so they are not trained.",
        branch,
        (lambda: branch(uses=True), lambda: branch(frozen=True)),
    ),
    Row(
        "which train skipped because resume_from is a state of a later stage. Call save_checkpoint only if",
        lambda: skipped_stage(looks=False),
        (lambda: skipped_stage(looks=True),),
    ),
    Row(
        "with a training_step, which accel never calls: the loss is loss_func(model(inputs), targets). To use",
        lambda: lit(Trainer),
        (lambda: lit(CallsStep),),
    ),
    Row(
        "The schedule of {} ends after {} {}, but this run has {}: the learning rate will climb again from {} to {}.",
        lambda: cosine(TrainerPlaceholderValues.NUM_EPOCHS),
        (lambda: cosine(TrainerPlaceholderValues.NUM_UPDATE_STEPS),),
    ),
    Row(
        "Give it the length of the run: TrainerPlaceholderValues.{}.",
        lambda: cosine(TrainerPlaceholderValues.NUM_EPOCHS),
        (lambda: cosine(TrainerPlaceholderValues.NUM_UPDATE_STEPS),),
        says="TrainerPlaceholderValues.NUM_UPDATE_STEPS.",
    ),
    Row(
        " If it counts epochs, pass scheduler_step_every='epoch'.",
        lambda: cosine(TrainerPlaceholderValues.NUM_EPOCHS),
        (lambda: cosine(TrainerPlaceholderValues.NUM_EPOCHS, scheduler_step_every="epoch"),),
    ),
    Row(
        "A resumed schedule keeps its plan. Train for {} {} in all, and go on in a second call of train with",
        lambda: longer_than_its_plan(2),
        (go_on_in_a_second_call,),
    ),
    # A disk that is fast enough cannot be had at will.
    Row(
        "A save is due, but '{}' is still being written, so training waits for it. Save less often, or to a faster",
        lambda: save_while_writing(1),
        (lambda: save_while_writing(4),),
    ),
    # ---- what is logged or printed
    Row(
        "ProfileCallback recorded nothing: the run made {}, but it records from update {} on. Train longer, or pass",
        lambda: train(callbacks=[ProfileCallback("profile", wait=2, warmup=3, active=1)]),
        (
            lambda: train(callbacks=[ProfileCallback("profile", wait=2, warmup=3, active=1)], num_epochs=2),
            lambda: train(callbacks=[ProfileCallback("profile", wait=0, warmup=3, active=1)]),
            lambda: train(callbacks=[ProfileCallback("profile", wait=2, warmup=1, active=1)]),
        ),
    ),
    Row(
        "because no training state was saved before. Add SaveTrainingStateCallback(save_every_n_updates=...), or save",
        find_nan,
        (lambda: find_nan(saver(2, save_at_end=False)),),
    ),
    Row(
        "because no training state was saved before. Add SaveTrainingStateCallback(save_every_n_updates=...), or save",
        lambda: find_nan(saver(3, save_at_end=False)),
        (lambda: find_nan(saver(2, save_at_end=False)),),
    ),
    Row(
        "'{}' is itself a training state. Pass the address of the mirror that holds it.",
        state_in_mirror,
        (mirrored,),
    ),
    Row(
        "'{}' is itself a training state. Pass it to resume_from without latest_checkpoint.",
        lambda: train(resume_from=latest_checkpoint(saved())),
        (lambda: train(resume_from=saved()),),
    ),
    Row(
        "The run in {} is finished after {}, so there is nothing to do. {}",
        finished,
        (lambda: finished(num_epochs=2),),
    ),
    Row(
        "To train longer, pass a larger {}. To start a new run, leave out resume_from.",
        finished,
        (lambda: finished(num_epochs=2), lambda: finished(resumes=False)),
        says="pass a larger num_epochs.",
    ),
    Row(
        "Random numbers that the data set draws in workers will differ. To repeat them, pass seed_each_sample=True to",
        lambda: read_in_workers(False),
        (lambda: read_in_workers(True),),
    ),
    Row(
        "The sampler {} has no set_epoch, so its order may differ after a restart: samples may come twice or not",
        lambda: sample_by(Shuffles),
        (lambda: sample_by(ShufflesByEpoch),),
    ),
    Row(
        "of the model {} in eval mode and {} in it during training: {}. To train them in train mode, call model.train()",
        lambda: keep_in_eval_mode(calls_train=False),
        (lambda: keep_in_eval_mode(calls_train=True),),
    ),
    Row(
        "If evaluations should use your step, override that method too: return self.calculate_train_batch_loss(batch).",
        lambda: evaluate_by(OwnTraining),
        (lambda: evaluate_by(OwnBoth),),
    ),
    Row(
        'SaveTrainingStateCallback(save_on_signals=("SIGTERM", "SIGINT")) saves on Ctrl-C.',
        press_ctrl_c,
        (lambda: press_ctrl_c(saver(save_on_signals=("SIGTERM", "SIGINT"))),),
    ),
    Row(
        "try train_dataloader_kwargs={'num_workers': {}}",
        wait,
        (lambda: wait(num_workers=1),),
    ),
    Row(
        "{} % of the time was spent waiting for data; {}",
        wait,
        (lambda: wait(list(DATA)),),
    ),
    Row(
        "try num_workers={} in your {}",
        lambda: wait(DataLoader(Slow(), 4)),
        (lambda: wait(DataLoader(Slow(), 4, num_workers=1)),),
    ),
    Row(
        "its {} cannot keep up, so make the reading of a sample cheaper",
        lambda: wait(num_workers=1),
        (lambda: wait(list(DATA), num_workers=1),),
    ),
    Row(
        "workers help if each reads a part of its own: see torch.utils.data.get_worker_info",
        lambda: wait(SlowStream(shards=False)),
        (lambda: wait(SlowStream(shards=True), num_workers=1),),
    ),
    Row(
        "let your {} read ahead",
        lambda: wait(SlowBatches(reads_ahead=False)),
        (lambda: wait(SlowBatches(reads_ahead=True)),),
    ),
)


# ---------------------------------------------------------------------- adapters


def save_adapters(**kwargs: Any) -> None:
    import peft
    import transformers

    from accel_integrations.transformers_adapter import TransformersTrainer

    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained("base")
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    TransformersTrainer(model, callbacks=()).save_pretrained("adapters", **kwargs)


# Libraries are imported, and autocast begins.
LENGTHY = (
    Row(
        "whose few digits lose the small changes of an average. Keep the model in float32, and pass accelerator=",
        lambda: average_in(torch.bfloat16),
        (lambda: average_in(torch.float32), lambda: average_in(torch.float32, "bf16")),
    ),
    Row(
        "a path of this machine, so no other machine finds it. Pass base_name='organisation/model' to save_pretrained.",
        save_adapters,
        (lambda: save_adapters(base_name="organisation/model"),),
    ),
)


# ---------------------------------------------------------------------- on two processes


def rank() -> int:
    return Accelerator().process_index


class OwnStream(IterableDataset[Any]):
    """Gives each process its own samples, or all."""

    def __init__(self, gives_shards: bool) -> None:
        self.gives_shards = gives_shards

    def __iter__(self) -> Iterator[Any]:
        return iter(Subset(DATA, range(8 * rank(), 8 * rank() + 8)) if self.gives_shards else DATA)


def own_tensors() -> TensorDataset:
    return TensorDataset(*(tensor[8 * rank() : 8 * rank() + 8] for tensor in DATA.tensors))


def streams() -> list[str]:
    return [
        heard(training(data=OwnStream(True))),
        heard(training(data=OwnStream(False)), may_warn=False),
        heard(training(data=OwnStream(True), data_is_sharded=True), may_warn=False),
    ]


def tensors() -> list[str]:
    return [
        heard(training(data=own_tensors())),
        heard(training(), may_warn=False),
        heard(training(data=own_tensors(), data_is_sharded=True), may_warn=False),
    ]


def rounded() -> list[str]:
    """Weights that differ in the last digits, as on another kind of device."""

    def round_one(trainer: Trainer) -> None:
        if rank() and trainer.run_progress.updates_completed == 1:
            with torch.no_grad():
                next(trainer.model.parameters()).mul_(1 + 1e-12)

    # Weights are compared where they are saved.
    folder = shared_folder()
    return [
        heard(training(callbacks=[on("on_optimizer_step_end", round_one), SaveAt(2, folder / "rounded")])),
        heard(training(callbacks=[SaveAt(2, folder / "equal")]), may_warn=False),
    ]


def pickled() -> list[str]:
    """States as with a torch that cannot write sharded safetensors."""
    from torch.distributed import checkpoint

    AcceleratorState._reset_state(reset_partial_state=False)
    fsdp2()
    folder = shared_folder() / "state"

    def resume() -> Trainer:
        trainer = tiny_trainer()
        trainer.trust_engine_files = True
        return train(trainer, num_epochs=2, resume_from=folder)

    saving = training(callbacks=[SaveAt(2, folder)])
    return [
        PatchedTo(checkpoint, "HuggingFaceStorageWriter", None)(lambda: heard(saving)),
        heard(resume, may_warn=False),
    ]


ON_PROCESSES = {
    "whose first entries differ between the processes. It seems to be a shard already, and accel shards it": tensors,
    "The first item of the {} differs between {} processes. It seems to be a shard already": streams,
    "The processes have values of the parameter {} that differ in their last digits": rounded,
    "Accelerate writes the training states, with pickle, because {}. To resume from them, set": pickled,
}
CASES = {text: lambda batch_size, case=case: case() for text, case in ON_PROCESSES.items()}

ELSEWHERE = {
    "accel_callbacks/export_path.py: str(error)": (),
    "accel_callbacks/profile.py: self.table": (),
    "accel_callbacks/progress_bar.py: bar.title": (),
    "accel_callbacks/progress_bar.py: wrap(how_it_ended(trainer), columns_of())": (),
    "accel_callbacks/optuna_pruning.py: f'{_REASON} {self.trial.number}: {value}'": (
        "accel_callbacks/optuna_pruning.py: _REASON",
    ),
    "accel_callbacks/state_saver.py: str(error)": (),
    "accel_core/callbacks/log_metrics.py: '%s'": (),
    "accel_core/callbacks/log_metrics.py: join_fields(start, fields, columns_of(), separator())": (),
    "accel_core/callbacks/print_progress.py: wrap(how_it_ended(trainer), columns_of())": (
        "accel_core/callbacks/print_progress.py: how_it_ended",
    ),
    "accel_core/callbacks/terminate_on_nan.py: self.origin.text": (
        "accel_core/callbacks/non_finite.py: find_origin",
        "accel_core/callbacks/non_finite.py: _origin_of",
    ),
    "accel_core/notices.py: '%s'": (),
    "accel_core/notices.py: wrap(f\"{time.strftime('%H:%M:%S')} {message}\", columns_of())": (),
    "accel_core/run/background_saves.py: _failure(error, path)": (
        "accel_core/run/background_saves.py: _failure",
    ),
    "accel_core/run/ending.py: wrap(sentence_of_interrupt(trainer, run), columns_of(sys.stderr))": (
        "accel_core/run/ending.py: sentence_of_interrupt",
    ),
    "accel_core/run/loaders.py: message": ("accel_core/callbacks/limit_batches.py: __str__",),
    "accel_core/run/modes.py: message": ("accel_core/engines/modes.py: describe",),
    "accel_core/run/saved_state.py: message": (
        "accel_core/state/resume.py: _compare_data",
        "accel_core/state/resume.py: _compare_launches",
        "accel_core/state/resume.py: versions_changed",
        "accel_core/state/resume.py: _compare_parts",
        "accel_core/data/loader.py: RANDOM_NUMBERS_OF_WORKERS",
        "accel_core/data/source.py: limits_of_exactness",
        "accel_core/data/own_share.py: limits_of_exactness",
        "accel_core/data/map_style.py: limits_of_exactness",
        "accel_core/engines/ddp.py: _settle_buckets",
    ),
    "accel_core/run/silent_mistakes.py: message": (),
    "accel_core/trainer.py: reason": (),
    "accel_core/run/trained_state.py: message": ("accel_core/engines/averaging.py: check_equal_parameters",),
    "accel_integrations/schedulers/wsd_checkpoint.py: str(error)": (),
}
"""Calls whose text is made in another place: the functions that make it. None for what is no sentence, or an error."""
PIECES = (
    "accel_core/run/silent_mistakes.py: _way_to_one_shape",
    "accel_core/run/schedule_fit.py: _way_out",
    "accel_core/run/schedule_fit.py: warn_if_it_climbs",
    "accel_core/run/saved_state.py: _way_on",
    "accel_core/data/waiting.py: _way_out",
)
"""Functions that make a part of a sentence."""
_FOUND = "tells where the first value arose that is not finite"
_PROGRESS = "tells how far the run is"
_END = "why the run ended: what was asked for, or has happened"
_RESUMED = "what a state cannot carry over: the run is resumed with other things on purpose"
_OLD = "an older version wrote it"
_PASSED = "a state that cannot be used is passed over, and what is wrong with it stands behind"
_STORE = "what a store or a disk does"
FACTS = {
    "Epoch {}{}": _PROGRESS,
    "{}: batch {}{}, {}": _PROGRESS,
    "The state of update {} is saved: {}": _PROGRESS,
    "The run continues from {}, after update {}.": _PROGRESS,
    "{} runs the steps on {}, device {}, precision {}.": _PROGRESS,
    "Training includes {} from epoch {} on.": _PROGRESS,
    "Loaded the best weights, of epoch {}, with {} {}.": _PROGRESS,
    "Replaying up to update {} to find why its loss is not finite.": _PROGRESS,
    "Skipped {} of {}.": _PROGRESS,
    "Update {}: the optimizer made {} not finite, though all gradients are finite": _FOUND,
    "Update {}: everything is finite in the replay, so the replay differs from the run": _FOUND,
    "Update {}: {}.": _FOUND,
    "the batch holds {}": _FOUND,
    "the input of {} is {}, and all layers before it are finite: it comes from the forward of {},": _FOUND,
    "the output of {} is {}, and its input is finite": _FOUND,
    "the loss is {}, and all outputs of the model are finite: it comes from the loss function": _FOUND,
    "the gradient of the output of {} is {}, and the loss is finite": _FOUND,
    "the gradient of {} is {}, and those of all outputs are finite": _FOUND,
    "; its largest parameter is {}, up to {}": _FOUND,
    "; samples {}{}": _FOUND,
    "the model": "a word of that sentence",
    "the layer {}": "a word of that sentence",
    "Left out {} {} None.": "a collate function of the user's own returned None",
    "Each {} is limited to {} per process{}.": "what LimitBatchesCallback was asked for",
    ", the same ones in every epoch": "what LimitBatchesCallback was asked for",
    "evaluation in mid-epoch": "a word of that sentence",
    "Training ended after {} and {}{}": _END,
    "complete epoch": _END,
    "Optuna has pruned trial": _END,
    "the loss is {} in epoch {}, batch {}": _END,
    "the range test is over": _END,
    "the signal {} was received": _END,
    "the time limit of {} is reached": _END,
    "{} has not improved for {} evaluations in a row; {}": _END,
    "Stopped by Ctrl-C.": _END,
    "Stopped by Ctrl-C after update {} (epoch {}).": _END,
    "No state was saved": "its way out stands behind, and has a row",
    "{} The state of this update is {}.": _END,
    "The first value that is not finite could not be found: {}": "an error of the replay, whose text stands behind",
    "{} Training continues, and the save is tried again (on_error='retry').": "test_folder_of_a_run.py sees it tried",
    "The training state could be saved again, to '{}'.": "the end of that",
    "The training state was not saved to '{}' in the background. {}": "an error, whose text stands behind",
    "The run card was not written: {}: {}": "an error, whose text stands behind; the states stand",
    "{}, so the model keeps its last weights.": "another run has replaced the file",
    "{} The model keeps its last weights.": "an error of a store, whose text stands behind",
    "The best average of {} is not there any more: {}.": "another run has replaced the file",
    "{} is planned for {} {}, but the run ends after {}.": "a schedule may be longer on purpose",
    "'{}' is a state of stage {} of its run, so this call of train, stage {}, is skipped.": _PROGRESS,
    "The history of another run in '{}' was renamed to '{}'.": "nothing is lost",
    "The states of another run in '{}' were moved to '{}'.": "asked for by if_other_run",
    "'{}' has no averages, so {} starts from the weights in it.": _RESUMED,
    "'{}' has no weights of {}, which stay unchanged.": _RESUMED,
    "The data has changed from {} to {}.": _RESUMED,
    "The run resumes on {} instead of {}, at the next sample.": _RESUMED,
    "The run continues with {} instead of {} {}.": _RESUMED,
    "samples per process and step": _RESUMED,
    "steps per update": _RESUMED,
    "updates in all{}": _RESUMED,
    " (the saved scheduler keeps its own plan)": _RESUMED,
    "Versions have changed, so the last bits may differ: {}.": _RESUMED,
    "The state of the scheduler is dropped, since this run has none.": _RESUMED,
    "The state of {} is dropped, since this run has no such callbacks.": _RESUMED,
    "The callbacks {} start from scratch, since the training state has nothing for them.": _RESUMED,
    "Reading and skipping {} of {}, on which the run has trained already.": "data without a position is read again",
    "Up to {} of {} may come twice, since workers read whole batches.": "data without a position is read again",
    "Random numbers that {} draws while it is read will differ.": "data without a position is read again",
    "Each process reads its own shard (data_is_sharded=True), but {} processes": _RESUMED,
    "The resumed run equals an uninterrupted one only up to rounding, since {}:": "the user has asked DDP for it",
    "'{}' has no digest, so its content cannot be checked.": _OLD,
    "'{}' has no digests, so only the sizes of its files were compared.": _OLD,
    "'{}' was saved by an older version, without digests, so its files cannot be checked.": _OLD,
    "'{}' was saved by a version that left out {}, which stay unchanged.": _OLD,
    "'{}' is skipped: it {}.": _PASSED,
    "'{}/{}' is skipped: it {}.": _PASSED,
    "'{}' is damaged, and was renamed to '{}'.": _PASSED,
    "'{}/{}' {}. No run will resume from it.": _PASSED,
    "'{}' could not be removed: {}": _STORE,
    "'{}' does not allow removing files, so old states stay there.": _STORE,
    "'{}' is not copied to the mirror, since newer states were saved.": _STORE,
    "'{}' was copied to the mirror '{}'.": _STORE,
    "The mirror '{}' could not be written ({}: {}). Training continues, and accel tries again.": _STORE,
    "Waiting for the mirror '{}', at most {} seconds.": _STORE,
    "Waiting for another process that downloads a state into '{}'.": _STORE,
    "Downloading '{}/{}' to '{}'.": _STORE,
}
"""What names no way out, and why there is none."""


# ---------------------------------------------------------------------- the tests


def test_every_warning_and_notice_is_known() -> None:
    rows = [*(row.text for row in (*ROWS, *LENGTHY)), *ON_PROCESSES]
    check_every_notice_is_known(ELSEWHERE, PIECES, rows, FACTS)


# Torch speaks of shapes too. PEFT asks transformers for an attribute by its former name.
@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize(
    "row", [*ROWS, *(pytest.param(row, marks=pytest.mark.seconds) for row in LENGTHY)], ids=name_of
)
def test_what_a_warning_or_a_notice_says_works(row: Row) -> None:
    hear_mistake_and_ways_out(row)


@pytest.mark.slow
@pytest.mark.parametrize("text", ON_PROCESSES)
def test_what_a_warning_on_two_processes_says_works(outcome: Any, text: str) -> None:
    check_heard(text, outcome.of(text)[0])


if __name__ == "__main__":
    run_as_script(CASES)
