"""Make the pictures and the terminal output of README and site, by running what they show.

    hatch run pictures                      all of them, in some minutes
    hatch run pictures resume               one of them
    hatch run pictures 01_train_digits      what an example prints and draws

What is printed goes to docs/output, as text that pages include; pictures go to docs/pictures.
"""

import contextlib
import fcntl
import functools
import html
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
PICTURES, OUTPUT = DOCS / "pictures", DOCS / "output"
EXAMPLES = REPOSITORY / "examples"
WIDTH = 116
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Sums of several threads end with other bits, so all runs that are compared have as many."""
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def python_blocks(page: Path) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL | re.MULTILINE,
    )


def run(
    command: list[str | Path],
    folder: Path,
    width: int = WIDTH,
    fails: bool = False,
    **environment: str,
) -> str:
    """What a command writes to a terminal of so many columns, control characters included."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(
        terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0)
    )
    environment = {
        **os.environ,
        **ONE_THREAD,
        "PYTHONWARNINGS": "error",
        **environment,
    }
    written = b""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        with contextlib.suppress(
            OSError
        ):  # what Linux raises when the last writer is gone
            while chunk := os.read(reader, 65536):
                written += chunk
    os.close(reader)
    text = written.decode().replace("\r\n", "\n")
    if bool(process.returncode) is not fails:
        raise RuntimeError(text)
    return text


def on_screen(typescript: str) -> str:
    """The last state of each line."""
    without_codes = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", typescript)
    rows: list[str] = []
    for line in without_codes.split("\n"):
        row = ""
        for written in line.split("\r"):
            row = written + row[len(written) :]
        rows.append(row.rstrip())
    return "\n".join(rows).strip("\n")


def write_output(name: str, text: str) -> None:
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / f"{name}.txt").write_text(
        text.strip("\n") + "\n", encoding="utf-8"
    )


def terminal_picture(text: str, path: Path, command: str) -> None:
    """Draw what a terminal shows as SVG, with the fonts of the reader's system."""
    rows = [f"$ {command}", *text.splitlines()]
    width, line_height = 8.45 * max(map(len, rows)) + 32, 20
    height = line_height * len(rows) + 52
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" role="img" '
        f'aria-label="A terminal in which {html.escape(command)} runs">',
        # The frame parts the terminal from a page that is as dark.
        f'<rect x="1" y="1" width="{width - 2:.0f}" height="{height - 2}" rx="8" fill="#1d2329" stroke="#5f6b78"/>',
        *(
            f'<circle cx="{20 + 18 * n}" cy="18" r="5.5" fill="{colour}"/>'
            for n, colour in enumerate(("#e0605c", "#e2b34b", "#5bb464"))
        ),
        f'<g font-family="{FONTS}" font-size="14" fill="#d7dde3">',
    ]
    for number, row in enumerate(rows):
        colour = (
            ' fill="#7fd4c1"'
            if number == 0 or "accuracy" in row.lower()
            else ""
        )
        length = (
            f' textLength="{8.45 * len(row):.0f}" lengthAdjust="spacingAndGlyphs"'
            if row
            else ""
        )
        parts.append(
            f'<text x="16" y="{48 + line_height * number}" xml:space="preserve"{colour}{length}>{html.escape(row)}</text>'
        )
    path.write_text("\n".join([*parts, "</g>", "</svg>", ""]), encoding="utf-8")


def save_light_and_dark(figure: Any, name: str) -> None:
    """Pages show one of both, by the colours that the reader has chosen."""
    from accel_callbacks.dark_figure import darken

    figure.savefig(PICTURES / f"{name}.png", dpi=150)
    darken(figure)
    figure.savefig(PICTURES / f"{name}_dark.png", dpi=150)


def readme(folder: Path) -> None:
    """The script of the README while it runs: what the terminal shows in the middle of an epoch."""
    (folder / "train.py").write_text(python_blocks(REPOSITORY / "README.md")[0])
    # A page shows 80 columns at a size that can be read; in more of them letters would be smaller.
    typescript = run([sys.executable, "train.py"], folder, width=80)
    middle = typescript.index("█", typescript.index("Epoch 4/"))
    shown = typescript[: typescript.index("\r", middle)]
    (PICTURES / "running.svg").unlink(missing_ok=True)
    terminal_picture(
        on_screen(shown), PICTURES / "running.svg", "python train.py"
    )


DARK_HISTORY = 'plot_history(run_history, "history_dark.png", dark=True)'
"""Beside the light one, which the page's own code draws."""


def quickstart(folder: Path) -> None:
    """The first model, what describe() says of it, and the picture of its history."""
    blocks = python_blocks(DOCS / "quickstart.md")
    (folder / "train.py").write_text(blocks[0])
    write_output(
        "quickstart", on_screen(run([sys.executable, "train.py"], folder))
    )
    (folder / "further.py").write_text(
        "\n".join([*blocks[:3], DARK_HISTORY, 'print("---")', blocks[3]])
    )
    write_output(
        "describe",
        on_screen(run([sys.executable, "further.py"], folder)).rpartition(
            "---"
        )[2],
    )
    for name in ("history.png", "history_dark.png"):
        shutil.copy(folder / name, PICTURES / name)


