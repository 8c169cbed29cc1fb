"""What a person reads when Ctrl-C or an error ends a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from ..notices import logger_of
from ..processes.agreement import Agreement
from ..screen import columns_of, wrap
from .run import Run
from .trainer_parts import TrainerParts

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable in which torchrun and `accelerate launch` name a file for the error of a process."""


def tell_of_interrupt(trainer: TrainerParts, run: Run, error: BaseException) -> None:
    """Print on the main process what Ctrl-C has ended, and cut the traceback to the line of the caller."""
    # A run inside a callback of another one has told already.
    if not isinstance(error, KeyboardInterrupt) or getattr(error, "is_told", False):
        return
    error.is_told = True  # type: ignore[attr-defined]
    logger_of("run").debug("Ctrl-C came here:", exc_info=error)
    trainer.print(wrap(sentence_of_interrupt(trainer, run), columns_of(sys.stderr)), file=sys.stderr)


def sentence_of_interrupt(trainer: TrainerParts, run: Run) -> str:
    """Return where Ctrl-C has ended `run`, what is saved, and how Ctrl-C would save."""
    if run.arguments is None:
        return "Stopped by Ctrl-C."
    progress, newest = trainer.run_progress, trainer.last_checkpoint
    where = f"Stopped by Ctrl-C after update {progress.updates_completed} (epoch {progress.current_epoch})."
    known = {} if newest is None else run.known_states.get(newest.absolute(), {})
    if newest is not None and known.get("updates_completed") == progress.updates_completed:
        return f"{where} The state of this update is {newest}."
    saved = "No state was saved." if newest is None else f"No state was saved; the newest is {newest}."
    way_out = 'SaveTrainingStateCallback(save_on_signals=("SIGTERM", "SIGINT")) saves on Ctrl-C.'
    return f"{where} {saved} {way_out}"


_signals_to_heed: list[int] = []
"""Signals that would have ended the process, but came to a run that an error ended."""


def pass_on_signal(number: int, error: BaseException | None) -> None:
    """Keep a signal that was to stop a run from being lost where `error` ends the run first.

    A handler of the program's own gets it now. Else the next run of this process stops for it, since ending
    the process here would take the error away from a script that handles it.
    """
    if not number or not isinstance(error, Exception):
        return
    name = signal.Signals(number).name
    error.add_note(f"{name} was received too: a run that this process still begins stops at once.")
    if callable(signal.getsignal(number)):
        signal.raise_signal(number)
    else:
        _signals_to_heed.append(number)


def heed_earlier_signals(agreement: Agreement) -> None:
    """Let a run stop after its first update if a signal came while an error ended the run before."""
    while _signals_to_heed:
        number = _signals_to_heed.pop()
        name = signal.Signals(number).name
        agreement.flag_stop(f"the signal {name} was received as an error ended the run before", number)


def tell_launcher(trainer: TrainerParts, run: Run, error: BaseException) -> None:
    """Let the launcher of several processes show the cause, at the end and once, if nobody catches `error`.

    Each process printed its traceback, and the launcher ended with a page that named no cause.
    """
    path = os.environ.get(ERROR_FILE)
    # `sys.exit` and what ends a replay are no errors.
    is_error = isinstance(error, (Exception, KeyboardInterrupt))
    if path is None or run.engine.group.is_single or not is_error:
        return
    progress, group = trainer.run_progress, run.engine.group
    closing = (
        f"Process {group.index} of {group.size} failed first, after update {progress.updates_completed} "
        f"(epoch {progress.current_epoch}): {type(error).__name__}: {error}"
    )
    before = sys.excepthook

    def hook(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
        if raised is not error:
            before(kind, raised, trace)
            return
        # After Ctrl-C the sentence of the main process says all.
        is_told = isinstance(error, KeyboardInterrupt) or _write_cause(Path(path), error, closing)
        if not is_told:
            before(kind, raised, trace)

    sys.excepthook = hook


def _write_cause(path: Path, error: BaseException, closing: str) -> bool:
    """Write what the launcher shows of this process, and return whether that succeeded.

    Source: the file that `torch.distributed.elastic.multiprocessing.errors.record` writes.
    """
    now = int(time.time())
    with contextlib.suppress(OSError):
        # The folders of all processes of this machine lie in one. Only the first of them has a story to tell.
        try:
            (path.parent.parent / "first_error").touch(exist_ok=False)
            shown = "".join(traceback.format_exception(error)) + closing
        except FileExistsError:
            # The launcher takes the earliest for the cause, and it counts whole seconds.
            now, shown = now + 1, f"{type(error).__name__}, after another process had failed"
        details: dict[str, Any] = {"py_callstack": shown, "timestamp": str(now)}
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": details}
        path.write_text(json.dumps({"message": message}), encoding="utf-8")
        return True
    return False
