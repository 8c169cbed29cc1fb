"""Batches, losses, predictions and metrics of models of transformers in the trainer."""

import copy
import re
import subprocess
import sys
import textwrap
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback, SaveBestModelCallback
from accel_core import ConfigurationError, TrainerCallback
from accel_integrations.transformers_adapter import TransformersTrainer
from accel_integrations.transformers_adapter.model_facts import input_names, label_shift
from tiny_transformers import VOCABULARY, collate, create_model, create_samples, state_of


def create_trainer(kind: str, callbacks: Any = (), **kwargs: Any) -> TransformersTrainer:
    model = create_model(kind, **({"vocab_size": 30522} if "tokenizer" in kwargs else {}))
    return TransformersTrainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.5), callbacks, seed=1, **kwargs
    )


class Batches(TrainerCallback):
    """Keeps the batches and outputs of training."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.outputs: list[Any] = []

    def on_train_step_end(self, trainer: Any, batch: Any, batch_output: Any, step: int) -> None:
        self.batches.append(batch)
        self.outputs.append(batch_output)


class TestData:
    SENTENCES = ("a cat sat", "dogs", "the sun is out today", "no", "a long and winding road", "red wine")

    def encoded(self, tokenizer: Any) -> datasets.Dataset:
        """As one gets it by mapping a tokenizer over a data set of texts, which stay in it."""
        data = datasets.Dataset.from_dict(
            {"text": self.SENTENCES, "label": [0, 1, 2, 0, 1, 2], "number": range(6)}
        )
        return data.map(lambda rows: tokenizer(rows["text"]), batched=True)

    def test_a_list_of_mappings_of_tensors_is_a_data_set(self) -> None:
        seen = Batches()
        samples = [{"input_ids": torch.arange(1, 5) + n, "labels": torch.tensor(n % 3)} for n in range(7)]
        history = create_trainer("classes", [seen]).train(samples, 1, samples, 3)
        assert [len(batch["input_ids"]) for batch in seen.batches] == [3, 3, 1]
        assert set(history.get_metric_names()) == {"train_loss_epoch", "eval_loss_epoch"}

    def test_a_dataset_of_texts_and_tokens_is_padded_by_batch_where_there_is_a_tokenizer(
        self, tokenizer: Any
    ) -> None:
        seen = Batches()
        trainer = create_trainer("classes", [seen], tokenizer=tokenizer)
        trainer.train(
            self.encoded(tokenizer), 1, None, 2, train_dataloader_kwargs={"shuffle": False, "num_workers": 0}
        )
        assert [tuple(batch["input_ids"].shape) for batch in seen.batches] == [(2, 5), (2, 7), (2, 7)]
        assert [batch["labels"].tolist() for batch in seen.batches] == [[0, 1], [2, 0], [1, 2]]
        assert set(seen.batches[0]) == {"input_ids", "attention_mask", "token_type_ids", "labels"}

    def test_workers_read_a_dataset(self, tokenizer: Any) -> None:
        trainer = create_trainer("classes", tokenizer=tokenizer)
        losses = []
        for num_workers in (0, 1):
            loaded = trainer.evaluate(
                self.encoded(tokenizer), 2, dataloader_kwargs={"num_workers": num_workers}
            )
            losses.append(loaded["evaluation_loss"])
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("kind", ["tokens", "causal", "seq2seq"])
    def test_labels_of_tokens_are_padded_so_that_they_do_not_count(self, kind: str, tokenizer: Any) -> None:
        samples = create_samples(kind)
        own, other = (create_trainer(kind, tokenizer=tokenizer) for _ in range(2))
        results = [own.evaluate(samples, 5), other.evaluate(samples, 5, collate_fn=collate)]
        assert results[0]["evaluation_loss"] == pytest.approx(results[1]["evaluation_loss"], abs=1e-6)

    def test_a_tokenizer_without_a_padding_token_is_refused_before_training_unless_another_function_pads(
        self, tokenizer: Any
    ) -> None:
        rows = self.encoded(tokenizer).remove_columns(["text", "number"])
        padding = transformers.DataCollatorWithPadding(tokenizer)
        without = copy.deepcopy(tokenizer)
        without.pad_token = None
        trainer = create_trainer("classes", tokenizer=without)
        with pytest.raises(
            ConfigurationError, match=r"without a padding token.*tokenizer\.pad_token = .*collate_fn"
        ):
            trainer.train(rows, 1)
        trainer.train(rows, 1, train_dataloader_kwargs={"collate_fn": padding})
        assert trainer.run_progress.updates_completed == 1

    def test_any_collate_function_and_ready_loader_is_used_as_it_is(self, tokenizer: Any) -> None:
        rows = self.encoded(tokenizer).remove_columns(["text", "number"])
        padding = transformers.DataCollatorWithPadding(tokenizer, padding="max_length", max_length=12)
        trainer = create_trainer("classes", tokenizer=tokenizer)
        seen = Batches()
        trainer.callbacks.add_callback(seen)
        trainer.train(rows, 1, None, 3, collate_fn=padding)
        trainer.train(DataLoader(rows, 3, collate_fn=padding), 1)
        trainer.train(rows, 1, None, 3, train_dataloader_kwargs={"collate_fn": padding})
        assert {tuple(batch["input_ids"].shape) for batch in seen.batches} == {(3, 12)}
        assert len(seen.batches) == 6

    def test_what_the_model_does_not_take_stays_in_the_batch_for_callbacks(self) -> None:
        seen = Batches()
        samples = [{**sample, "number": number} for number, sample in enumerate(create_samples("classes"))]

        def with_numbers(samples: list[Any]) -> Any:
            return {**collate(samples), "number": [sample["number"] for sample in samples]}

        create_trainer("classes", [seen]).train(samples, 1, None, 5, collate_fn=with_numbers)
        assert sorted(number for batch in seen.batches for number in batch["number"]) == list(range(13))

    def test_samples_of_different_lengths_without_a_way_to_pad_are_reported(self) -> None:
        with pytest.raises(
            ConfigurationError, match=r"8 samples .*length.*pass tokenizer to TransformersTrainer.*collate_fn"
        ):
            create_trainer("classes").train(create_samples("classes"), 1)

    def test_data_that_is_no_mapping_is_reported(self) -> None:
        pairs = TensorDataset(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(
            ConfigurationError, match=r"sample is a tuple.*TransformersTrainer.*mappings.*collate_fn"
        ):
            create_trainer("classes").train(pairs, 1)
        with pytest.raises(
            ConfigurationError, match=r"batch is a list.*TransformersTrainer.*mapping.*collate_fn"
        ):
            create_trainer("classes").train(DataLoader(pairs, 2), 1)


class TestLoss:
    def test_a_model_that_returns_tuples_trains_alike(self) -> None:
        class OfTuples(transformers.GPT2LMHeadModel):
            def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> Any:
                return super().forward(input_ids, attention_mask=attention_mask, labels=labels).to_tuple()

        weights = []
        for kind in (transformers.GPT2LMHeadModel, OfTuples):
            trainer = create_trainer("gpt2")
            trainer.model.__class__ = kind
            trainer.train(
                create_samples("gpt2"), 1, None, 3, gradient_accumulation_steps=2, collate_fn=collate
            )
            weights.append(state_of(trainer.model))
        assert torch.equal(*weights)

    def test_a_batch_without_labels_is_reported(self) -> None:
        samples = [{"input_ids": torch.arange(1, 5)} for _ in range(4)]
        with pytest.raises(
            ConfigurationError, match=r"no loss .*\['input_ids'\].*Add 'labels' to the samples"
        ):
            create_trainer("classes").train(samples, 1)

    @pytest.mark.parametrize("kind", ["classes", "seq2seq"])
    def test_an_own_loss_function_gets_the_outputs_and_the_labels(self, kind: str) -> None:
        def own_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, -2), labels.flatten())

        weights = []
        for loss_func in (None, own_loss):
            model = create_model(kind)
            trainer = TransformersTrainer(
                model, loss_func, torch.optim.SGD(model.parameters(), lr=0.5), (), seed=1
            )
            trainer.train(create_samples(kind), 1, None, 3, gradient_accumulation_steps=2, collate_fn=collate)
            weights.append(state_of(model))
        assert (weights[0] - weights[1]).abs().max() < 1e-6

    def test_an_own_loss_function_without_labels_is_reported(self) -> None:
        trainer = TransformersTrainer(
            create_model("classes"), lambda outputs, labels: outputs.logits.sum(), callbacks=()
        )
        with pytest.raises(ConfigurationError, match="loss_func needs 'labels'"):
            trainer.evaluate([{"input_ids": torch.arange(1, 5)}])

    def test_gradient_checkpointing_gives_the_same_weights(self) -> None:
        weights = []
        for is_checkpointing in (False, True):
            trainer = create_trainer("causal")
            if is_checkpointing:
                trainer.model.activation_checkpointing_enable()
                assert trainer.model.is_activation_checkpointing
            trainer.train(
                create_samples("causal"), 1, None, 3, gradient_accumulation_steps=2, collate_fn=collate
            )
            weights.append(state_of(trainer.model))
        assert (weights[0] - weights[1]).abs().max() < 1e-6

    def test_a_model_that_is_no_transformer_may_take_everything(self) -> None:
        class Sum(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(()))

            def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
                return {"loss": (self.weight * inputs["a"] - inputs["b"]).square().mean()}

        model = Sum()
        trainer = TransformersTrainer(
            model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=()
        )
        samples = [{"a": torch.ones(()), "b": torch.full((), 3.0)} for _ in range(8)]
        trainer.train(samples, 20)
        assert model.weight.item() == pytest.approx(3.0, abs=0.05)


class TestEvaluation:
    def test_predictions_are_the_outputs_in_the_order_of_the_data(self) -> None:
        trainer, samples = create_trainer("classes"), create_samples("classes")
        outputs = trainer.predict(samples, 4, collate_fn=collate)
        assert type(outputs).__name__ == "SequenceClassifierOutput"
        with torch.no_grad():
            expected = trainer.model.eval()(**collate(samples))
        assert torch.allclose(outputs.logits, expected.logits, atol=1e-5)
        assert outputs.loss is None

    @pytest.mark.parametrize("kind", ["causal", "gpt2", "seq2seq", "tokens"])
    def test_predictions_of_different_lengths_are_filled_up_and_hold_no_caches(self, kind: str) -> None:
        trainer, samples = create_trainer(kind), create_samples(kind)
        outputs = trainer.predict(samples, 3, collate_fn=collate)
        batch = collate(samples[:3])
        with torch.no_grad():
            expected = trainer.model.eval()(**batch).logits
        length = expected.shape[1]
        assert torch.allclose(outputs.logits[:3, :length], expected, atol=1e-5)
        assert (outputs.logits[:3, length:] == -100).all()
        assert len(outputs.logits) == len(samples)
        assert outputs.get("past_key_values") is None

    def test_hidden_states_are_predicted_too(self) -> None:
        trainer = create_trainer("classes")
        trainer.model.config.output_hidden_states = True
        outputs = trainer.predict(create_samples("classes"), 4, collate_fn=collate)
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(13, 12, 16)] * 3

    def test_metrics_are_computed_without_an_update_function(self) -> None:
        samples = create_samples("classes")
        trainer = create_trainer(
            "classes", [MetricsCallback({"accuracy": MulticlassAccuracy(3, average="micro")})]
        )
        metrics = trainer.evaluate(samples, 4, collate_fn=collate)
        predicted = trainer.predict(samples, 4, collate_fn=collate).logits.argmax(-1)
        labels = torch.stack([sample["labels"] for sample in samples])
        assert metrics["evaluation_accuracy"] == pytest.approx((predicted == labels).float().mean().item())

    def test_the_best_model_is_in_the_model_at_the_end(self, tmp_path: Any) -> None:
        saver = SaveBestModelCallback(tmp_path / "best.pt", save_optimizer=False)
        trainer, samples = create_trainer("classes", [saver]), create_samples("classes")
        history = trainer.train(samples[:9], 6, samples[9:], 3, collate_fn=collate)
        losses = history.get_metric_values("eval_loss_epoch")
        assert min(losses) < losses[-1]
        assert trainer.evaluate(samples[9:], collate_fn=collate)["evaluation_loss"] == pytest.approx(
            min(losses), abs=1e-6
        )


class TestModelFacts:
    def test_the_losses_of_encoder_decoders_do_not_shift_labels(self) -> None:
        names = ("causal", "gpt2", "seq2seq", "masked", "tokens", "classes")
        assert [label_shift(create_model(name)) for name in names] == [1, 1, 0, 0, 0, None]

    def test_a_subclass_and_a_compiled_model_are_known_too(self) -> None:
        class OwnModel(transformers.GPT2LMHeadModel):
            pass

        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        )
        assert label_shift(OwnModel(config)) == 1
        compiled = torch.compile(create_model("causal"))
        assert label_shift(compiled) == 1
        assert "input_ids" in (input_names(compiled) or ())


def test_a_run_resumes_in_mid_epoch_to_the_same_weights(tmp_path: Any) -> None:
    samples = create_samples("causal")

    class Saving(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Any) -> None:
            if trainer.run_progress.updates_completed == 4:
                trainer.save_training_state(tmp_path / "state")

    straight, resumed = create_trainer("causal", [Saving()]), create_trainer("causal")
    straight.train(samples, 2, None, 2, gradient_accumulation_steps=2, collate_fn=collate)
    resumed.train(
        samples, 2, None, 2, gradient_accumulation_steps=2, collate_fn=collate, resume_from=tmp_path / "state"
    )
    assert torch.equal(state_of(straight.model), state_of(resumed.model))


def test_without_transformers_the_error_names_what_to_install() -> None:
    script = """
        import sys
        sys.modules["transformers"] = None
        import torch
        from accel_integrations.transformers_adapter import TransformersTrainer, transformers_scheduler_fn
        from accel_core import ConfigurationError
        for needs_it in (lambda: TransformersTrainer(torch.nn.Linear(1, 1)), lambda: transformers_scheduler_fn("cosine")):
            try:
                needs_it()
            except ConfigurationError as error:
                print(error)
    """
    source = textwrap.dedent(script)
    finished = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True
    )
    message = r"accel_integrations\.transformers_adapter .*'transformers'.*pip install \"accel-core\[transformers\]\"$"
    assert [bool(re.search(message, line)) for line in finished.stdout.splitlines()] == [True, True]
