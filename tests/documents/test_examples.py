"""The examples do what their headers say."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launching import launch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *args], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_accuracy(output: str) -> float:
    return float(re.search(r"Test accuracy: ([\d.]+)%", output).group(1))  # type: ignore[union-attr]


test_accuracy.__test__ = False  # type: ignore[attr-defined]


def test_digits_are_recognised_with_at_least_96_percent_and_the_results_are_where_the_last_line_says(
    tmp_path: Path,
) -> None:
    output = run("01_train_digits.py", "--output", str(tmp_path / "digits"))
    assert re.search("'accuracy'.* 4 evaluations", output)
    assert test_accuracy(output) >= 96
    folder = Path(output.strip().splitlines()[-1].rpartition(" are in ")[2])
    assert folder == tmp_path / "digits"
    assert {path.name for path in folder.iterdir()} == {"best_model.pt", "history.csv", "history.png"}
    assert "accuracy" in (folder / "history.csv").read_text()
    assert (folder / "history.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_processes_recognise_as_many_digits_as_one(tmp_path: Path) -> None:
    one = test_accuracy(run("01_train_digits.py", "--output", str(tmp_path / "one")))
    two = launch(
        EXAMPLES / "01_train_digits.py", processes=2, args=["--output", tmp_path / "two"], timeout=150
    )
    assert test_accuracy(two.stdout) == one


@pytest.mark.slow
def test_the_option_mnist_works_without_a_network(tmp_path: Path) -> None:
    assert (
        test_accuracy(run("01_train_digits.py", "--mnist", "--epochs", "2", "--output", str(tmp_path))) >= 90
    )


def test_three_ways_of_tracking_metrics_give_equal_numbers() -> None:
    by_subclassing = run("02_metrics_by_subclassing.py").strip().splitlines()[-1]
    both = run("03_metrics_by_callback.py")
    by_callback = both.strip().splitlines()[-1]
    assert by_callback == by_subclassing
    assert both.count("--- ") == 2 and "\nequal\n" in both


def test_a_custom_event_reaches_the_callback_each_epoch() -> None:
    assert run("04_custom_callback_event.py").strip().splitlines()[-1] == "3 batches verified"


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path: Path) -> None:
    example, folder = EXAMPLES / "05_resume_exactly.py", tmp_path / "killed"
    whole = run("05_resume_exactly.py", "--epochs", "4", "--save-dir", str(tmp_path / "whole"))
    command = [sys.executable, example, "--epochs", "4", "--save-dir", folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(folder.glob("update_*")):
            time.sleep(0.01)
        process.kill()
    resumed = run("05_resume_exactly.py", "--epochs", "4", "--save-dir", str(folder))
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]


def test_the_best_model_of_an_evaluation_in_mid_epoch_is_loaded() -> None:
    output = run("18_evaluation.py")
    best, last = map(int, re.search(r"Best update: (\d+) of (\d+)", output).groups())  # type: ignore[union-attr]
    assert 0 < best <= last
    assert best % 10 == 0
    clean, noisy = map(float, re.findall(r"Accuracy on \w+ images: ([\d.]+)%", output))
    assert clean > noisy > 50
