"""The scripts of the README for transformers run as they stand there, with the pretrained models in folders of their names."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from sms_spam import MINILM, load_messages
from tiny_transformers import create_model

README = Path(__file__).parents[3] / "packages/accel-integrations/README.md"
SECTION = README.read_text().split("\n## transformers\n")[1].split("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
WITHOUT_NETWORK = re.search(r"```py\n(.*?)```", SECTION, flags=re.DOTALL)[1]
# The first of them for a model of one's own: what the README compares it with.
PLAIN = """\
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from accel_core import Trainer
from my_model import MyModel, read_messages

model = MyModel()
data = read_messages("messages.csv")
trainer = Trainer(model, cross_entropy, AdamW(model.parameters(), lr=1e-4))
trainer.train(data["train"], num_epochs=2, eval_dataset=data["test"])
trainer.save_checkpoint("spam_filter.pt")
"""


def lines_of(script: str) -> int:
    return sum(bool(line) for line in script.splitlines())


def test_the_simplest_script_is_three_lines_longer_than_with_the_plain_trainer() -> None:
    assert lines_of(SCRIPTS[0]) <= lines_of(PLAIN) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real messages, the real encoder, and a tiny language model in the place of the one that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    with (folder / "messages.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *load_messages(40)])
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers/all-MiniLM-L6-v2").symlink_to(MINILM)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    create_model("causal", vocab_size=len(tokenizer)).save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M")
    # Most tokenizers of language models, also the one that the README names, have no token for padding.
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.sep_token, None
    tokenizer.save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "saved"), [(0, "spam-filter/config.json"), (1, "adapters/adapter_config.json")]
)
def test_a_script_trains_and_saves(number: int, saved: str, folder: Path) -> None:
    ignored = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    # Here the name of the base is that of a folder too.
    local = "ignore:The saved adapters name their base"
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-W", ignored, "-W", local, "-c", SCRIPTS[number]],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
    )
    assert finished.returncode == 0, finished.stderr
    assert "train loss" in finished.stdout
    assert (folder / saved).exists()


def test_the_folder_that_it_names_for_those_without_a_network_holds_the_model_of_its_script() -> None:
    names: dict[str, str] = {}
    exec(WITHOUT_NETWORK, names)
    assert len(transformers.AutoTokenizer.from_pretrained(names["NAME"])) == 30522
    config = transformers.AutoConfig.from_pretrained(names["NAME"])
    assert (config.hidden_size, config.num_hidden_layers) == (384, 6)