def two_processes(folder: Path) -> None:
    """One script, on one process and on two."""
    example = EXAMPLES / "06_two_processes.py"
    launch = "accelerate launch --multi_gpu --num_processes 2"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        EXAMPLES / "configs/two_cpu_processes.yaml",
    ]
    one = on_screen(run([sys.executable, example], folder))
    two = on_screen(
        run([*launcher, example], folder, ACCELERATE_USE_CPU="true")
    )
    chosen = [
        [
            line
            for line in shown.splitlines()
            if re.match("Training ended|Test|By hand", line)
        ]
        for shown in (one, two)
    ]
    lines = [
        f"$ python {example.name}",
        *chosen[0],
        "",
        f"$ ACCELERATE_USE_CPU=true {launch} {example.name}",
        *chosen[1],
    ]
    write_output("two_processes", "\n".join(lines))


def resume(folder: Path) -> None:
    """A run that is killed and goes on, and one that is not."""
    example = EXAMPLES / "05_resume_exactly.py"
    command = [sys.executable, example, "--epochs", "6", "--save-dir"]
    environment, nowhere = {**os.environ, **ONE_THREAD}, subprocess.DEVNULL
    with subprocess.Popen(
        [*command, folder / "killed"],
        env=environment,
        stdout=nowhere,
        stderr=nowhere,
    ) as process:
        while len(list((folder / "killed").glob("update_*"))) < 2:
            time.sleep(0.01)
        process.kill()
    last_lines = [
        on_screen(run([*command, folder / name], folder)).splitlines()[-1]
        for name in ("killed", "whole")
    ]
    short = f"python {example.name} --epochs 6 --save-dir"
    lines = [
        f"$ {short} killed",
        "Killed",
        f"$ {short} killed",
        last_lines[0],
        "",
        f"$ {short} whole",
        last_lines[1],
    ]
    write_output("resume", "\n".join(lines))


def checkpoint_folder(folder: Path) -> None:
    """The files of a training state."""
    (folder / "page.py").write_text(
        "\n".join(python_blocks(DOCS / "checkpoints.md")[:2])
    )
    shown = on_screen(run([sys.executable, "page.py"], folder)).splitlines()
    write_output(
        "checkpoint_folder",
        "\n".join(line for line in shown if re.fullmatch(r"[\w.]+\.\w+", line)),
    )


