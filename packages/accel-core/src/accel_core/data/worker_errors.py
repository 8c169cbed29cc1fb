"""Errors of workers: those that cannot be sent, workers that do not start, and those that were killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import pickle
import signal
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch._utils import ExceptionWrapper

from ..errors import ConfigurationError

SECONDS_TO_END = 1.0
"""A connection breaks a moment before the process at its other end is known to have ended."""


def let_errors_be_sent() -> None:
    """Let this worker send a `RuntimeError` in place of an error whose type cannot be pickled.

    Torch sends the type of an error and its traceback as text. A type that cannot be pickled fails in a
    thread of the worker, and the main process would wait for this batch for ever.
    """
    ForkingPickler.register(ExceptionWrapper, _reduce_error)


def _reduce_error(error: Any) -> Any:
    kind, text = error.exc_type, error.exc_msg
    try:
        pickle.dumps(kind)
    except Exception:
        text = (
            f"The data raised {kind.__qualname__} in a worker, which cannot send this type. Define the class "
            f"at the top of a module. {text}"
        )
        kind = RuntimeError
    return _make_error, (kind, text, error.where)


def _make_error(kind: type[BaseException], text: str, where: str) -> ExceptionWrapper:
    # Not by its constructor, which would take the text from an error that is being handled here.
    error = ExceptionWrapper.__new__(ExceptionWrapper)
    error.exc_type, error.exc_msg, error.where = kind, text, where
    return error


def check_can_be_started(loader: Any, error: Exception) -> None:
    """Raise `ConfigurationError` if workers did not start because their data cannot be pickled."""
    context = getattr(loader, "multiprocessing_context", None) or multiprocessing
    method = context.get_start_method()
    if not getattr(loader, "num_workers", 0) or method == "fork":
        return
    parts = {
        "data set": loader.dataset,
        "collate_fn": loader.collate_fn,
        "worker_init_fn": loader.worker_init_fn,
    }
    for name, part in parts.items():
        try:
            ForkingPickler.dumps(part)
        except Exception as reason:
            raise ConfigurationError(
                f"Workers that are started by {method!r} get the data, but the {name} cannot be pickled: "
                f"{reason}. Define classes and functions at the top of a module, or pass num_workers=0."
            ) from error


def naming_lost_workers(iterator: Any) -> Iterator[Any]:
    """Yield the batches of torch's iterator.

    Raises:
        RuntimeError: a worker has ended by itself, with its exit status, in place of what torch raises.
    """
    try:
        yield from iterator
    except (OSError, EOFError, RuntimeError) as error:
        lost = _lost_workers(iterator, isinstance(error, (ConnectionError, EOFError)))
        if lost:
            raise RuntimeError(" ".join(map(_describe_end, lost))) from error
        raise


def _lost_workers(iterator: Any, is_broken: bool) -> list[Any]:
    """Return the workers that have ended by themselves, after a moment if a connection `is_broken`."""
    workers = getattr(iterator, "_workers", [])
    sentinels = {worker.sentinel: worker for worker in workers}
    # Torch's handler of SIGCHLD raises once for a worker that has ended, wherever this process is just then.
    for _ in workers:
        with contextlib.suppress(RuntimeError):
            ended = multiprocessing.connection.wait(list(sentinels), SECONDS_TO_END if is_broken else 0)
            for sentinel in ended:
                # Its files are closed a moment before it has an exit status.
                sentinels[sentinel].join(SECONDS_TO_END)
            break
    return [worker for worker in workers if worker.exitcode]


def _describe_end(worker: Any) -> str:
    status = worker.exitcode
    if status > 0:
        return (
            f"The worker {worker.pid} of the data ended with exit status {status}. What it printed before "
            "says why; num_workers=0 shows it in this process."
        )
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return (
        f"The worker {worker.pid} of the data was killed by {name} (exit status {status}). Was there not "
        "enough memory? Use fewer workers, a smaller batch or prefetch_factor, or a data set that holds less."
    )
