"""What a person sees: programs run in a pseudo-terminal, read by a terminal emulator."""

import contextlib
import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyte

import launching


class Shown(NamedTuple):
    """What stood in the terminal when the program had ended, with what had scrolled away."""

    lines: list[str]
    """Rows of the terminal without empty ones at the end."""
    drawn: list[str]
    """Every state in which a row with a bar was seen."""
    returncode: int


def on_terminal(
    script: str,
    folder: Path,
    columns: int,
    processes: int = 1,
    args: Sequence[str] = (),
    interrupt_after: str | None = None,
) -> Shown:
    """Run `script` in a terminal of `columns` columns to its end.

    Args:
        interrupt_after: press Ctrl-C when this text has appeared.
    """
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        launching.command_of(path, processes, args, None, folder / "logs"),
        stdin=end,
        stdout=end,
        stderr=end,
        cwd=folder,
        env=launching.environment_of("screen", {"TERM": "xterm"}, False),
        start_new_session=True,
        # The terminal is that of the program, so that Ctrl-C reaches all of its processes.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    screen = pyte.HistoryScreen(columns, 40, history=5000)
    stream = pyte.ByteStream(screen)
    drawn: list[str] = []
    seen = b""
    with contextlib.suppress(OSError):  # What Linux raises when the last writer is gone.
        while chunk := os.read(main, 65536):
            # In parts, so that states are seen that were drawn over at once.
            for part in chunk.replace(b"\r", b"\0\r").split(b"\0"):
                stream.feed(part)
                drawn += [row.rstrip() for row in screen.display if "█" in row and row.rstrip() not in drawn]
            seen += chunk
            if interrupt_after is not None and interrupt_after.encode() in seen:
                os.write(main, b"\x03")
                interrupt_after = None
    os.close(main)
    try:
        returncode = process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    scrolled = ["".join(row[column].data for column in range(columns)).rstrip() for row in screen.history.top]
    lines = [*scrolled, *(row.rstrip() for row in screen.display)]
    while lines and not lines[-1]:
        lines.pop()
    return Shown(lines, drawn, returncode)
