"""An update counts tokens: it is that of the one big batch, and that of transformers' own trainer."""

from typing import Any

import pytest
import torch
import transformers

from accel_core import TrainerCallback
from accel_integrations.transformers_adapter import TransformersTrainer
from tiny_transformers import collate, create_model, create_samples, state_of

KINDS = ["causal", "gpt2", "seq2seq", "masked", "tokens", "classes"]


def train(
    kind: str, batch_size: int, accumulation: int = 1, **kwargs: Any
) -> tuple[TransformersTrainer, torch.Tensor]:
    """Two epochs over 13 samples of different lengths; the second update of each is of a single sample."""
    model = create_model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = TransformersTrainer(model, optimizer=optimizer, callbacks=(), seed=1)
    samples = create_samples(kind)
    trainer.train(
        samples,
        2,
        samples,
        batch_size,
        gradient_accumulation_steps=accumulation,
        collate_fn=collate,
        **kwargs,
    )
    return trainer, state_of(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 4), (1, 12)])
def test_weights_after_accumulation_equal_those_of_the_big_batch(
    kind: str, batch_size: int, accumulation: int
) -> None:
    trainer, weights = train(kind, 12)
    accumulated, weights_accumulated = train(kind, batch_size, accumulation)
    assert trainer.run_progress.updates_completed == accumulated.run_progress.updates_completed == 4
    assert (weights - state_of(create_model(kind))).abs().max() > 0.1
    assert (weights - weights_accumulated).abs().max() < 1e-5
    for name in ("train_loss_epoch", "eval_loss_epoch"):
        values = trainer.run_history.get_metric_values(name)
        assert values == pytest.approx(accumulated.run_history.get_metric_values(name), abs=1e-5)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_loss_of_an_evaluation_is_the_mean_over_all_tokens(kind: str) -> None:
    model, samples = create_model(kind).eval(), create_samples(kind)
    with torch.no_grad():
        expected = float(model(**collate(samples)).loss)
    for batch_size in (1, 4, 13):
        trainer = TransformersTrainer(model, callbacks=())
        assert trainer.evaluate(samples, batch_size, collate_fn=collate)["evaluation_loss"] == pytest.approx(
            expected, abs=1e-5
        )


def test_a_batch_without_any_label_changes_nothing() -> None:
    """Of the two samples of this update only one has labels: the update is that of this sample alone."""
    samples = create_samples("causal", 2)
    samples[0]["labels"][:] = -100
    weights = []
    for data, accumulation in ((samples, 2), (samples[1:], 1)):
        model = create_model("causal")
        trainer = TransformersTrainer(
            model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), callbacks=(), seed=1
        )
        history = trainer.train(
            data, 1, None, 1, gradient_accumulation_steps=accumulation, collate_fn=collate
        )
        weights.append(state_of(model))
        assert torch.isfinite(torch.tensor(history.get_latest_metric("train_loss_epoch")))
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def test_padding_and_its_length_do_not_change_an_update() -> None:
    def collate_longer(samples: list[Any]) -> dict[str, torch.Tensor]:
        fillers = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = collate(samples)
        return {
            name: torch.nn.functional.pad(tensor, (0, 5), value=fillers[name])
            for name, tensor in batch.items()
        }

    weights = []
    for collate_fn in (collate, collate_longer):
        model = create_model("causal")
        trainer = TransformersTrainer(
            model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), callbacks=(), seed=1
        )
        trainer.train(
            create_samples("causal"), 1, None, 3, gradient_accumulation_steps=2, collate_fn=collate_fn
        )
        weights.append(state_of(model))
    assert (weights[0] - weights[1]).abs().max() < 1e-5


def test_the_labels_that_count_are_those_that_the_loss_of_the_model_is_the_mean_of() -> None:
    """Counted against the gradient of the loss: a token that counts pulls on its logits."""
    for kind in KINDS[:-1]:
        model, batch = create_model(kind), collate(create_samples(kind))
        trainer = TransformersTrainer(model, callbacks=())
        outputs = model(**batch)
        gradient = torch.autograd.grad(outputs.loss, outputs.logits)[0]
        assert trainer.count_labels(batch) == gradient.abs().sum(-1).count_nonzero()
    classifier = TransformersTrainer(create_model("classes"), callbacks=())
    assert classifier.count_labels(collate(create_samples("classes"))) is None


class GradientsOfAccel(TrainerCallback):
    """The gradients of each update, and the loss of each of its steps."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_optimizer_step_start(self, trainer: Any) -> None:
        self.gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        )


class GradientsOfTransformers(transformers.TrainerCallback):
    """The gradients of each update."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in kwargs["model"].parameters()])
        )


@pytest.mark.seconds
@pytest.mark.parametrize("kind", ["causal", "seq2seq", "tokens", "classes"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_and_gradients_equal_those_of_the_trainer_of_transformers(
    kind: str, accumulation: int, tmp_path: Any
) -> None:
    samples = create_samples(kind, 12)
    theirs, own = GradientsOfTransformers(), GradientsOfAccel()
    # T5 and BERT take the number of items of an update and do not use it, so that their trainer adds up the
    # means of its steps: gradients are too large by the number of steps. What is right is then their update
    # of the same samples in one step.
    in_one_step = kind != "causal"
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=2 * accumulation if in_one_step else 2,
        gradient_accumulation_steps=1 if in_one_step else accumulation,
        train_sampling_strategy="sequential",
        learning_rate=0.2,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    other_model = create_model(kind)
    other = transformers.Trainer(
        other_model, arguments, data_collator=collate, train_dataset=samples, callbacks=[theirs]
    )
    other.train()

    model = create_model(kind)
    losses: list[float] = []

    class WithLosses(TransformersTrainer):
        def run_update(self, group: Any) -> None:
            losses.append(float(self.train_loss.average))
            self.train_loss.reset()
            super().run_update(group)

    trainer = WithLosses(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=0.2), callbacks=[own], seed=1
    )
    in_order = {"shuffle": False}
    trainer.train(
        samples,
        2,
        None,
        2,
        gradient_accumulation_steps=accumulation,
        collate_fn=collate,
        train_dataloader_kwargs=in_order,
    )
    assert len(own.gradients) == len(theirs.gradients) == 12 // accumulation
    for mine, others in zip(own.gradients, theirs.gradients, strict=True):
        assert torch.allclose(mine, others, rtol=1e-4, atol=1e-6)
    logged = [entry["loss"] for entry in other.state.log_history if "loss" in entry]
    assert losses == pytest.approx(logged, abs=2e-4)
    assert (state_of(model) - state_of(other_model)).abs().max() < 1e-5
