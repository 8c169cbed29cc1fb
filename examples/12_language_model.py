"""Train a causal language model from scratch on real text.

    python examples/12_language_model.py
    # Some minutes, for better sentences.
    python examples/12_language_model.py --epochs 30 --width 256

    # On two processes.
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        examples/12_language_model.py

It trains a tokenizer and a small transformer. The text is the reference of the
Python language, which comes with Python for its `help()` (PSF licence): 1,600
paragraphs from a line to half a page. Each step returns its number of tokens as
`num_items_in_batch`. So an update is the mean over the tokens of all its steps, on
all processes.

It prints the losses of each epoch, and lets the model complete three texts. After
so short a training they have the sound of the text, but not yet the sense. At the
end it prints the perplexity on unseen paragraphs. It is below a third of that
which the frequencies of the tokens alone give.
"""

import argparse
import math
import random
import textwrap
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from accel_callbacks import DEFAULT_CALLBACKS
from accel_core import Trainer

MAX_TOKENS = 48
END = 0
"""The token that stands before and after each paragraph."""
NOT_COUNTED = -100


def paragraphs():
    """Return 1,400 paragraphs to learn from and the others, each a line."""
    texts = {
        " ".join(paragraph.split())
        for topic in topics.values()
        for paragraph in topic.split("\n\n")
    }
    chosen = sorted(
        text for text in texts if len(text) >= 40 and text[-1] in ".:"
    )
    random.Random(0).shuffle(chosen)
    return chosen[:-150], chosen[-150:]


def collate(samples):
    """Make a batch of paragraphs: all but the last token of each, and what
    follows each token.
    """
    return (
        pad_sequence(
            [sample[:-1] for sample in samples],
            batch_first=True,
            padding_value=END,
        ),
        pad_sequence(
            [sample[1:] for sample in samples],
            batch_first=True,
            padding_value=NOT_COUNTED,
        ),
    )


class LanguageModel(nn.Module):
    def __init__(self, vocabulary_size, width):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(MAX_TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, 2, nn.LayerNorm(width), enable_nested_tensor=False
        )
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, inputs):
        """Return logits (batch, tokens, vocabulary) of what follows each token
        of `inputs` (batch, tokens).
        """
        length = inputs.shape[1]
        hidden = self.tokens(inputs) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(
            length, device=inputs.device
        )
        return self.layers(hidden, mask, is_causal=True) @ self.tokens.weight.T


class LanguageTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        inputs, targets = batch
        logits = self.model(inputs)
        return {
            "loss": F.cross_entropy(
                logits.flatten(0, 1),
                targets.flatten(),
                ignore_index=NOT_COUNTED,
            ),
            "model_outputs": logits,
            "batch_size": len(inputs),
            "num_items_in_batch": (targets != NOT_COUNTED).sum(),
        }

    def calculate_eval_batch_loss(self, batch):
        return self.calculate_train_batch_loss(batch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()

    train_texts, eval_texts = paragraphs()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        train_texts,
        vocab_size=1000,
        special_tokens=["<end>"],
        show_progress=False,
    )
    train_data, eval_data = (
        [
            torch.tensor([END, *encoded.ids, END][: MAX_TOKENS + 1])
            for encoded in tokenizer.encode_batch(texts)
        ]
        for texts in (train_texts, eval_texts)
    )

    torch.manual_seed(0)
    model = LanguageModel(tokenizer.get_vocab_size(), args.width)
    trainer = LanguageTrainer(
        model,
        None,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        callbacks=DEFAULT_CALLBACKS,
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=eval_data,
        per_device_batch_size=16 // trainer.accelerator.num_processes,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
        collate_fn=collate,
    )
    loss = trainer.evaluate(per_device_batch_size=16)["evaluation_loss"]

    for beginning in ("The", "If the", "A class"):
        tokens = sample(trainer.get_model(), tokenizer.encode(beginning).ids)
        trainer.print(
            textwrap.fill(
                tokenizer.decode(tokens),
                100,
                initial_indent="  ",
                subsequent_indent="  ",
            )
        )
    trainer.print(
        "Perplexity of the frequencies: "
        f"{unigram_perplexity(train_data, eval_data, tokenizer.get_vocab_size()):.1f}"
    )
    trainer.print(f"Perplexity: {math.exp(loss):.1f}")


@torch.no_grad()
def sample(model, beginning, temperature=0.6):
    """Go on with the tokens `beginning`, up to the end of the paragraph."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = [END, *beginning]
    while len(tokens) < MAX_TOKENS:
        logits = model(
            torch.tensor([tokens], device=model.tokens.weight.device)
        )[0, -1].cpu()
        following = int(
            torch.multinomial(
                (logits / temperature).softmax(0), 1, generator=generator
            )
        )
        if following == END:
            break
        tokens.append(following)
    return tokens[1:]


def unigram_perplexity(train_data, eval_data, vocabulary_size):
    """The perplexity of a model that knows only how frequent each token is. One
    is added to each count, as some are new.
    """
    counts = (
        torch.cat([tokens[1:] for tokens in train_data]).bincount(
            minlength=vocabulary_size
        )
        + 1
    )
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(
        -log_probabilities[
            torch.cat([tokens[1:] for tokens in eval_data])
        ].mean()
    )


if __name__ == "__main__":
    main()
