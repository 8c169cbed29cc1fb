"""Further optimizers and their schedulers among the attributes of a trainer: stepped, averaged, saved and restored.

The references are loops written by hand. The file is its own script: see case_runner.
"""

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.engines.deepspeed import DeepSpeed
from accel_core.processes.group import DataGroup
from accel_core.state import files
from case_runner import run_as_script, shared_folder

NUM_SAMPLES, NOISE_SIZE, SIZE, CRITIC_STEPS = 37, 3, 4, 5
ADAM = functools.partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.9))


def data():
    """Real samples, with the noise and the mixing that a script would draw: equal however many processes share them."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(NUM_SAMPLES, SIZE, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(NUM_SAMPLES, NOISE_SIZE, generator=generator, dtype=torch.float64)
    mixing = torch.rand(NUM_SAMPLES, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(real, noise, mixing)


def networks():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(NOISE_SIZE, 6), nn.Tanh(), nn.Linear(6, SIZE)).double()
        critic = nn.Sequential(nn.Linear(SIZE, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    return generator, critic


def loss_of_discriminator(discriminator, real, fake):
    return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()


def loss_of_generator(discriminator, fake):
    return F.softplus(-discriminator(fake)).mean()


def loss_of_critic(critic, real, fake, mixing):
    mixed = (mixing * real + (1 - mixing) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return critic(fake).mean() - critic(real).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()


class AdversarialTrainer(Trainer):
    def __init__(self, create_scheduler=None, **kwargs):
        generator, critic = networks()
        super().__init__(
            generator,
            None,
            ADAM(generator.parameters()),
            callbacks=kwargs.pop("callbacks", []),
            seed=0,
            **kwargs,
        )
        self.critic = critic
        self.critic_optimizer = ADAM(critic.parameters())
        self.critic_scheduler = create_scheduler and create_scheduler(self.critic_optimizer)

    def calculate_train_batch_loss(self, batch):
        real, noise, mixing = batch
        fake = self.model(noise)
        self.update_critic(real, fake.detach(), mixing)
        return {"loss": loss_of_generator(self.critic, fake), "model_outputs": fake, "batch_size": len(real)}

    def update_critic(self, real, fake, mixing):
        loss_of_discriminator(self.critic, real, fake).backward()
        self.step_optimizer(self.critic_optimizer)


class BareSteps(AdversarialTrainer):
    def update_critic(self, real, fake, mixing):
        self.critic_optimizer.zero_grad()
        loss_of_discriminator(self.critic, real, fake).backward()
        self.critic_optimizer.step()
        if self.critic_scheduler:
            self.critic_scheduler.step()


class Wasserstein(AdversarialTrainer):
    def update_critic(self, real, fake, mixing):
        for _ in range(CRITIC_STEPS):
            self.backward_step(loss_of_critic(self.critic, real, fake, mixing))
            self.step_optimizer(self.critic_optimizer, gradient_clip_norm=0.5, gradient_clip_value=0.3)

    def calculate_train_batch_loss(self, batch):
        output = super().calculate_train_batch_loss(batch)
        return {**output, "loss": -self.critic(output["model_outputs"]).mean()}


class Prepared(AdversarialTrainer):
    """As it had to be done before: everything by hand."""

    def prepare(self):
        super().prepare()
        self.critic, self.critic_optimizer = self.accelerator.prepare(self.critic, self.critic_optimizer)

    def calculate_train_batch_loss(self, batch):
        real, noise, _ = batch
        fake = self.model(noise)
        self.critic_optimizer.zero_grad()
        real_and_fake = self.critic(torch.cat([real, fake.detach()])).chunk(2)
        loss = F.softplus(-real_and_fake[0]).mean() + F.softplus(real_and_fake[1]).mean()
        self.accelerator.backward(loss)
        self.critic_optimizer.step()
        critic = self.accelerator.unwrap_model(self.critic)
        return {"loss": loss_of_generator(critic, fake), "model_outputs": fake, "batch_size": len(real)}

    def state_dict(self):
        critic = self.accelerator.unwrap_model(self.critic)
        return {"critic": critic.state_dict(), "optimizer": self.critic_optimizer.state_dict()}

    def load_state_dict(self, state):
        self.accelerator.unwrap_model(self.critic).load_state_dict(state["critic"])
        self.critic_optimizer.load_state_dict(state["optimizer"])


DECAY = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7)


def by_hand(batch_size, is_wasserstein=False, accumulation=1, decay=False, num_epochs=2):
    generator, critic = networks()
    optimizer, critic_optimizer = ADAM(generator.parameters()), ADAM(critic.parameters())
    scheduler = DECAY(critic_optimizer) if decay else None
    dataset = data()
    for _ in range(num_epochs):
        for first in range(0, NUM_SAMPLES, batch_size * accumulation):
            update = range(first, min(first + batch_size * accumulation, NUM_SAMPLES))
            for start in range(first, update.stop, batch_size):
                real, noise, mixing = dataset[start : min(start + batch_size, update.stop)]
                fake = generator(noise)
                for _ in range(CRITIC_STEPS if is_wasserstein else 1):
                    critic_optimizer.zero_grad()
                    if is_wasserstein:
                        loss_of_critic(critic, real, fake.detach(), mixing).backward()
                        nn.utils.clip_grad_value_(critic.parameters(), 0.3)
                        nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
                    else:
                        loss_of_discriminator(critic, real, fake.detach()).backward()
                    critic_optimizer.step()
                    if scheduler:
                        scheduler.step()
                loss = -critic(fake).mean() if is_wasserstein else loss_of_generator(critic, fake)
                (loss * len(real) / len(update)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return flat(generator, critic)


def flat(*modules):
    return torch.cat(
        [each.detach().reshape(-1) for module in modules for each in module.parameters()]
    ).clone()


def weights_of(trainer):
    return flat(trainer.get_model(), trainer.accelerator.unwrap_model(trainer.critic))


def train(trainer, batch_size, **kwargs):
    arguments = {"num_epochs": 2, "train_dataloader_kwargs": {"shuffle": False}, **kwargs}
    trainer.train(data(), per_device_batch_size=batch_size, **arguments)
    return weights_of(trainer)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("kind", "is_wasserstein", "scheduler"),
    [
        (AdversarialTrainer, False, None),
        (AdversarialTrainer, False, DECAY),
        (BareSteps, False, None),
        (BareSteps, False, DECAY),
        (Prepared, False, None),
        (Wasserstein, True, None),
        (Wasserstein, True, DECAY),
    ],
)
def test_a_second_optimizer_trains_as_in_the_loop_by_hand(kind, is_wasserstein, scheduler, accumulation):
    trained = train(kind(scheduler), 8, gradient_accumulation_steps=accumulation)
    expected = by_hand(8, is_wasserstein, accumulation, scheduler is not None)
    assert torch.allclose(trained, expected, rtol=1e-9, atol=1e-11)


class SaveAt(TrainerCallback):
    def __init__(self, update, folder):
        self.update, self.folder = update, folder

    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == self.update:
            trainer.save_training_state(self.folder)


def is_resumed_to_the_bit(kind, folder, batch_size):
    undisturbed = train(kind(DECAY, callbacks=[SaveAt(3, folder)]), batch_size)
    resumed = kind(DECAY)
    return torch.equal(train(resumed, batch_size, resume_from=folder), undisturbed)


@pytest.mark.parametrize("kind", [AdversarialTrainer, BareSteps, Wasserstein, Prepared])
def test_a_second_optimizer_and_its_scheduler_are_resumed_to_the_bit(kind, tmp_path):
    if kind is Prepared:
        kind = type(
            "WithoutScheduler",
            (Prepared,),
            {"__init__": lambda self, decay, **kwargs: Prepared.__init__(self, **kwargs)},
        )
    assert is_resumed_to_the_bit(kind, tmp_path / "state", 8)


def test_a_state_names_what_it_holds_of_the_attributes(tmp_path):
    train(AdversarialTrainer(DECAY, callbacks=[SaveAt(3, tmp_path / "state")]), 8)
    content = files.read_object(tmp_path / "state" / "attributes.pt", dict)
    names = {kind: list(named) for kind, named in content.items()}
    assert names == {
        "modules": ["critic"],
        "optimizers": ["critic_optimizer"],
        "schedulers": ["critic_scheduler"],
    }


def without_scheduler(**kwargs):
    return AdversarialTrainer(None, **kwargs)


def with_scheduler(**kwargs):
    return AdversarialTrainer(DECAY, **kwargs)


@pytest.mark.parametrize(
    ("saved", "resumed"), [(with_scheduler, without_scheduler), (without_scheduler, with_scheduler)]
)
def test_a_state_that_names_other_attributes_is_refused_by_name(saved, resumed, tmp_path):
    train(saved(callbacks=[SaveAt(3, tmp_path / "state")]), 8)
    trainer = resumed()
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match="critic_scheduler"):
        train(trainer, 8, resume_from=tmp_path / "state")
    assert torch.equal(weights_of(trainer), before)


def test_another_class_of_optimizer_is_refused_and_leaves_everything_as_it_was(tmp_path):
    train(AdversarialTrainer(callbacks=[SaveAt(3, tmp_path / "state")]), 8)
    trainer = AdversarialTrainer()
    trainer.critic_optimizer = torch.optim.SGD(trainer.critic.parameters(), lr=0.1, momentum=0.9)
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match="SGD"):
        train(trainer, 8, resume_from=tmp_path / "state")
    assert torch.equal(weights_of(trainer), before)


def test_what_is_made_at_the_start_of_the_run_is_resumed_too(tmp_path):
    class Late(AdversarialTrainer):
        def training_run_start(self):
            self.critic_optimizer = ADAM(self.critic.parameters())
            self.critic_scheduler = DECAY(self.critic_optimizer)

    assert is_resumed_to_the_bit(Late, tmp_path / "state", 8)


def test_an_export_holds_the_second_network_and_what_was_asked_for_of_its_optimizer(tmp_path):
    trainer = AdversarialTrainer(DECAY)
    trained = train(trainer, 8)
    trainer.save_checkpoint(tmp_path / "all.pt")
    trainer.save_checkpoint(tmp_path / "weights.pt", save_optimizer=False, save_scheduler=False)
    assert "optimizers_state_dict" not in torch.load(tmp_path / "weights.pt")
    for name in ("all.pt", "weights.pt"):
        loaded = AdversarialTrainer(DECAY)
        loaded.load_checkpoint(tmp_path / name)
        assert torch.equal(weights_of(loaded), trained)
        assert bool(loaded.critic_optimizer.state) == (name == "all.pt")


def test_the_attributes_stay_the_users_objects():
    trainer = AdversarialTrainer()
    critic, optimizer = trainer.critic, trainer.critic_optimizer
    train(trainer, 8)
    assert trainer.critic is critic and trainer.critic_optimizer is optimizer
    assert not optimizer._optimizer_step_pre_hooks
    copy.deepcopy(optimizer)


# ---------------------------------------------------------------------- two optimizers for one model and one
# loss


class Halves(Trainer):
    """One half of the model by Adam, the other by SGD, as some train matrices and vectors by different rules."""

    def __init__(self, clip=None, **kwargs):
        model = networks()[0]
        super().__init__(model, F.mse_loss, ADAM(model[0].parameters()), callbacks=[], seed=0, **kwargs)
        self.other = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
        self.clip = clip

    def optimizer_step(self):
        super().optimizer_step()
        self.step_optimizer(self.other, gradient_clip_norm=self.clip)


class BareHalves(Halves):
    def optimizer_step(self):
        super().optimizer_step()
        self.other.step()


def halves_data():
    real, noise, _ = data().tensors
    return TensorDataset(noise, real)


def train_halves(batch_size, kind=Halves, clip=None, accumulation=2):
    trainer = kind(clip)
    arguments = {"num_epochs": 2, "train_dataloader_kwargs": {"shuffle": False}, "gradient_clip_norm": clip}
    trainer.train(
        halves_data(), per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation, **arguments
    )
    return flat(trainer.get_model())


@pytest.mark.parametrize(("kind", "clip"), [(Halves, None), (Halves, 0.2), (BareHalves, None)])
def test_two_optimizers_for_one_loss_equal_the_loop_by_hand(kind, clip):
    model = networks()[0]
    optimizer, other = (
        ADAM(model[0].parameters()),
        torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
    )
    inputs, targets = halves_data().tensors
    for first in [*range(0, NUM_SAMPLES, 8)] * 2:
        batch = slice(first, first + 8)
        F.mse_loss(model(inputs[batch]), targets[batch]).backward()
        for each, part in ((optimizer, model[0]), (other, model[2])):
            if clip:
                nn.utils.clip_grad_norm_(part.parameters(), clip)
            each.step()
            each.zero_grad()
    assert torch.allclose(train_halves(4, kind, clip), flat(model), rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------------- float16, errors


class Scaled(AdversarialTrainer):
    """With a float16 scaler; the gradients of the critic overflow in the steps that are named."""

    overflowing = ()
    step = 0

    def create_accelerator(self):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        return accelerator

    def update_critic(self, real, fake, mixing):
        loss = loss_of_discriminator(self.critic, real, fake)
        self.backward_step(loss * float("inf") if self.step in self.overflowing else loss)
        self.step_optimizer(self.critic_optimizer, gradient_clip_norm=0.5)
        self.step += 1


class ScaledByHand(AdversarialTrainer):
    def update_critic(self, real, fake, mixing):
        loss_of_discriminator(self.critic, real, fake).backward()
        self.step_optimizer(self.critic_optimizer, gradient_clip_norm=0.5)


def test_gradients_of_float16_are_unscaled_before_they_are_clipped():
    scaled, plain = (train(kind(), 8, gradient_accumulation_steps=2) for kind in (Scaled, ScaledByHand))
    assert torch.allclose(scaled, plain, rtol=1e-9, atol=1e-11)


def test_a_step_whose_float16_gradients_overflow_is_left_out_and_lowers_the_scale_after_the_update():
    trainer = Scaled(DECAY)
    trainer.overflowing = (1,)
    before = []

    class Watch(TrainerCallback):
        def on_train_step_end(self, trainer, batch, batch_output, step):
            before.append((trainer.accelerator.scaler.get_scale(), trainer.critic_scheduler.last_epoch))

    trainer.callbacks.add_callback(Watch())
    train(trainer, 8, gradient_accumulation_steps=4, num_epochs=1)
    assert before == [(1024.0, 1), (1024.0, 1), (1024.0, 2), (1024.0, 3), (512.0, 4)]
    assert weights_of(trainer).isfinite().all()


def test_the_trainers_own_optimizer_and_one_that_is_no_attribute_are_refused():
    class Wrong(AdversarialTrainer):
        def update_critic(self, real, fake, mixing):
            optimizer = self.optimizer if self.wrong == "own" else ADAM(self.critic.parameters())
            self.step_optimizer(optimizer)

    trainer = Wrong()
    trainer.wrong = "own"
    with pytest.raises(ConfigurationError, match=r"trainer\.optimizer"):
        train(trainer, 8)
    trainer.wrong = "foreign"
    with pytest.raises(ConfigurationError, match="critic_optimizer"):
        train(trainer, 8)


@pytest.mark.parametrize(("name", "value"), [("gradient_clip_norm", 0), ("gradient_clip_value", -1.0)])
def test_a_limit_that_is_not_above_zero_is_refused(name, value):
    class Wrong(AdversarialTrainer):
        def update_critic(self, real, fake, mixing):
            self.step_optimizer(self.critic_optimizer, **{name: value})

    with pytest.raises(ConfigurationError, match=rf"{name} is {value}"):
        train(Wrong(), 8)


def test_outside_of_a_run_it_is_refused():
    trainer = AdversarialTrainer()
    with pytest.raises(ConfigurationError, match="step_optimizer was called outside of a run"):
        trainer.step_optimizer(trainer.critic_optimizer)


@pytest.mark.usefixtures("deepspeed_plugin")
def test_deepspeed_refuses_a_second_optimizer_by_name():
    trainer = AdversarialTrainer()
    trainer._engine = DeepSpeed(trainer.accelerator, DataGroup())
    with pytest.raises(ConfigurationError, match=r"trainer\.critic_optimizer .*DEEPSPEED"):
        train(trainer, 8)


# ---------------------------------------------------------------------- several processes


def adversarial(batch_size, kind=AdversarialTrainer, **kwargs):
    trainer = kind(DECAY)
    if not trainer.is_main_process:
        with torch.no_grad():
            # As if each process had drawn its own.
            trainer.critic[0].weight += 1.0
    return train(trainer, batch_size, **kwargs)


def resumed(kind, batch_size):
    return is_resumed_to_the_bit(kind, shared_folder() / "state", batch_size)


def bare_step_with_a_scaler(batch_size):
    class Bare(Scaled):
        def update_critic(self, real, fake, mixing):
            self.backward_step(loss_of_discriminator(self.critic, real, fake))
            self.critic_optimizer.step()

    try:
        train(Bare(), batch_size)
    except ConfigurationError as error:
        return str(error)
    return "nothing was raised"


CASES = {
    "step_optimizer": adversarial,
    "accumulated": functools.partial(adversarial, gradient_accumulation_steps=2),
    "bare steps": functools.partial(adversarial, kind=BareSteps),
    "wasserstein": functools.partial(adversarial, kind=Wasserstein),
    "scaled": functools.partial(adversarial, kind=Scaled),
    "halves": train_halves,
    "halves clipped": functools.partial(train_halves, clip=0.2),
    "bare halves": functools.partial(train_halves, kind=BareHalves),
    "resumed": functools.partial(resumed, AdversarialTrainer),
    "resumed bare": functools.partial(resumed, BareSteps),
    "resumed wasserstein": functools.partial(resumed, Wasserstein),
    "prepared": lambda batch_size: train(Prepared(), batch_size),
    "bare step with a scaler": bare_step_with_a_scaler,
}
COMPARED = [name for name in CASES if not name.startswith(("resumed", "prepared", "bare step with"))]


@pytest.mark.parametrize("case", COMPARED)
def test_a_second_optimizer_trains_on_several_processes_as_on_one(outcome, case):
    first, second = outcome.of(case)
    assert torch.equal(first, second)
    assert torch.allclose(first, outcome.alone(case), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", ["resumed", "resumed bare", "resumed wasserstein"])
def test_a_second_optimizer_is_resumed_on_several_processes_to_the_bit(outcome, case):
    assert outcome.of(case) == [True, True]


def test_what_the_user_prepares_is_left_to_the_user(outcome):
    first, second = outcome.of("prepared")
    assert torch.equal(first, second)


def test_a_bare_step_with_a_scaler_is_refused_on_several_processes(outcome):
    assert all(
        "step_optimizer(trainer.critic_optimizer)" in message
        for message in outcome.of("bare step with a scaler")
    )


if __name__ == "__main__":
    run_as_script(CASES)
