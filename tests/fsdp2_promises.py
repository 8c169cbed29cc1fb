"""What FSDP2 and HSDP give beside what each layout promises: parts beside the model, averages, and what they refuse.

`tests/promises/test_layout_fsdp2.py` and `test_layout_hsdp.py` run the cases and have the tests.
"""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

import layout_limits
import sharding_promises
from accel_callbacks import ModelAverageCallback, ModelEmaCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.parts import local_shard
from accel_core.state import save_shards
from accel_core.state.files import read_object, read_tensors
from case_runner import assert_equal, shared_folder
from layout_promises import Layout
from tiny import SaveAt


def make_data(num_samples=37):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_trainer(callbacks=(), accelerator=None, lr=0.05, seed=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks, seed=7, accelerator=accelerator)


def run(trainer, batch_size, num_epochs=2, **kwargs):
    kwargs = {"eval_dataset": make_data(13), "gradient_clip_norm": 0.5, **kwargs}
    trainer.train(make_data(), num_epochs, per_device_batch_size=batch_size, **kwargs)
    return trainer


def outcome_of(trainer):
    path = shared_folder() / "model.safetensors"
    trainer.save_checkpoint(path)
    history = {f"{r['name']} {r['update']}": r["value"] for r in trainer.run_history.to_records()}
    return {"weights": read_tensors(path), "history": history}


def batch_of(batch_size):
    """The share of this process in batches of 24."""
    return 24 // Accelerator().num_processes


def checkpoint_activations(batch_size):
    """A run without and one with activation checkpointing, and what goes on from the state of the other."""
    plugin, folder = getattr(Accelerator().state, "fsdp_plugin", None), shared_folder()

    def train_one(checkpoints, callbacks=(), **kwargs):
        trainer = make_trainer(callbacks)
        first, *rest = trainer.model
        trainer.model = nn.Sequential(nn.Sequential(first, nn.Dropout(0.5)), *rest)
        if plugin is not None:
            plugin.activation_checkpointing = checkpoints
        result = outcome_of(run(trainer, batch_size, **kwargs))
        if plugin is not None:
            is_wrapped = any(
                "_checkpoint_wrapped_module" in name for name, _ in trainer.model.named_modules()
            )
            assert is_wrapped == checkpoints
            plugin.activation_checkpointing = False
        return result

    return [
        train_one(False, [SaveAt(3, folder / "plain")]),
        train_one(True, [SaveAt(3, folder / "checkpointed")]),
        train_one(False, resume_from=folder / "checkpointed"),
        train_one(True, resume_from=folder / "plain"),
    ]


def export_after_evaluation(batch_size):
    path = shared_folder() / "model.pt"
    run(make_trainer(), batch_size).save_checkpoint(path, save_optimizer=False)
    return sorted(torch.load(path, weights_only=True))


def average(create, batch_size):
    """Each process averages the parts that it holds; the average is evaluated, exported, saved and restored."""
    is_alone = Accelerator().num_processes == 1
    folder = shared_folder() if is_alone else Path(sys.argv[2])
    whole, rest = (create(folder) for _ in range(2))
    state = folder / f"with {whole.model_name}"
    first = run(make_trainer([whole, SaveAt(3, state)]), batch_of(batch_size), 3)
    exported = read_tensors(whole.save_path)
    second = run(make_trainer([rest], seed=4), batch_of(batch_size), 3, resume_from=state)
    # The main process has the whole averages.
    averages = [dict(callback.state_dict()[callback.model_name]) for callback in (whole, rest)]
    return outcome_of(first), averages[0], exported, outcome_of(second), averages[1]


def exponential(folder):
    return ModelEmaCallback(0.5, warmup=False, save_path=folder / "ema.safetensors")


def plain(folder):
    return ModelAverageCallback(start_update=1, save_path=folder / "mean.safetensors")


class Scaled(nn.Module):
    """A loss with a parameter, and a buffer that differs between processes."""

    def __init__(self, num_outputs=3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_outputs))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs, targets):
        if torch.is_grad_enabled():
            self.mean = outputs.detach().mean()
        return nn.functional.cross_entropy(outputs * self.scale, targets)


