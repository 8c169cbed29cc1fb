"""Digits with the Trainer of transformers.

A cosine schedule, accuracy after each epoch, the best weights at the end.
"""

from digits import BATCH_SIZE, MAX_LR, NUM_EPOCHS, create_model, load_data
from torch import nn
from transformers import Trainer, TrainingArguments


class ModelWithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = create_model()

    def forward(self, images, labels):
        logits = self.model(images)
        return {
            "loss": nn.functional.cross_entropy(logits, labels),
            "logits": logits,
        }


def as_dicts(data):
    return [{"images": images, "labels": labels} for images, labels in data]


def compute_metrics(predictions):
    return {
        "accuracy": (
            predictions.predictions.argmax(-1) == predictions.label_ids
        ).mean()
    }


train_data, eval_data = load_data()
trainer = Trainer(
    ModelWithLoss(),
    TrainingArguments(
        "outputs/transformers",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=MAX_LR,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,
        eval_strategy="epoch",
        save_strategy="best",
        metric_for_best_model="accuracy",
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        seed=0,
    ),
    train_dataset=as_dicts(train_data),
    eval_dataset=as_dicts(eval_data),
    compute_metrics=compute_metrics,
)
trainer.train()
print(f"Accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
