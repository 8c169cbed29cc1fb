"""save_pretrained writes a folder for from_pretrained, complete or not at all, and removes nothing that is the user's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from accel_core import CheckpointError, ConfigurationError
from accel_integrations.transformers_adapter import TransformersTrainer
from sms_spam import MINILM
from tiny_transformers import collate, create_model, create_samples


def create_trainer(kind: str = "classes", **kwargs: Any) -> TransformersTrainer:
    model = create_model(kind)
    return TransformersTrainer(model, None, torch.optim.SGD(model.parameters(), lr=0.5), (), seed=1, **kwargs)


@pytest.mark.parametrize("kind", ["classes", "tokens", "causal", "gpt2", "seq2seq", "masked"])
def test_the_trained_model_loads_by_its_class_and_by_auto_model(kind: str, tmp_path: Path) -> None:
    trainer, samples = create_trainer(kind), create_samples(kind)
    trainer.train(samples, 1, None, 4, collate_fn=collate)
    trainer.save_pretrained(tmp_path / "model")
    loaded = type(trainer.model).from_pretrained(tmp_path / "model")
    state = trainer.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert encoder.config.model_type == trainer.model.config.model_type


def test_a_tokenizer_is_saved_with_the_model(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    create_trainer(tokenizer=tokenizer).save_pretrained(tmp_path / "deep" / "model")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "deep" / "model")
    assert loaded("a cat")["input_ids"] == tokenizer("a cat")["input_ids"]


def test_an_image_processor_is_saved_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2)
    )
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    trainer = TransformersTrainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.1), (), tokenizer=processor
    )
    trainer.train([{"pixel_values": torch.rand(3, 8, 8), "labels": n % 2} for n in range(6)], 1)
    trainer.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert (loaded.size["height"], loaded.size["width"]) == (8, 8)


def test_saving_again_replaces_the_model_and_leaves_nothing_else(tmp_path: Path) -> None:
    create_trainer("tokens").save_pretrained(tmp_path / "model")
    create_trainer("classes").save_pretrained(str(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").architectures == [
        "BertForSequenceClassification"
    ]


def test_what_is_not_a_saved_model_is_not_replaced(tmp_path: Path) -> None:
    create_trainer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.py").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"model' is in the way.*empty or a new folder"):
        create_trainer().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "notes.py").read_text() == "mine"
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ConfigurationError, match=f"{path.name}' is in the way.*empty or a new folder"):
            create_trainer().save_pretrained(path)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    create_trainer().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()


def test_a_fault_while_saving_leaves_the_model_before(tmp_path: Path) -> None:
    class Failing(transformers.BertForSequenceClassification):
        def save_pretrained(self, path: Any, **kwargs: Any) -> None:
            super().save_pretrained(path, **kwargs)
            raise OSError("no space left on device")

    create_trainer("tokens").save_pretrained(tmp_path / "model")
    trainer = create_trainer()
    trainer.model.__class__ = Failing
    with pytest.raises(
        CheckpointError, match=r"model' .*no space left on device\. .*untouched\. Choose another folder"
    ):
        trainer.save_pretrained(tmp_path / "model")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").architectures == [
        "BertForTokenClassification"
    ]
    create_trainer().save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    trainer = create_trainer()
    with torch.no_grad():
        trainer.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"'classifier\.bias' is not finite.*lower learning rate"):
        trainer.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_saved_so_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"Linear .*save_pretrained.*Use save_checkpoint"):
        TransformersTrainer(torch.nn.Linear(1, 1), callbacks=()).save_pretrained(tmp_path / "model")
