"""Torch loaders made again from the user's, and the workers that they start."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..processes.group import DataGroup
from ..state.random import derive_seed
from .content import digest_of
from .counted_batches import CountingCollate
from .worker_errors import check_can_be_started, let_errors_be_sent, naming_lost_workers


def rebuild_loader(loader: Any, dataset: Any, generator: torch.Generator, **changed: Any) -> DataLoader[Any]:
    """Return a torch loader over `dataset` with the settings of `loader` but for those `changed`.

    If how many samples are joined is not known beforehand, its batches are `CountedBatch`es: with a collate
    function of the user's own, and of data without a length.

    Args:
        generator: gives the seeds of the workers. A loader without one draws them from the global random
            state at each `iter()`, so that reading would change the random numbers of the model.
    """
    kept = ["num_workers", "collate_fn", "timeout", "multiprocessing_context"]
    if loader.num_workers:
        # Torch refuses the first two without workers. It also refuses to pin tensors of some kinds: without
        # workers each tensor is pinned on its way to the device, or left as it is.
        kept += ["prefetch_factor", "persistent_workers", "pin_memory"]
        changed["worker_init_fn"] = functools.partial(start_worker, loader.worker_init_fn)
    # Newer versions of torch have it.
    kept += ["in_order"] if hasattr(loader, "in_order") else []
    kwargs = {name: getattr(loader, name) for name in kept}
    is_counted = isinstance(dataset, IterableDataset) or loader.collate_fn is not default_collate
    if is_counted and loader.batch_sampler is not None:
        kwargs["collate_fn"] = CountingCollate(loader.collate_fn)
    kwargs.update(changed)
    if loader.num_workers and kwargs["collate_fn"] is not None:
        kwargs["collate_fn"] = SendableCollate(kwargs["collate_fn"])
    return DataLoader(dataset, **kwargs, generator=generator)


class SendableCollate:
    """Joins samples in a worker, and raises if the batch cannot be sent from there.

    Torch sends batches in a thread of the worker, which fails alone: the main process would wait for ever.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self.collate_fn = collate_fn
        self._is_checked = False

    def __call__(self, samples: Any) -> Any:
        """Return the batch; the first one of each worker is checked."""
        batch = self.collate_fn(samples)
        if not self._is_checked and get_worker_info() is not None:
            self._is_checked = True
            _check_can_be_sent(batch)
        return batch


class _StructurePickler(pickle.Pickler):
    """Pickles everything but tensors, which are always sent."""

    def reducer_override(self, value: Any) -> Any:
        return (str, ()) if isinstance(value, torch.Tensor) else NotImplemented


def _check_can_be_sent(batch: Any) -> None:
    try:
        _StructurePickler(io.BytesIO(), protocol=5).dump(batch)
    except Exception as error:
        raise RuntimeError(
            f"A worker cannot send its batch to the main process, since a part cannot be pickled: {error}. "
            "Define the classes of batches at the top of a module, or use num_workers=0."
        ) from error


def seed_workers(generator: torch.Generator, seed: int, epoch: int, group: DataGroup) -> None:
    """Let the workers of an epoch draw from (seed, epoch, process), whatever was drawn before."""
    generator.manual_seed(derive_seed(seed, "workers", epoch, group.index))


class Workers:
    """The workers of a loader. Persistent ones are kept only as long as their copies of the data are true."""

    def __init__(self) -> None:
        self._digest: bytes | None = None
        self._iterator: Callable[[], Any] = _nothing

    def start(self, loader: Any) -> Iterator[Any]:
        """Begin to iterate `loader`, with workers that hold the data as this process has it now."""
        if getattr(loader, "persistent_workers", False):
            digest = digest_of((loader.dataset, loader.collate_fn, loader.worker_init_fn))
            if digest is None or digest != self._digest:
                self.end()
                loader._iterator = None
            self._digest = digest
        # Torch draws the seeds of the workers from a generator on the CPU, whatever the default device is.
        has_other_default = torch.empty(0).device.type != "cpu"
        try:
            with torch.device("cpu") if has_other_default else contextlib.nullcontext():
                iterator: Any = iter(loader)
        except Exception as error:
            check_can_be_started(loader, error)
            raise
        if not hasattr(iterator, "_shutdown_workers"):
            return iterator  # type: ignore[no-any-return]
        # Weak, so that an epoch that is not read to its end leaves no workers behind.
        self._iterator = weakref.ref(iterator)
        return naming_lost_workers(iterator)

    def end(self) -> None:
        """End the workers started last; persistent ones wait for another epoch, others for their iterator."""
        iterator = self._iterator()
        if iterator is not None:
            iterator._shutdown_workers()


def _nothing() -> None:
    pass


def start_worker(worker_init_fn: Callable[[int], None] | None, worker_id: int) -> None:
    """Let the worker outlive a SIGTERM meant for the whole job, and send any error; call `worker_init_fn`.

    Launchers and schedulers send it to all processes of a job. The trainer then finishes its update and
    saves, for which it needs its workers. One that its parent sends still ends the worker, as does the end
    of the parent.
    """
    if hasattr(signal, "sigwaitinfo"):
        # Only a blocked signal waits for sigwaitinfo, which reports who has sent it.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_on_signal_of_parent, args=[os.getppid()], daemon=True).start()
    let_errors_be_sent()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _end_on_signal_of_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    # Not sys.exit, which ends only this thread.
    os._exit(0)
