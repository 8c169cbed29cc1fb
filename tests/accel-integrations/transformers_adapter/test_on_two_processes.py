"""Models of transformers on several processes: training, evaluation and predictions are those of one."""

import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    # On several processes torch.distributed is imported in parts by then, and PEFT's import of it uses a name
    # that goes.
    warnings.simplefilter("ignore")
    import peft
import transformers
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback
from accel_core import TrainerCallback
from accel_integrations.transformers_adapter import TransformersTrainer
from case_runner import run_as_script, shared_folder
from tiny_transformers import collate, create_model, create_samples, state_of

KINDS = ["causal", "seq2seq", "tokens", "classes"]
IGNORED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{IGNORED}:FutureWarning")


def train(
    batch_size: int, kind: str, model: Any = None, callbacks: Any = (), accumulation: int = 2, **kwargs: Any
) -> dict[str, Any]:
    """Two epochs over 29 samples: the last update of each has processes with fewer samples, or none."""
    model = create_model(kind) if model is None else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = TransformersTrainer(model, None, torch.optim.SGD(trained, lr=0.5), callbacks, seed=1)
    samples = create_samples(kind, 29)
    trainer.train(
        samples,
        2,
        samples[:7],
        batch_size,
        gradient_accumulation_steps=accumulation,
        collate_fn=collate,
        **kwargs,
    )
    logits = trainer.predict(samples[:13], batch_size, collate_fn=collate).logits
    if kind != "classes":
        # How far a sequence is padded depends on the batch; what the model says of padding means nothing.
        lengths = [len(sample["labels"]) for sample in samples]
        logits = torch.cat([rows[:length] for rows, length in zip(logits, lengths, strict=False)])
    history = {
        name: trainer.run_history.get_metric_values(name) for name in trainer.run_history.get_metric_names()
    }
    return {
        "weights": state_of(model),
        "history": history,
        "logits": logits,
        "processes": trainer.accelerator.num_processes,
    }


def train_with_metrics(batch_size: int) -> dict[str, Any]:
    return train(
        batch_size,
        "classes",
        callbacks=[MetricsCallback({"accuracy": MulticlassAccuracy(3, average="micro")}, on="both")],
    )


def train_with_activations_computed_again(batch_size: int) -> dict[str, Any]:
    model = create_model("causal")
    model.activation_checkpointing_enable()
    return train(batch_size, "causal", model)


def train_adapters(batch_size: int) -> dict[str, Any]:
    """Also saved in mid-epoch, resumed, and saved for `from_pretrained`."""
    folder = shared_folder()

    class Saving(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Any) -> None:
            if trainer.run_progress.updates_completed == 3:
                trainer.save_training_state(folder / "state")

    def create() -> Any:
        torch.manual_seed(1)
        arguments = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        return peft.get_peft_model(create_model("causal"), peft.LoraConfig(**arguments))

    resumed = create()
    result = train(batch_size, "causal", create(), [Saving()])
    again = train(batch_size, "causal", resumed, resume_from=folder / "state")
    TransformersTrainer(resumed, callbacks=()).save_pretrained(folder / "adapters")
    files = sorted(path.name for path in (folder / "adapters").iterdir())
    return {
        **result,
        "is_resumed_to_the_bit": torch.equal(result["weights"], again["weights"]),
        "files": files,
    }


def save_pretrained(batch_size: int) -> dict[str, Any]:
    folder = shared_folder()

    class Saving(TrainerCallback):
        def on_training_run_epoch_end(self, trainer: Any) -> None:
            trainer.save_pretrained(folder / "model")

    result = train(batch_size, "classes", callbacks=[Saving()])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    return {**result, "loaded": state_of(loaded)}


def raise_in_save_pretrained(batch_size: int) -> dict[str, Any]:
    """An error of the main process is raised on every process."""
    folder = shared_folder()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is in the way"):
        TransformersTrainer(create_model("classes"), callbacks=()).save_pretrained(folder)
    return {}


CASES = {
    "causal": lambda batch_size: train(batch_size, "causal"),
    "seq2seq": lambda batch_size: train(batch_size, "seq2seq"),
    "tokens": lambda batch_size: train(batch_size, "tokens"),
    "classes": train_with_metrics,
    "activations": train_with_activations_computed_again,
    "adapters": train_adapters,
    "save_pretrained": save_pretrained,
    "error": raise_in_save_pretrained,
}


@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("case", ["causal", "seq2seq", "tokens", "classes", "activations", "adapters"])
    def test_training_and_predictions_equal_those_of_one_process(self, outcome: Any, case: str) -> None:
        expected = outcome.alone(case)
        first, second = outcome.of(case)
        assert first["processes"] == 2 and expected["processes"] == 1
        assert torch.equal(first["weights"], second["weights"])
        assert (first["weights"] - expected["weights"]).abs().max() < 1e-5
        for result in (first, second):
            assert result["history"].keys() == expected["history"].keys()
            for name, values in expected["history"].items():
                assert result["history"][name] == pytest.approx(values, abs=1e-5)
            assert torch.allclose(result["logits"], expected["logits"], atol=1e-4)

    def test_adapters_are_resumed_and_saved(self, outcome: Any) -> None:
        for result in outcome.of("adapters"):
            assert result["is_resumed_to_the_bit"]
            assert result["files"] == outcome.alone("adapters")["files"]

    def test_the_main_process_saves_the_model_of_all(self, outcome: Any) -> None:
        for result in outcome.of("save_pretrained"):
            assert torch.equal(result["loaded"], result["weights"])

    def test_an_error_while_saving_is_raised_on_every_process(self, outcome: Any) -> None:
        assert outcome.of("error") == [{}, {}]


if __name__ == "__main__":
    run_as_script(CASES, ignore=IGNORED)
