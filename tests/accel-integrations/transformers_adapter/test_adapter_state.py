"""With adapters of PEFT only what is trained is saved, and the base stays as it was, to the bit."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

from accel_callbacks import ModelEmaCallback, SaveBestModelCallback
from accel_core import AccelWarning, CheckpointError, ConfigurationError, TrainerCallback
from accel_integrations.transformers_adapter import TransformersTrainer
from tiny import assert_same_tensors
from tiny_transformers import collate, create_model, create_samples

# PEFT 0.21 asks a model of transformers for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SAMPLES = create_samples("causal")


def create_trainer(callbacks: Any = (), kind: str = "causal", **changes: Any) -> TransformersTrainer:
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(create_model(kind), peft.LoraConfig(**{**arguments, **changes}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return TransformersTrainer(
        model, optimizer=torch.optim.AdamW(trained, lr=0.01), callbacks=callbacks, seed=1
    )


def train(trainer: TransformersTrainer, num_epochs: int = 2, **kwargs: Any) -> TransformersTrainer:
    trainer.train(
        SAMPLES,
        num_epochs,
        SAMPLES,
        2,
        gradient_accumulation_steps=2,
        collate_fn=collate,
        eval_per_device_batch_size=4,
        **kwargs,
    )
    return trainer


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" not in name}


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def test_training_changes_the_adapters_and_leaves_the_base_bit_identical() -> None:
    trainer, untrained = train(create_trainer()), create_trainer()
    assert_same_tensors(base_weights(trainer.model), base_weights(untrained.model))
    before, after = adapter_weights(untrained.model), adapter_weights(trainer.model)
    assert all((before[name] - after[name]).abs().max() > 1e-3 for name in before)


@pytest.mark.parametrize("name", ["adapters.pt", "adapters.safetensors"])
def test_an_export_holds_the_adapters_only_and_loads_onto_the_base(name: str, tmp_path: Path) -> None:
    trainer = train(create_trainer())
    trainer.save_checkpoint(tmp_path / name, save_optimizer=False)
    content = trainer.load_checkpoint(tmp_path / name)["model_state_dict"]
    assert content.keys() == adapter_weights(trainer.model).keys()
    other = create_trainer()
    other.load_checkpoint(tmp_path / name)
    assert_same_tensors(dict(other.model.state_dict()), dict(trainer.model.state_dict()))


def test_a_training_state_holds_the_adapters_only_and_resumes_to_the_bit(tmp_path: Path) -> None:
    class Saving(TrainerCallback):
        def on_optimizer_step_end(self, trainer: Any) -> None:
            if trainer.run_progress.updates_completed == 5:
                trainer.save_training_state(tmp_path / "state")

    straight = train(create_trainer([Saving()]))
    saved = safetensors.torch.load_file(tmp_path / "state" / "model.safetensors")
    assert saved.keys() == adapter_weights(straight.model).keys()
    resumed = train(create_trainer(), resume_from=tmp_path / "state")
    assert_same_tensors(dict(resumed.model.state_dict()), dict(straight.model.state_dict()))


def test_other_parts_that_are_trained_are_saved_too(tmp_path: Path) -> None:
    """A head by `modules_to_save`, and a parameter that the user unfroze."""
    trainers = []
    for _ in range(2):
        trainer = create_trainer(modules_to_save=["lm_head"])
        norm = trainer.model.get_base_model().model.norm.weight
        norm.requires_grad_(True)
        trainer.optimizer.add_param_group({"params": [norm]})
        trainers.append(trainer)
    trained, other = trainers
    train(trained).save_checkpoint(tmp_path / "model.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    names = {name for name in saved if "lora_" not in name}
    assert names == {
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    other.load_checkpoint(tmp_path / "model.safetensors")
    assert_same_tensors(dict(other.model.state_dict()), dict(trained.model.state_dict()))


def test_the_best_adapters_are_in_the_model_at_the_end(tmp_path: Path) -> None:
    trainer = create_trainer(
        [SaveBestModelCallback(tmp_path / "best.pt", watch_metric="train_loss_epoch", greater_is_better=True)]
    )
    history = train(trainer, 4).run_history
    losses = history.get_metric_values("train_loss_epoch")
    assert max(losses) == losses[0] > losses[-1]
    first = train(create_trainer(), 1)
    assert_same_tensors(dict(trainer.model.state_dict()), dict(first.model.state_dict()))


def test_averages_of_adapters_are_exported_without_the_base_and_load(tmp_path: Path) -> None:
    averaging = ModelEmaCallback(decay=0.5, save_path=tmp_path / "ema.safetensors", greater_is_better=True)
    trainer = train(create_trainer([averaging]), 1)
    saved = safetensors.torch.load_file(tmp_path / "ema.safetensors")
    assert saved.keys() == adapter_weights(trainer.model).keys()
    assert_same_tensors(saved, adapter_weights(averaging.ema_model))
    assert not any(torch.equal(saved[name], value) for name, value in adapter_weights(trainer.model).items())
    other = create_trainer()
    other.load_checkpoint(tmp_path / "ema.safetensors")
    assert_same_tensors(adapter_weights(other.model), saved)


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    train(create_trainer(), 1).save_checkpoint(tmp_path / "adapters.pt", save_optimizer=False)
    with pytest.raises(
        CheckpointError, match=r"adapters\.pt' .*PeftModelForCausalLM.*only this model has \['base_model"
    ):
        create_trainer(target_modules=["k_proj"]).load_checkpoint(tmp_path / "adapters.pt")


def test_save_pretrained_saves_adapters_that_peft_loads_onto_the_base(tmp_path: Path) -> None:
    create_model("causal").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainer = train(
        TransformersTrainer(model, optimizer=torch.optim.AdamW(trained, lr=0.01), callbacks=(), seed=1)
    )
    # The base was loaded from a folder of this machine.
    with pytest.warns(
        AccelWarning, match=r"name their base '.*base', a path of this machine.*Pass base_name="
    ):
        trainer.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    assert (tmp_path / "adapters" / "adapter_model.safetensors").stat().st_size < 5000
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    batch = collate(SAMPLES)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-6)


def test_saved_adapters_name_their_base_as_another_machine_knows_it(tmp_path: Path) -> None:
    create_model("causal").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).eval()
    trainer = TransformersTrainer(model, callbacks=())
    trainer.save_pretrained(tmp_path / "adapters", base_name="organisation/base")
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "organisation/base" and saved["r"] == 4
    assert str(tmp_path) not in (tmp_path / "adapters" / "README.md").read_text()
    with torch.no_grad():
        before = model(**collate(SAMPLES)).logits
        merged = trainer.get_model().merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(alone(**collate(SAMPLES)).logits, before, atol=1e-5)


@pytest.mark.parametrize("name", ["base", ""])
def test_a_base_name_that_names_nothing_is_refused(name: str, tmp_path: Path) -> None:
    trainers = [TransformersTrainer(create_model("causal"), callbacks=())]
    for trainer in trainers if name else [*trainers, create_trainer()]:
        with pytest.raises(ConfigurationError, match=rf"base_name is '{name}'.*Leave it out"):
            trainer.save_pretrained(tmp_path / "adapters", base_name=name)
    assert list(tmp_path.iterdir()) == []


def test_adapters_train_with_activations_computed_again() -> None:
    weights = []
    for is_checkpointing in (False, True):
        trainer = create_trainer()
        if is_checkpointing:
            trainer.model.get_base_model().activation_checkpointing_enable()
        weights.append(adapter_weights(train(trainer).model))
    assert all(
        torch.allclose(one, other, atol=1e-6)
        for one, other in zip(weights[0].values(), weights[1].values(), strict=True)
    )
