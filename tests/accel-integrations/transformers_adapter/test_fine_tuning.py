"""A pretrained encoder learns to tell spam from other messages, which real people have sent."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback, SaveBestModelCallback
from accel_integrations.transformers_adapter import (
    TransformersTrainer,
    transformers_parameter_groups,
    transformers_scheduler_fn,
)
from sms_spam import MINILM, load_messages

# PEFT 0.21 asks a model of transformers for this by its old name.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def data(tokenizer: Any) -> tuple[Dataset, Dataset]:
    """320 messages to learn from and 400 others, half of them spam."""
    messages = load_messages(360)
    rows = Dataset.from_dict(
        {"text": [text for text, _ in messages], "label": [label for _, label in messages]}
    )
    rows = rows.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=48), batched=True)
    return rows.select(range(320)), rows.select(range(320, 720))


def create_classifier() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(MINILM, num_labels=2)


def accuracy() -> MetricsCallback:
    return MetricsCallback({"accuracy": MulticlassAccuracy(2, average="micro")})


def test_a_fine_tuned_encoder_beats_the_majority_class_by_far(
    tokenizer: Any, data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    train_data, eval_data = data
    labels = torch.tensor(eval_data["label"])
    majority = max((labels == 0).float().mean().item(), (labels == 1).float().mean().item())
    model = create_classifier()
    optimizer = torch.optim.AdamW(transformers_parameter_groups(model, lr=2e-4, layer_decay=0.9))
    best = SaveBestModelCallback(
        tmp_path / "best.safetensors", watch_metric="accuracy", greater_is_better=True
    )
    trainer = TransformersTrainer(model, None, optimizer, [accuracy(), best], tokenizer=tokenizer, seed=1)
    trainer.train(
        train_data,
        2,
        eval_data,
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
        create_scheduler_fn=transformers_scheduler_fn("cosine", num_warmup_steps=0.1),
        eval_per_device_batch_size=50,
    )
    reached = trainer.evaluate(per_device_batch_size=50)["evaluation_accuracy"]
    assert reached == max(trainer.run_history.get_metric_values("accuracy"))
    assert majority < 0.55
    assert reached > 0.95

    trainer.save_pretrained(tmp_path / "spam-filter")
    classify = transformers.pipeline("text-classification", str(tmp_path / "spam-filter"), device="cpu")
    answers = [answer["label"] for answer in classify(eval_data["text"][:40])]
    predicted = trainer.predict(eval_data.select(range(40)), 8).logits.argmax(-1).tolist()
    assert answers == [f"LABEL_{label}" for label in predicted]


def test_adapters_alone_learn_it_too_and_the_encoder_stays_as_it_was(
    tokenizer: Any, data: tuple[Dataset, Dataset]
) -> None:
    train_data, eval_data = data
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(create_classifier(), config)
    before = {name: value.clone() for name, value in create_classifier().bert.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.Tensor.numel, trained)) < 0.01 * sum(map(torch.Tensor.numel, model.parameters()))
    trainer = TransformersTrainer(
        model, None, torch.optim.AdamW(trained, lr=3e-3), [accuracy()], tokenizer=tokenizer, seed=1
    )
    trainer.train(train_data, 2, per_device_batch_size=16)
    assert trainer.evaluate(eval_data, 50)["evaluation_accuracy"] > 0.9
    after = model.get_base_model().bert.state_dict()
    frozen = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
