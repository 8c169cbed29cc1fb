"""Models of timm with pretrained weights from a file, from a hub and from its cache, and what is said without a network."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from accel_core import ConfigurationError
from accel_integrations.timm_adapter import create_timm_model, create_timm_transforms
from local_hub import NOWHERE, environment_of_hub, serving

NAME = "test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights for a thousand classes, as pretrained ones are."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(timm.create_model(NAME).state_dict(), path)
    return path


# ---------------------------------------------------------------------- weights from a file


def test_weights_come_from_a_file_and_the_classifier_is_new(weights: Path) -> None:
    model = create_timm_model(NAME, num_classes=10, pretrained_cfg_overlay={"file": str(weights)})
    with torch.no_grad():
        pretrained = timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay={"file": str(weights)}
        ).state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("fc."):
            assert len(value) == 10
        else:
            assert torch.equal(value, pretrained[name]), name


def test_weights_of_the_same_classes_keep_their_classifier(weights: Path) -> None:
    model = create_timm_model(NAME, num_classes=1000, pretrained_cfg_overlay={"file": str(weights)})
    assert torch.equal(model.get_classifier().weight, timm.models.load_state_dict(str(weights))["fc.weight"])  # type: ignore[operator]


def test_without_pretrained_weights_nothing_is_looked_for() -> None:
    model = create_timm_model(NAME, num_classes=7, pretrained=False, in_chans=1, drop_rate=0.3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.3


# ---------------------------------------------------------------------- weights from a hub


SCRIPT = """
import json, sys, time, warnings
from accel_core import ConfigurationError
from accel_integrations.timm_adapter import create_timm_model
import timm
started = time.monotonic()
try:
    model = create_timm_model(sys.argv[1], num_classes=10)
    result = {"sum": float(model.state_dict()["conv1.0.weight"].sum())}
except ConfigurationError as error:
    result = {"error": str(error)}