class Beside(Trainer):
    """A second model and a temperature are among the attributes, and trained by the one optimizer."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        outputs = (self.model(inputs) + self.second(inputs)) * self.temperature
        return {"loss": self.loss_func(outputs, targets), "model_outputs": outputs, "batch_size": len(inputs)}


def make_beside(callbacks=(), seed=3):
    # Each process draws its own: those of the main process count.
    torch.manual_seed(seed + Accelerator().process_index)
    second, temperature = nn.Linear(5, 3), nn.Parameter(torch.rand(()))
    torch.manual_seed(seed)
    model, loss_func = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), Scaled()
    groups = [
        {"params": [temperature, *model[0].parameters()]},
        {"params": loss_func.parameters(), "lr": 0.01},
        {"params": [*model[2].parameters(), *second.parameters()]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    trainer = Beside(model, loss_func, optimizer, callbacks, seed=7)
    trainer.second, trainer.temperature = second, temperature
    return trainer


def outcome_beside(trainer):
    path = shared_folder() / "model.pt"
    trainer.save_checkpoint(path, save_optimizer=False)
    content = torch.load(path, weights_only=True)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    sizes = [len(group["params"]) for group in trainer.optimizer.param_groups]
    modules = content["modules_state_dict"]
    # Of its own batch, which is another one on one process.
    means = [modules["loss_func"].pop("mean"), trainer.loss_func.mean] if "loss_func" in modules else []
    return {**outcome_of(trainer), "modules": modules, "groups": (rates, sizes)}, means


HALVED = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
IN_THREE_EPOCHS = {"create_scheduler_fn": HALVED, "num_epochs": 3}


def train_beside(batch_size):
    kwargs = {"gradient_accumulation_steps": 2, "create_scheduler_fn": HALVED}
    outcome, means = outcome_beside(run(make_beside(), batch_size, **kwargs))
    # Buffers beside the model are the main process's, as those of the model.
    assert torch.equal(*means)
    return outcome


def resume_beside(batch_size):
    folder = Path(sys.argv[2]) / "beside"
    whole = run(make_beside([SaveAt(4, folder)]), batch_of(batch_size), **IN_THREE_EPOCHS)
    rest = run(make_beside(seed=4), batch_of(batch_size), resume_from=folder, **IN_THREE_EPOCHS)
    assert kinds_beside(folder) == ["modules"]
    return outcome_beside(whole), outcome_beside(rest)


def resume_beside_of_older(batch_size):
    """Older versions wrote what the optimizer keeps of parameters beside the model among the attributes too."""
    folder = shared_folder() / "state"
    without_apart, save_shards.without_apart = save_shards.without_apart, dict
    try:
        run(make_beside([SaveAt(4, folder)]), batch_of(batch_size), **IN_THREE_EPOCHS)
    finally:
        save_shards.without_apart = without_apart
    assert kinds_beside(folder) == ["apart", "modules"]
    rest = run(make_beside(seed=4), batch_of(batch_size), resume_from=folder, **IN_THREE_EPOCHS)
    return outcome_beside(rest)


def kinds_beside(folder):
    return sorted(read_object(folder / "attributes.pt", dict))


def resume_beside_from_other(batch_size):
    if len(sys.argv) < 4:
        return None
    folder = Path(sys.argv[3]) / "beside"
    return outcome_beside(run(make_beside(seed=4), batch_of(0), resume_from=folder, **IN_THREE_EPOCHS))


class Adversarial(Trainer):
    """The second model has an optimizer of its own, which steps inside the step."""

    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        outputs = self.model(inputs)
        second_loss = nn.functional.cross_entropy(self.second(outputs.detach()), targets)
        second_loss.backward()
        self.step_optimizer(self.second_optimizer, gradient_clip_norm=1.0)
        loss = self.loss_func(outputs, targets) - 0.1 * self.second(outputs).logsumexp(1).mean()
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(inputs)}


def make_adversarial(callbacks=(), seed=3):
    trainer = make_trainer(callbacks, seed=seed)
    trainer.__class__ = Adversarial
    trainer.second = nn.Linear(3, 3)
    trainer.second_optimizer = torch.optim.Adam(trainer.second.parameters(), lr=0.02)
    return trainer


def train_two_models(batch_size):
    folder = shared_folder()
    whole = run(make_adversarial([SaveAt(3, folder / "state")]), batch_size)
    rest = run(make_adversarial(seed=4), batch_size, resume_from=folder / "state")
    return outcome_beside(whole), outcome_beside(rest)


def refuse_beside(batch_size):
    """Who holds what has been exchanged would keep its first value; torch mixes no parts with plain tensors."""

    def shared(trainer):
        trainer.loss_func = Scaled()
        trainer.loss_func.scale = trainer.model[2].bias

    def other_optimizer(trainer):
        trainer.second_optimizer = torch.optim.SGD(trainer.model[2].parameters(), lr=0.1)

    def attribute(trainer):
        trainer.bias = trainer.model[2].bias

    def fast(trainer):
        trainer.loss_func = Scaled()
        held = [*trainer.model.parameters(), *trainer.loss_func.parameters()]
        trainer.optimizer = torch.optim.SGD(held, lr=0.1, foreach=True)

    def half(trainer):
        trainer.loss_func = Scaled()
        held = [*trainer.model.parameters(), *trainer.loss_func.parameters()]
        trainer.optimizer = torch.optim.SGD(held, lr=0.1)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    told = {}
    for case in (shared, other_optimizer, attribute, fast, half):
        trainer = make_trainer()
        case(trainer)
        try:
            run(trainer, batch_size)
        except ConfigurationError as error:
            told[case.__name__] = str(error)
        trainer.accelerator.scaler = None
        assert trainer.run_progress.updates_completed == 0, case
    return told


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.last.weight = self.first.weight

    def forward(self, inputs):
        return self.last(self.middle(self.first(inputs)))


def refuse_tied(batch_size):
    trainer = make_trainer()
    trainer.model = Tied()
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
    try:
        run(trainer, batch_size)
    except ConfigurationError as error:
        assert trainer.run_progress.updates_completed == 0
        return str(error)
    return "trained"


class Parts(TrainerCallback):
    """How many values of the parameters, the gradients and the moments this process holds, and of how many."""

    def on_optimizer_step_start(self, trainer):
        self.held = [sum(local_shard(each).numel() for each in values) for values in self.values_of(trainer)]

    def values_of(self, trainer):
        parameters = list(trainer.model.parameters())
        states = [trainer.optimizer.state[each] for each in parameters]
        return parameters, [each.grad for each in parameters], [state["exp_avg"] for state in states if state]

    def on_training_run_end(self, trainer):
        self.whole = sum(each.numel() for each in trainer.model.parameters())


def hold_parts(batch_size):
    parts = Parts()
    run(make_trainer([parts]), batch_size)
    return parts.held, parts.whole


CASES = {
    "parts": hold_parts,
    "beside": train_beside,
    "beside resumed": resume_beside,
    "beside resumed from others": resume_beside_from_other,
    "beside resumed from an older state": resume_beside_of_older,
    "two models": train_two_models,
    "refused": refuse_beside,
    "checkpointed": checkpoint_activations,
    "average": partial(average, exponential),
    "plain average": partial(average, plain),
    "export after evaluation": export_after_evaluation,
    "tied": refuse_tied,
}


FSDP2 = Layout("FSDP2")
CASES_OF_FSDP2 = {
    **FSDP2.cases(is_first=True),
    **layout_limits.cases(FSDP2),
    **sharding_promises.CASES,
    **CASES,
}
"""Of one launch on two processes, from whose states HSDP goes on."""


class Fsdp2Promises:
    """What FSDP2 and HSDP have in common."""

    def test_each_process_of_a_copy_has_a_part_of_parameters_gradients_and_moments(self, layout, outcome):
        copies = {"FSDP2": 1, "HSDP": 2}[layout.name]
        held, wholes = zip(*outcome.of("parts"), strict=True)
        for values in zip(*held, strict=True):
            assert sum(values) == copies * wholes[0] and max(values) < wholes[0]

    def test_what_is_beside_the_model_equals_one_process(self, outcome):
        for result in outcome.of("beside"):
            assert_equal(result, outcome.alone("beside"))

    def test_activation_checkpointing_has_the_same_dropout_and_exchanges_states(self, outcome):
        for plain, *others in outcome.of("checkpointed"):
            for other in others:
                torch.testing.assert_close(other, plain, rtol=0, atol=0)

    def test_what_is_beside_the_model_is_resumed_to_the_bit(self, outcome):
        for whole, rest in outcome.of("beside resumed"):
            torch.testing.assert_close(rest, whole, rtol=0, atol=0)
            rates, sizes = whole[0]["groups"]
            assert rates[1] == pytest.approx(rates[0] / 5) and sizes == [3, 1, 4]

    def test_what_an_older_version_has_saved_beside_the_model_goes_on(self, outcome):
        for rest, (_, rest_of_new) in zip(
            outcome.of("beside resumed from an older state"), outcome.of("beside resumed"), strict=True
        ):
            torch.testing.assert_close(rest, rest_of_new, rtol=0, atol=0)

    def test_a_second_model_with_an_optimizer_of_its_own_equals_one_process_and_goes_on_to_the_bit(
        self, outcome
    ):
        for whole, rest in outcome.of("two models"):
            torch.testing.assert_close(rest, whole, rtol=0, atol=0)
            assert_equal(whole, outcome.alone("two models")[0])

    @pytest.mark.parametrize(
        ("case", "named", "way_out"),
        [
            ("shared", "trainer.loss_func holds", "read from trainer.model in each step"),
            ("other_optimizer", "trainer.second_optimizer holds", "trainer.optimizer alone"),
            ("attribute", "trainer.bias holds", "use DDP"),
            ("fast", "foreach=True", "Leave foreach out"),
            ("half", "trainer.loss_func is trained beside", "bf16"),
        ],
    )
    def test_what_would_not_be_trained_is_refused_before_the_first_update(
        self, outcome, case, named, way_out
    ):
        for told in outcome.of("refused"):
            assert named in told[case] and way_out in told[case]

    def test_an_export_after_an_evaluation_holds_the_model_alone(self, outcome):
        for keys in outcome.of("export after evaluation"):
            assert keys == outcome.alone("export after evaluation")

    @pytest.mark.parametrize("case", ["average", "plain average"])
    def test_averages_equal_those_of_one_process_and_go_on_to_the_bit(self, outcome, case):
        for first, averages, _, second, averages_of_rest in outcome.of(case):
            torch.testing.assert_close((second, averages_of_rest), (first, averages), rtol=0, atol=0)
        first, averages, exported, _, _ = outcome.of(case)[0]
        assert_equal((first, averages, exported), outcome.alone(case)[:3])

    def test_weights_that_layers_share_are_refused_under_a_policy_of_sizes(self, outcome):
        for told in outcome.of("tied"):
            assert "['first.weight', 'last.weight']" in told
            assert "'transformer_based_wrap'" in told
