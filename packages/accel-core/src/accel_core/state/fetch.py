"""Downloads states of a mirror: complete or absent, by one process of each machine."""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..checks.address import Address
from ..errors import OtherRunError
from . import files
from .checkpoint import STATE_FILE, Kind, NoState, TrainerState, examine, is_sharded
from .folder import (
    best_first,
    best_state,
    find_flaw_of,
    inode_of,
    list_states,
    newest_state,
    raise_nothing_usable,
)
from .housekeeping import set_damaged_aside
from .lock import locked
from .mirrored import Contents, age, list_mirrored, name_on_disk
from .publishing import give_name
from .staging import host_digits
from .store import Store, retried
from .transfer import fetch_file

DOWNLOADS = ".accel_download"
"""Folder inside the cache for the lock and what is being downloaded."""

_NOT_WRITTEN = "could not be written"
_OTHER_CACHE = " Pass another folder as cache, or make room there and let this process write."

Place = Path | str
"""A state of the cache by its path, or one of the mirror by its name there."""

_logger = logging.getLogger("accel_core.resume")


def fetch_newest(address: Address, cache: Path, verify: bool) -> Path | None:
    """Return the newest state of a mirror on the disk of this machine; None if there is none anywhere.

    Any process may call it at any time: nothing is exchanged between them but by the disk.

    Raises:
        OtherRunError: the cache holds states of another run than the mirror.
        CheckpointError: the store does not answer, or none of its states can be used.
    """
    with _opened(address, cache) as store:
        contents = _look_into(store, cache)
        unusable = {Path(name): state for name, state in contents.unusable.items()}
        if contents.states:
            newest = _fetch_first(
                store,
                contents.states,
                cache,
                order=lambda states: list(states)[::-1],
                is_read=lambda state: verify and not is_sharded(state),
                unusable=unusable,
            )
        else:
            # The mirror is written after the folder, so that a state may stand there alone.
            newest = newest_state(cache, verify)
        if newest is None and unusable:
            raise_nothing_usable(store.address, unusable)
        return newest


def fetch_best(address: Address, cache: Path, metric: str, greater_is_better: bool) -> Path | None:
    """Return the best of the states in a mirror and in the cache, on the disk of this machine.

    None if no intact state has a value of `metric`. Called and raises like `fetch_newest`.
    """
    with _opened(address, cache) as store:
        contents = _look_into(store, cache)
        if not contents.states:
            return best_state(cache, metric, greater_is_better)
        return _fetch_first(
            store,
            contents.states,
            cache,
            order=lambda states: best_first(states, metric, greater_is_better),
            is_read=lambda state: True,
            unusable={},
        )


