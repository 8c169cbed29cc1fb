"""Under DDP the word of an update travels with its gradients: no message of its own, and nothing else changes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn

from accel_core import Trainer, TrainerCallback
from case_runner import Outcome, run_as_script
from tiny import tiny_data

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mean over samples": lambda outputs, targets: nn.functional.mse_loss(outputs[:, 0], targets.double()),
    "cross entropy": nn.CrossEntropyLoss(),
}


def create_trainer(
    *callbacks: TrainerCallback, loss: str = "cross entropy", kind: Any = Trainer, **ddp: Any
) -> Any:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(**ddp)]) if ddp else None
    return kind(model, LOSSES[loss], optimizer, callbacks, accelerator=accelerator, seed=5)


def weights_of(trainer: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


class CountMessages(TrainerCallback):
    """Counts the collectives that Python asks for, from the end of each update to the end of the next."""

    names = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "all_gather_into_tensor")

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.calls = 0
        self.per_update: list[int] = []
        self.originals = {name: getattr(dist, name) for name in self.names}
        for name, original in self.originals.items():
            setattr(dist, name, partial(self.count, original))

    def count(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return original(*args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        self.calls = 0

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.per_update.append(self.calls)
        self.calls = 0

    def on_run_close(self, trainer: Trainer) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def count_messages(batch_size: int, loss: str) -> Any:
    counter = CountMessages()
    trainer = create_trainer(counter, loss=loss)
    # 48 samples divide into full batches on two and three processes.
    trainer.train(tiny_data(48), 2, per_device_batch_size=batch_size, gradient_accumulation_steps=2)
    return {"calls": counter.per_update, "weights": weights_of(trainer)}


class Flag(TrainerCallback):
    """Flags a value of its own at an update, and notes what is agreed after each."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        trainer.agreement.register("own")
        self.read: list[dict[str, int]] = []

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.read.append(dict(trainer.agreement.agreed))
        if trainer.run_progress.updates_completed == 2:
            trainer.agreement.flag("own", 5 + trainer.data_group.index)


def flag_values(batch_size: int) -> Any:
    flag = Flag()
    create_trainer(flag).train(tiny_data(48), 1, per_device_batch_size=batch_size)
    return flag.read


class StopAtThird(TrainerCallback):
    """The last process asks to stop while the third update goes on."""

    def on_train_step_start(self, trainer: Trainer, batch: Any) -> None:
        group = trainer.data_group
        if trainer.run_progress.updates_completed == 2 and group.index == group.size - 1:
            trainer.request_stop("enough")


class LookAround(TrainerCallback):
    """Notes what the model has inside a run, and whether a word is carried."""

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        word = trainer.engine.word
        self.is_carried = word is not None and word.is_carried
        inner = trainer.get_model()
        self.names = [*inner.state_dict(), *(name for name, _ in trainer.model.named_parameters())]


def stop_with(batch_size: int, steps: int = 1, **ddp: Any) -> Any:
    look = LookAround()
    trainer = create_trainer(StopAtThird(), look, **ddp)
    trainer.train(
        tiny_data(48), 1, per_device_batch_size=batch_size // steps, gradient_accumulation_steps=steps
    )
    return {
        "updates": trainer.run_progress.updates_completed,
        "reason": trainer.stop_reason,
        "is_carried": look.is_carried,
        "names": look.names,
    }


class FreezeAndThaw(TrainerCallback):
    """Freezes the first layer for the first epoch."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.set(trainer, False)

    def on_train_epoch_end(self, trainer: Trainer) -> None:
        self.set(trainer, True)

    def set(self, trainer: Trainer, trains: bool) -> None:
        for parameter in trainer.get_model()[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(trains)


def thaw(batch_size: int) -> Any:
    counter, look = CountMessages(), LookAround()
    trainer = create_trainer(FreezeAndThaw(), counter, look)
    trainer.train(tiny_data(48), 3, per_device_batch_size=batch_size)
    return {"weights": weights_of(trainer), "is_carried": look.is_carried, "calls": counter.per_update[-2:]}


class TwoForwards(Trainer):
    """The loss of a step needs two passes through the model."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        inputs, targets = batch
        first, second = self.model(inputs), self.model(inputs * 0.5)
        loss = self.loss_func(first, targets) + self.loss_func(second, targets)  # type: ignore[misc]
        return {"loss": loss, "model_outputs": first, "batch_size": len(inputs)}


