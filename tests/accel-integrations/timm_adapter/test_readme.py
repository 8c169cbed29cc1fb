"""The scripts of the README for timm run as they stand there, with pretrained weights of a hub on this machine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from accel_integrations.timm_adapter import create_timm_model
from local_hub import environment_of_hub, serving

README = Path(__file__).parents[3] / "packages/accel-integrations/README.md"
SECTION = README.read_text().split("\n## timm\n")[1].split("\n## ")[0]
SCRIPTS = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
WITHOUT_NETWORK = re.search(r"```py\n(.*?)```", SECTION, flags=re.DOTALL)[1]
# The first of them for a model of one's own: what the README compares it with.
PLAIN = """\
from torch.nn.functional import cross_entropy
from torch.optim import AdamW
from torchvision.datasets import ImageFolder

from accel_core import Trainer
from my_model import MyModel, to_tensor

model = MyModel(num_classes=3)
trainer = Trainer(
    model,
    cross_entropy,
    optimizer=AdamW(model.parameters(), lr=3e-4),
)
trainer.train(
    ImageFolder("flowers/train", to_tensor),
    num_epochs=2,
    eval_dataset=ImageFolder("flowers/eval", to_tensor),
)
"""


def test_the_simplest_script_is_three_lines_longer_than_with_the_plain_trainer() -> None:
    def lines(script: str) -> int:
        return sum(bool(line) for line in script.splitlines())

    assert lines(SCRIPTS[0]) <= lines(PLAIN) + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes, and a file of weights for resnet18."""
    folder = tmp_path_factory.mktemp("readme")
    data = load_digits(n_class=3)
    for number, (image, target) in enumerate(zip(data.images[:18], data.target, strict=False)):
        path = folder / "flowers" / ("train" if number < 12 else "eval") / f"class {target}"
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype("uint8")).resize((80, 80)).save(path / f"{number}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18").state_dict(), folder / "resnet18.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_a_script_trains(number: int, folder: Path) -> None:
    repository = timm.get_pretrained_cfg("resnet18").hf_hub_id
    with serving(repository, (folder / "resnet18.safetensors").read_bytes()) as address:
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPTS[number]],
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
            cwd=folder,
            env=environment_of_hub(address, folder / "cache"),
        )
    assert finished.returncode == 0, finished.stderr
    assert "Epoch 2/2  train loss" in finished.stdout


def test_the_ways_without_a_network_give_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has the weights of the file, the other has new ones."""
    monkeypatch.chdir(folder)
    made = []
    names = {"create_timm_model": lambda *args, **kwargs: made.append(create_timm_model(*args, **kwargs))}
    exec(WITHOUT_NETWORK, names)
    weights = load_file("resnet18.safetensors")["conv1.weight"]
    assert [torch.equal(model.conv1.weight, weights) for model in made] == [True, False]
    assert [model.num_classes for model in made] == [3, 3]
