"""The configs of examples/configs work by the commands in their headers, and the examples of many processes do what they say."""

import os
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from launching import launch

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(path.name for path in (EXAMPLES / "configs").glob("*.yaml"))
ON_CPU = ("one_cpu.yaml", "two_cpu_processes.yaml", "two_machines.yaml")

RUN = """
    import os, subprocess, sys

    # What counts are the variables that the commands set themselves.
    os.environ.pop("ACCELERATE_USE_CPU")
    os.chdir(sys.argv[1])
    running = [subprocess.Popen(command, shell=True) for command in sys.argv[2:]]
    sys.exit(max(process.wait() for process in running))
    """


def commands_of(config: str) -> list[str]:
    lines = (EXAMPLES / "configs" / config).read_text().splitlines()
    return [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(commands: list[str]) -> str:
    """Run shell commands at the same time, as a user would, with a time limit that leaves none of their processes."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return launch(RUN, processes=1, args=[EXAMPLES.parent, *commands], env={"PATH": path}, timeout=200).stdout


def last_lines(output: str) -> list[str]:
    return [
        line for line in output.splitlines() if re.match("Training ended after|Test accuracy|By hand", line)
    ]


@pytest.fixture(scope="module")
def alone() -> list[str]:
    lines = last_lines(run(commands_of("one_cpu.yaml")))
    assert len(lines) == 3
    return lines


def test_one_process_stops_when_it_is_good_enough(alone: list[str]) -> None:
    stopped, by_metric, by_hand = alone
    assert re.match(
        r"Training ended after \d+ updates and \d+ complete epochs: the training loss is 0\.1\d\d", stopped
    )
    assert by_metric.split()[-1] == by_hand.split()[-1]
    assert float(by_metric.split()[-1].rstrip("%")) > 90


def test_two_processes_print_the_same_lines_as_one(alone: list[str]) -> None:
    assert last_lines(run(commands_of("two_cpu_processes.yaml"))) == alone


@pytest.mark.slow
def test_two_machines_print_the_same_lines_as_one(alone: list[str]) -> None:
    """Two launchers on this host; only the first process of all of them prints."""
    port = f"--main_process_ip 127.0.0.1 --main_process_port {free_port()}"
    commands = [
        command.replace("--main_process_ip 10.0.0.1", port) for command in commands_of("two_machines.yaml")
    ]
    assert len(commands) == 2
    assert last_lines(run(commands)) == alone


@pytest.mark.slow
def test_the_notebook_launcher_trains_on_two_processes_from_a_script_and_from_a_cell() -> None:
    example = "examples/07_notebook_launcher.py"
    # A cell is run in the main module of a kernel, which has arguments of its own.
    cell = f"""python -c "exec(open('{example}').read())" -f kernel.json"""
    output = run([f"MASTER_PORT={free_port()} python {example}", f"MASTER_PORT={free_port()} {cell}"])
    accuracies = re.findall(r"Test accuracy of 2 processes: ([\d.]+)%", output)
    assert len(accuracies) == 2 and accuracies[0] == accuracies[1]
    assert float(accuracies[0]) >= 90


@pytest.mark.parametrize("config", CONFIGS)
def test_accelerate_understands_the_commands_in_the_header(config: str) -> None:
    commands = commands_of(config)
    assert len(commands) == (2 if config == "two_machines.yaml" else 1)
    for rank, command in enumerate(commands):
        words = shlex.split(command)
        variables, words = (
            [word for word in words if "=" in word],
            [word for word in words if "=" not in word],
        )
        assert words[:4] == ["accelerate", "launch", "--config_file", f"examples/configs/{config}"]
        assert words[-1] == "examples/06_two_processes.py"
        words[3] = str(EXAMPLES / "configs" / config)
        args = _validate_launch_command(launch_command_parser().parse_args(words[2:]))[0]
        is_several = args.num_processes > 1
        assert args.multi_gpu + args.use_fsdp + args.use_deepspeed == is_several
        assert args.use_fsdp == config.startswith("fsdp") and args.use_deepspeed == config.startswith(
            "deepspeed"
        )
        assert args.mixed_precision == ("bf16" if args.num_processes == 8 else "no")
        assert args.use_cpu == (config in ON_CPU)
        assert variables == (["ACCELERATE_USE_CPU=true"] if is_several and args.use_cpu else [])
        assert int(args.machine_rank or 0) == rank


@pytest.mark.slow
def test_cpu_alone_starts_a_single_process(tmp_path: Path) -> None:
    """As docs/distributed.md says, so that nobody takes it for the command of two processes."""
    script = tmp_path / "count.py"
    script.write_text("from accelerate import Accelerator\nprint('found', Accelerator().num_processes)\n")
    assert re.findall(r"found (\d)", run([f"accelerate launch --cpu --num_processes 2 {script}"])) == ["1"]


def test_fsdp2_is_asked_for() -> None:
    args = launch_command_parser().parse_args(
        ["--config_file", str(EXAMPLES / "configs/fsdp2.yaml"), "--num_processes", "2", "x"]
    )
    args = _validate_launch_command(args)[0]
    assert str(args.fsdp_version) == "2" and args.fsdp_state_dict_type == "SHARDED_STATE_DICT"


def test_zero_2_is_asked_for_without_accumulation_of_its_own() -> None:
    path = str(EXAMPLES / "configs/deepspeed_zero2.yaml")
    args = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", path, "--num_processes", "2", "x"])
    )[0]
    assert (args.zero_stage, args.gradient_accumulation_steps) == (2, 1)