class AddAdversary(TrainerCallback):
    """Adds the gradients of disturbed samples, as adversarial training does: a second backward pass."""

    def on_train_step_end(self, trainer: Trainer, batch: Any, **event: Any) -> None:
        inputs, targets = batch
        trainer.loss_func(trainer.model(inputs + 0.1), targets).backward()  # type: ignore[misc]


def train_otherwise(batch_size: int, how: str) -> Any:
    callbacks = [AddAdversary()] if how == "another backward" else []
    kind = TwoForwards if how == "two forwards" else Trainer
    trainer = create_trainer(*callbacks, kind=kind, loss="mean over samples")
    trainer.train(tiny_data(48), 2, per_device_batch_size=batch_size)
    return weights_of(trainer)


def train_twice(batch_size: int) -> Any:
    trainer = create_trainer(StopAtThird())
    updates = []
    for _ in range(2):
        trainer.train(tiny_data(48), 1, per_device_batch_size=batch_size)
        updates.append(trainer.run_progress.updates_completed)
    own = trainer.model
    own(torch.ones(1, 5, dtype=torch.float64)).sum().backward()  # Outside of a run it is a plain model.
    return {"updates": updates, "names": list(own.state_dict())}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "views of buckets": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "compressed": {"comm_hook": DDPCommunicationHookType.FP16},
}
CARRIED = ("plain", "views of buckets")
CASES = {
    **{f"messages, {loss}": partial(count_messages, loss=loss) for loss in LOSSES},
    "values": flag_values,
    **{f"stop, {name}": partial(stop_with, **ddp) for name, ddp in OPTIONS.items()},
    "stop, accumulation": partial(stop_with, steps=2),
    "thaw": thaw,
    "two forwards": partial(train_otherwise, how="two forwards"),
    "another backward": partial(train_otherwise, how="another backward"),
    "twice": train_twice,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_update_sends_nothing_but_gradients(outcome: Outcome, loss: str) -> None:
    for result in outcome.of(f"messages, {loss}"):
        # The first update compares the weights, and finds out whether batches differ from the plan.
        assert sum(result["calls"][1:]) == 0
        assert len(result["calls"]) > 2
        torch.testing.assert_close(result["weights"], outcome.alone(f"messages, {loss}")["weights"])


def test_values_that_are_flagged_follow_the_word(outcome: Outcome) -> None:
    for read in outcome.of("values"):
        assert [position for position, agreed in enumerate(read) if agreed] == [2]
        assert read[2] == {"own": 4 + outcome.processes}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stop_holds_at_the_same_update_with_each_option_of_ddp(outcome: Outcome, name: str) -> None:
    for result in outcome.of(f"stop, {name}"):
        assert result["is_carried"] == (name in CARRIED)
        assert (result["updates"], result["reason"]) == (3 if name in CARRIED else 4, "enough")
        assert not any("word" in each for each in result["names"])


def test_a_stop_asked_for_before_the_last_step_of_an_update_holds_after_it(outcome: Outcome) -> None:
    for result in outcome.of("stop, accumulation"):
        assert (result["updates"], result["is_carried"]) == (3, True)


def test_the_word_goes_on_with_the_wrapper_of_unfrozen_parameters(outcome: Outcome) -> None:
    for result in outcome.of("thaw"):
        assert result["is_carried"] and result["calls"] == [0, 0]
        torch.testing.assert_close(result["weights"], outcome.alone("thaw")["weights"])


@pytest.mark.parametrize("how", ["two forwards", "another backward"])
def test_no_backward_pass_waits_for_the_word(outcome: Outcome, how: str) -> None:
    first, *others = outcome.of(how)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    torch.testing.assert_close(first, outcome.alone(how))


def test_a_second_run_uses_the_wrapper_again_and_the_model_stays_plain(outcome: Outcome) -> None:
    for result in outcome.of("twice"):
        assert result == {"updates": [3, 3], "names": ["0.weight", "0.bias", "2.weight", "2.bias"]}


if __name__ == "__main__":
    run_as_script(CASES)
