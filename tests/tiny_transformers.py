"""Models of transformers small enough to train in a test, from configurations alone, and token data of varying length."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import torch
import transformers

VOCABULARY = 40
PADDING = 0


def create_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Without dropout, and with the same weights at each call: "causal", "gpt2", "seq2seq", "masked", "tokens" or "classes"."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    if kind == "causal":
        config: Any = transformers.LlamaConfig(
            **{**sizes, "num_key_value_heads": 1, "pad_token_id": PADDING, **changes}
        )
        create: Any = transformers.LlamaForCausalLM
    elif kind == "gpt2":
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        small = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        tokens = {"bos_token_id": 1, "eos_token_id": 1}
        config = transformers.GPT2Config(**{**small, **dropouts, **tokens, **changes})
        create = transformers.GPT2LMHeadModel
    elif kind == "seq2seq":
        small = {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
        }
        start = {"decoder_start_token_id": PADDING, "dropout_rate": 0.0}
        config = transformers.T5Config(**{**small, **start, **changes})
        create = transformers.T5ForConditionalGeneration
    else:
        config = transformers.BertConfig(**{**sizes, **no_dropout, "num_labels": 3, **changes})
        create = {
            "masked": transformers.BertForMaskedLM,
            "tokens": transformers.BertForTokenClassification,
            "classes": transformers.BertForSequenceClassification,
        }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create(config)


def create_samples(kind: str, size: int = 13) -> list[dict[str, Any]]:
    """Samples of 3 to 12 tokens; labels of tokens are -100 for a part of each sequence, most of all of the longest."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for number in range(size):
        length = 3 + (number * 7) % 10
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        if kind == "classes":
            labels: Any = torch.tensor(number % 3)
        elif kind == "tokens":
            labels = tokens % 3
        elif kind == "seq2seq":
            labels = tokens.flip(0)[: 1 + number % 5]
        else:
            labels = tokens.clone()
        if kind in ("causal", "gpt2", "masked", "tokens"):
            labels[: length // 2 if number % 2 else 0] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad to the longest of the batch."""
    inputs = torch.nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], True, PADDING)
    labels = [sample["labels"] for sample in samples]
    are_sequences = labels[0].ndim > 0
    return {
        "input_ids": inputs,
        "attention_mask": (inputs != PADDING).long(),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100)
        if are_sequences
        else torch.stack(labels),
    }


def state_of(model: Any) -> torch.Tensor:
    """All parameters in one tensor, in float64."""
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])
