"""The examples from 08 on do what their headers say. Each writes into outputs/ of the folder in which it is started."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launching import launch

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    def run(name, *args):
        command = [sys.executable, EXAMPLES / name, *args]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def number_after(text, output):
    return float(re.findall(re.escape(text) + r" ([\d.]+)", output)[-1])


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3_000


def test_averaged_weights_recognise_digits_after_training_on_mixed_ones(run):
    assert number_after("Accuracy of the averaged weights:", run("08_timm_components.py")) >= 96


def test_transfer_needs_fewer_labels(run):
    output = run("09_transfer_learning.py")
    from_scratch = number_after("Accuracy with 25 labels from scratch:", output)
    assert number_after("Accuracy with 25 labels by transfer:", output) >= from_scratch + 8
    assert output.count(" more parameters from epoch ") == 2


def test_transfer_takes_photographs_in_folders_and_weights_of_timm(run, tmp_path):
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path / "weights", safe_serialization=True)
    random = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        for part, count in (("train", 4), ("test", 2)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 120, (64, 64, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{number}.png")
    options = (
        "--photographs",
        str(tmp_path),
        "--model",
        f"local-dir:{tmp_path / 'weights'}",
        "--epochs",
        "9",
    )
    output = run("09_transfer_learning.py", *options)
    assert number_after("Accuracy with 12 labels from scratch:", output) > 50
    assert re.findall(r"more parameters? from epoch (\d)", output) == ["5", "9"]
    assert "Accuracy with 12 labels by transfer:" in output


def test_what_was_learned_from_small_images_holds_for_large_ones(run):
    output = run("10_progressive_resizing.py")
    assert [int(size) for size in re.findall(r"--- (\d+) pixels", output)] == [12, 20, 28]
    assert number_after("Test accuracy:", output) >= 95


def test_a_pretrained_encoder_tells_spam_from_other_messages(run):
    output = run("11_finetune_transformer.py")
    assert number_after("Accuracy:", output) >= 96
    assert (
        number_after("Accuracy:", output) > number_after("Accuracy of the more frequent answer:", output) + 5
    )


def test_a_language_model_knows_more_than_how_frequent_tokens_are(run):
    output = run("12_language_model.py")
    assert number_after("Perplexity:", output) < number_after("Perplexity of the frequencies:", output) / 3


def test_digits_are_found_in_scenes(run, tmp_path):
    assert number_after("mAP at an overlap of 0.5:", run("13_object_detection.py")) >= 0.7
    assert is_picture(tmp_path / "outputs/13_object_detection/detections.png")


def test_generated_digits_are_nearly_as_near_to_real_ones_as_real_ones(run, tmp_path):
    output = run("14_two_optimizers.py")
    assert number_after("generated", output) < 1.3 * number_after("held out", output)
    assert "Digits among the generated: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" in output
    assert is_picture(tmp_path / "outputs/14_two_optimizers/generated_digits.png")


def test_networks_explain_more_of_a_table_than_linear_regression(run, tmp_path):
    output = run("15_tabular_regression.py")
    assert number_after("R^2 on unseen cars:", output) > number_after("by linear regression", output) + 0.02
    assert output.count("has not improved") == 5
    assert is_picture(tmp_path / "outputs/15_tabular_regression/learning_rate.png")
    assert is_picture(tmp_path / "outputs/15_tabular_regression/history.png")


def test_a_tracker_holds_what_the_history_holds(run):
    output = run("16_trackers.py")
    assert (
        number_after("Accuracy in the tracker:", output) == number_after("in the run history:", output) >= 93
    )


def test_halves_find_each_other_equally_well_on_two_processes(run):
    alone = run("19_contrastive_pairs.py")
    assert number_after("among the five nearest:", alone) >= 70
    assert launch(EXAMPLES / "19_contrastive_pairs.py").stdout == alone


def test_a_search_prunes_trials_and_goes_on_where_it_was_killed(run):
    first = run("20_search_with_optuna.py", "--trials", "3")
    assert first.startswith("3 trials, ")
    output = run("20_search_with_optuna.py")
    trials, pruned = map(int, re.match(r"(\d+) trials, (\d+) of them pruned", output).groups())
    # Six in all: the three of the first start are still in the file of sqlite.
    assert trials == 6 and 0 < pruned < 6
    assert number_after("The best has the loss", output) < 0.5
    assert re.search(r"with \{'lr': [\d.e-]+, 'width': \d+\}", output)
    assert run("20_search_with_optuna.py") == output