def schedules(folder: Path) -> None:
    """Learning rates of three schedules, recorded from real runs."""
    from functools import partial

    import torch
    from matplotlib.figure import Figure
    from torch.optim.lr_scheduler import OneCycleLR
    from torch.utils.data import TensorDataset

    from accel_callbacks import TrainingStatisticsCallback
    from accel_core import Trainer, TrainerPlaceholderValues
    from accel_integrations.schedulers import CosineLrScheduler, WSDLrScheduler

    functions = {
        "CosineLrScheduler": CosineLrScheduler.create_scheduler_fn(
            num_warmup_epochs=0.5, lr_min=1e-5
        ),
        "WSDLrScheduler": WSDLrScheduler.create_scheduler_fn(
            num_warmup_epochs=0.5, decay_phase_ratio=0.25
        ),
        "OneCycleLR of PyTorch": partial(
            OneCycleLR,
            max_lr=0.1,
            total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
        ),
    }
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for colour, (name, create_scheduler_fn) in zip(
        ("#0072B2", "#D55E00", "#009E73"), functions.items(), strict=True
    ):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        statistics = TrainingStatisticsCallback(record_every_n_updates=1)
        trainer = Trainer(
            model,
            torch.nn.functional.mse_loss,
            optimizer,
            callbacks=[statistics],
        )
        history = trainer.train(
            TensorDataset(torch.randn(320, 4), torch.randn(320, 1)),
            num_epochs=5,
            create_scheduler_fn=create_scheduler_fn,
        )
        axes.plot(
            history.get_metric_values("learning_rate"), label=name, color=colour
        )
    axes.set_xlabel("update")
    axes.set_title("Learning rate", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    save_light_and_dark(figure, "schedules")


CTRL_C = """
import os
import signal

from accel_callbacks import SaveTrainingStateCallback
from accel_core import TrainerCallback


class PressesCtrlC(TrainerCallback):
    def on_optimizer_step_end(self, trainer):
        if trainer.run_progress.updates_completed == 50:
            os.kill(os.getpid(), signal.SIGINT)


saver = SaveTrainingStateCallback("checkpoints", save_every_n_updates=25)
callbacks = [PressesCtrlC(), saver]
trainer = Trainer(model, nn.functional.mse_loss, optimizer, callbacks)
trainer.train(data, num_epochs=20)
"""


def seeing(folder: Path) -> None:
    """What the blocks of the page on seeing print to a terminal of 80 columns, a bar, and Ctrl-C."""
    command: list[str | Path] = [sys.executable, "page.py"]
    blocks = python_blocks(DOCS / "seeing.md")
    (folder / "page.py").write_text(
        "".join(f"{block}\nprint('---', flush=True)\n" for block in blocks)
    )
    shown = on_screen(run(command, folder, 80))
    # Where a folder of this machine stands, and what the profiler of torch says about GPUs.
    shown = shown.replace(f"{folder.resolve()}/", "")
    shown = re.sub(r"^(USDT|ERROR|WARNING):.*\n", "", shown, flags=re.MULTILINE)
    shown = re.sub(r"^\[I .*\n", "", shown, flags=re.MULTILINE)
    for block, printed in zip(blocks, shown.split("---\n"), strict=False):
        for name, word in SHOWN_BY.items():
            if word in block:
                write_output(f"seeing_{name}", printed)
    (folder / "page.py").write_text(blocks[0] + CTRL_C)
    stopped = on_screen(run(command, folder, 80, fails=True))
    sentence = stopped[stopped.index("Stopped by") :]
    sentence = sentence.replace(f"{folder.resolve()}/", "")
    write_output("seeing_ctrl_c", sentence.partition("Traceback")[0])
    (folder / "page.py").write_text(python_blocks(REPOSITORY / "README.md")[0])
    typescript = run(command, folder, 80)
    middle = typescript.index("█", typescript.index("Epoch 4/"))
    rows = on_screen(typescript[: typescript.index("\r", middle)])
    write_output("seeing_bar", rows[rows.index("Epoch 3/") :])


SHOWN_BY = {
    "nan": "find=True",
    "log": "logging.basicConfig",
    "representations": "print(saving)",
    "profile": "ProfileCallback",
}
"""A word of the block whose output has this name."""


def what_happened(folder: Path) -> None:
    """The loss of a run with a planted sample, and the losses of the samples of the update that spikes."""
    from matplotlib.figure import Figure

    blocks = python_blocks(DOCS / "what_happened.md")
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        # The page's own code, in one module.
        for block in blocks[:2]:
            exec(block, names)
        losses = []
        trainer, data = names["make_trainer"], names["data"]
        for update in range(1, 41):
            replayed = trainer().replay(
                data, update=update, folder="runs/a", **names["how"]
            )
            losses.append(replayed.loss)
        spikes = names["updates_of"]("runs/a", 123)
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        range(1, 41), losses, color="#0072B2", label="loss of each update"
    )
    spike = names["spike"]
    left.plot(
        spikes,
        [losses[each - 1] for each in spikes],
        color="#D55E00",
        marker="o",
        markersize=9,
        fillstyle="none",
        linestyle="none",
        label="updates that saw sample 123",
    )
    left.set_xlabel("update")
    samples = [str(index) for index in names["result"].indices]
    values = names["losses"].tolist()
    worst = values.index(max(values))
    positions = range(len(samples))
    right.plot(positions, values, "o", color="#0072B2", label="samples")
    right.plot(
        worst,
        values[worst],
        "o",
        color="#D55E00",
        label=f"sample {samples[worst]}",
    )
    right.set_xticks(list(positions), samples, rotation=45)
    right.set_xlabel(f"index of the sample in update {spike}")
    for axes, title in (
        (left, "Loss of the run"),
        (right, "Loss by sample, replayed"),
    ):
        axes.set_title(title, loc="left")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")
    save_light_and_dark(figure, "what_happened")


RUN_WITH_DARK_PICTURES = """
import runpy
import sys
from pathlib import Path

from matplotlib.figure import Figure

from accel_callbacks.dark_figure import darken

save = Figure.savefig


def save_both(figure, path, **options):
    save(figure, path, **options)
    darken(figure)
    path = Path(path)
    save(figure, path.with_stem(f"{path.stem}_dark"), **options)


Figure.savefig = save_both
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""An example draws for light pages alone, as its reader does; the site has dark pages too."""


def run_example(folder: Path, path: Path) -> None:
    """What an example prints, in 80 columns, and the pictures that it draws; the middle of a long output is left out."""
    pictures = list(PICTURES.glob(f"examples/{path.stem}_*.png"))
    with_dark = ["-c", RUN_WITH_DARK_PICTURES] if pictures else []
    printed = subprocess.run(
        [sys.executable, *with_dark, path],
        cwd=folder,
        env={**os.environ, **ONE_THREAD, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = printed.replace(f"{folder.resolve()}/", "").splitlines()
    if len(lines) > 80:
        lines = [*lines[:8], "...", *lines[-4:]]
    output = OUTPUT / "examples" / f"{path.stem}.txt"
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for picture in pictures:
        name = picture.name.removeprefix(f"{path.stem}_")
        shutil.copy(folder / "outputs" / path.stem / name, picture)


MAKERS = {
    maker.__name__: maker
    for maker in (
        readme,
        quickstart,
        two_processes,
        resume,
        checkpoint_folder,
        schedules,
        seeing,
        what_happened,
    )
} | {
    path.stem: functools.partial(run_example, path=path)
    for path in sorted(EXAMPLES.glob("[0-9]*.py"))
}


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MAKERS:
        with tempfile.TemporaryDirectory() as folder:
            MAKERS[name](Path(folder))
        print(f"made: {name}")


if __name__ == "__main__":
    main()