print(json.dumps({**result, "seconds": time.monotonic() - started}))
"""


def create_elsewhere(endpoint: str, home: Path, name: str = NAME, **environment: str) -> dict[str, Any]:
    """Create the model in a process whose hub is `endpoint`: it is read from the environment when the client is imported."""
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, name],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**environment_of_hub(endpoint, home), **environment},
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_weights_come_from_the_hub_and_later_from_its_cache(weights: Path, tmp_path: Path) -> None:
    expected = pytest.approx(float(timm.models.load_state_dict(str(weights))["conv1.0.weight"].sum()))
    with serving(f"timm/{NAME}.r160_in1k", weights.read_bytes()) as endpoint:
        assert create_elsewhere(endpoint, tmp_path)["sum"] == expected
    without_network = create_elsewhere(NOWHERE, tmp_path)
    assert without_network["sum"] == expected
    assert without_network["seconds"] < 20


@pytest.mark.parametrize("name", [NAME, "hf-hub:someone/some_model"])
def test_without_a_network_it_is_said_at_once_what_to_do(name: str, tmp_path: Path) -> None:
    result = create_elsewhere(NOWHERE, tmp_path, name)
    assert result["seconds"] < 20, "the hub's own client would try for minutes"
    for words in (
        f"'{name}'",
        "not on this machine",
        NOWHERE,
        "pretrained=False",
        "pretrained_cfg_overlay=dict(",
    ):
        assert words in result["error"]


def test_the_offline_mode_of_the_hub_is_no_network(tmp_path: Path) -> None:
    result = create_elsewhere("https://huggingface.co", tmp_path, HF_HUB_OFFLINE="1")
    assert "does not answer" in result["error"] and result["seconds"] < 20


# ---------------------------------------------------------------------- transforms


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode=None)


class TestTransforms:
    def test_have_the_size_and_the_mean_of_the_model(self) -> None:
        model = create_timm_model(NAME, 10, pretrained=False)
        transforms = create_timm_transforms(model)
        assert transforms.data_config["input_size"] == (3, 160, 160)
        for transform in (transforms.train, transforms.evaluation):
            assert transform(picture(200, 300)).shape == (3, 160, 160)
        grey = Image.new("RGB", (160, 160), (255, 255, 255))
        torch.testing.assert_close(
            transforms.evaluation(grey), torch.ones(3, 160, 160)
        )  # mean and deviation are 0.5

    def test_are_random_in_training_only(self) -> None:
        transforms = create_timm_transforms(create_timm_model(NAME, 10, pretrained=False))
        image = picture(200, 200)
        torch.manual_seed(0)
        assert not torch.equal(transforms.train(image), transforms.train(image))
        assert torch.equal(transforms.evaluation(image), transforms.evaluation(image))

    def test_take_another_size_and_augmentation(self) -> None:
        model = create_timm_model(NAME, 10, pretrained=False)
        transforms = create_timm_transforms(model, input_size=(3, 48, 64), no_aug=True)
        assert transforms.train(picture(200, 200)).shape == (3, 48, 64)
        assert torch.equal(transforms.train(picture(90, 90)), transforms.train(picture(90, 90)))

    def test_fit_a_model_for_images_of_one_channel(self) -> None:
        model = create_timm_model(NAME, 10, pretrained=False, in_chans=1)
        transforms = create_timm_transforms(model, input_size=(1, 32, 32))
        for transform in (transforms.train, transforms.evaluation):
            images = transform(picture(8, 8, "L")).unsqueeze(0)
            assert model(images.repeat(2, 1, 1, 1)).shape == (2, 10)

    def test_follow_the_size_that_the_model_was_created_with(self) -> None:
        transforms = create_timm_transforms(create_timm_model("test_vit", 10, pretrained=False, img_size=96))
        assert transforms.evaluation(picture(200, 200)).shape == (3, 96, 96)

    def test_a_model_that_is_not_of_timm_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"model is .*Linear.*pretrained_cfg.*create_timm_model"):
            create_timm_transforms(nn.Linear(1, 1))

    def test_a_size_that_the_model_cannot_take_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"input_size is \(3, 96, 96\).*img_size"):
            create_timm_transforms(
                create_timm_model("test_vit3", 10, pretrained=False), input_size=(3, 96, 96)
            )


# ---------------------------------------------------------------------- mistakes of callers


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"name": "test_resnett"}, ("name is 'test_resnett'", "Did you mean 'test_resnet'")),
            ({"name": "test_resnet.a9"}, ("name is 'test_resnet.a9'", "['test_resnet.r160_in1k']")),
            ({"name": "timm/test_resnet"}, ("name is 'timm/test_resnet'", "hf-hub:timm/test_resnet")),
            ({"name": 18}, ("name is 18", "timm.list_models(")),
            ({"num_classes": 0}, ("num_classes is 0", "at least 1", "timm.create_model")),
            (
                {"pretrained_cfg_overlay": {"file": "nowhere.pt"}},
                ("pretrained_cfg_overlay", "'nowhere.pt'", "not there", "Pass the path"),
            ),
            (
                {"name": "resnet18", "pretrained_cfg_overlay": {"hf_hub_id": None, "url": ""}},
                ("no weights", "'resnet18'", "pretrained=False", "pretrained_cfg_overlay=dict("),
            ),
        ],
    )
    def test_are_reported_at_once(self, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
        started = time.monotonic()
        with pytest.raises(ConfigurationError) as caught:
            create_timm_model(**{"name": NAME, "num_classes": 10, **arguments})
        assert all(word in str(caught.value) for word in words), caught.value
        assert time.monotonic() - started < 20


def test_a_missing_timm_is_explained_where_it_is_used() -> None:
    script = """
        import sys
        sys.modules["timm"] = None
        from accel_core import ConfigurationError
        from accel_integrations import timm_adapter as adapter

        uses = [
            lambda: adapter.create_timm_model("resnet18", 10),
            lambda: adapter.create_timm_transforms(None),
            lambda: adapter.timm_scheduler_fn(object),
            lambda: adapter.create_timm_optimizer(None),
            lambda: adapter.timm_parameter_groups(None, 0.1),
            lambda: adapter.AdaptiveGradientClippingCallback(),
            lambda: adapter.TimmTrainer(None, num_classes=10),
        ]
        for use in uses:
            try:
                use()
            except ConfigurationError as error:
                print(error)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    expected = (
        "accel_integrations.timm_adapter needs the package 'timm', which is not installed. Install it with: "
        'pip install "accel-core[timm]"'
    )
    assert finished.stdout.splitlines() == [expected] * 7