@contextlib.contextmanager
def _opened(address: Address, cache: Path) -> Iterator[Store]:
    """Open the mirror at `address`, while no other process of this machine downloads into `cache`."""
    folder = cache / DOWNLOADS
    with files.raising_checkpoint_error(folder, "could not be made", for_disk=_OTHER_CACHE):
        files.make_folder(folder)

    def tell() -> None:
        _logger.info("Waiting for another process that downloads a state into '%s'.", cache)

    with locked(folder / f"{host_digits()}.lock", tell) as is_alone:
        if is_alone:
            for leftover in folder.glob(f"{host_digits()}_*"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield retried(
            lambda: Store(address), f"'{address}' could not be opened; pass the address of a mirror"
        )


def _look_into(store: Store, cache: Path) -> Contents:
    """List the states of a mirror, and log what is passed over."""
    contents = retried(
        lambda: list_mirrored(store),
        f"'{store.address}' could not be listed, so its states are not known (for those that this machine "
        f"has, pass '{cache}' as the folder, without a cache)",
    )
    itself = f"'{store.address}' could not be read"
    if not contents.states and retried(lambda: store.read(STATE_FILE), itself) is not None:
        _logger.warning(
            "'%s' is itself a training state. Pass the address of the mirror that holds it.", store.address
        )
    for name, reason in contents.unusable.items():
        _logger.warning("'%s/%s' is skipped: it %s.", store.address, name, reason.reason)
    return contents


def _fetch_first(
    store: Store,
    mirrored: dict[str, TrainerState],
    cache: Path,
    order: Callable[[Mapping[Place, TrainerState]], list[Place]],
    is_read: Callable[[TrainerState], bool],
    unusable: dict[Path, NoState],
) -> Path | None:
    """Return the first intact state of the cache and the mirror together, which is downloaded if need be.

    Args:
        mirrored: states of the mirror by name, at least one, the oldest first.
        order: given all states, the oldest first, returns those to try, the first of them first.
        is_read: whether the digests of a state in the cache are compared.
        unusable: what turns out to be damaged is added.

    Raises:
        OtherRunError: the cache has a state of another run.
    """
    here = list_states(cache).complete
    places: dict[Place, TrainerState] = {path: here[path] for path in here}
    twins = {age(state): path for path, state in here.items()}
    copies: dict[Place, str] = {}
    for name, state in mirrored.items():
        path = cache / name_on_disk(name)
        twin = path if path in here and age(here[path]) == age(state) else twins.get(age(state))
        # What stands here too, under whatever name, is downloaded only if it is damaged here.
        if twin is None:
            places[name] = state
        else:
            copies[twin] = name
    for path, found in here.items():
        _refuse_other_run(path, found, mirrored[next(reversed(mirrored))])
    for place in order(
        {place: places[place] for place in sorted(places, key=lambda each: age(places[each]))}
    ):
        if isinstance(place, Path):
            flaw = find_flaw_of(place, here[place]) if is_read(here[place]) else None
            if flaw is None:
                return place
            _logger.warning("'%s' is skipped: it %s.", place, flaw)
            unusable[place] = NoState(Kind.DAMAGED, flaw)
        name = copies.get(place, "") if isinstance(place, Path) else place
        if not name or not _make_way(cache / name_on_disk(name), mirrored[name], here):
            continue
        if (flaw := _download(store, name, mirrored[name], cache)) is None:
            return cache / name_on_disk(name)
        _logger.warning("'%s/%s' is skipped: it %s.", store.address, name, flaw)
        unusable[Path(name)] = NoState(Kind.DAMAGED, flaw)
    return None


def _make_way(path: Path, state: TrainerState, here: Mapping[Path, TrainerState]) -> bool:
    """Return whether a state of the mirror may stand at `path`. A newer one that is damaged is set aside."""
    if path not in here or age(here[path]) <= age(state):
        return True
    if find_flaw_of(path, here[path]) is None:
        return False
    set_damaged_aside(path)
    return True


def _refuse_other_run(path: Path, found: TrainerState, state: TrainerState) -> None:
    """Raise `OtherRunError` if what stands in the cache is of another run than a state of the mirror."""
    if found["run_id"] != state["run_id"]:
        raise OtherRunError(
            f"'{path}' is a state of the run {found['run_id']!r}, but the mirror has states of the run "
            f"{state['run_id']!r}. Pass an empty folder as cache, or the mirror of that run."
        )


def _download(store: Store, name: str, state: TrainerState, cache: Path) -> str | None:
    """Download a state into the cache, and return what is wrong with it; None if it stands there."""
    path = cache / name_on_disk(name)
    _logger.info("Downloading '%s/%s' to '%s'.", store.address, name, path)
    staging = cache / DOWNLOADS / f"{host_digits()}_{secrets.token_hex(4)}" / path.name
    before = inode_of(path)
    try:
        with files.raising_checkpoint_error(path, _NOT_WRITTEN, for_disk=_OTHER_CACHE):
            files.make_folder(staging)
        for relative in [*sorted(state["files"]), STATE_FILE]:
            if (flaw := fetch_file(store, name, staging, state, relative)) is not None:
                return flaw
        found = examine(staging)
        if isinstance(found, NoState):
            return found.reason
        # On a disk that machines share, another one may have been faster. Its processes may read already, so
        # that what it has given the name has to stay.
        if inode_of(path) != before and examine(path) == found:
            return None
        with files.raising_checkpoint_error(path, _NOT_WRITTEN, for_disk=_OTHER_CACHE):
            files.sync(staging)
            give_name(staging, path)
    finally:
        shutil.rmtree(staging.parent, ignore_errors=True)
    return None
