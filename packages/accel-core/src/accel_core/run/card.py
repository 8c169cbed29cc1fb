"""The run card: what a run was made of, and what is needed to repeat it, as values that JSON knows."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..callbacks.callback import TrainerCallback
from ..data.content import digest_of
from ..data.readers import is_map_style, length_of, name_of_data
from ..errors import ConfigurationError
from ..state import files
from ..state.cards import CARD_FILE
from ..state.checkpoint import library_versions
from ..state.digests import digest_of_value
from ..state.housekeeping import KnownStates
from ..state.random import preserving_random_state, seed_process
from ..text import preview
from .evaluation_sets import named_sets
from .run import Run

FIRST_SAMPLES = 4
"""As many samples of each data set go into its digest."""

_NO_ARGUMENTS_OF_THE_CARD = ("train_dataset", "eval_dataset", "resume_from")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_logger = logging.getLogger("accel_core")


def create_card(trainer: Any, known: KnownStates | None = None) -> dict[str, Any]:
    """Return the card of the latest training run, as `Trainer.run_card` promises.

    Args:
        known: the training states whose updates and digests it names; None looks beside the newest one.
    """
    run: Run | None = trainer._training_run
    if run is None or run.arguments is None:
        raise ConfigurationError("run_card was called before train, which makes a run. Call train first.")
    launches = list(run.launches)
    card: dict[str, Any] = {
        "format_version": 1,
        "run_id": trainer.run_id,
        "versions": library_versions(),
        "hardware": _hardware(trainer),
        "settings": _settings(),
        "trainer": _parts(trainer, run),
        "arguments": _arguments(run),
        "data": _data(trainer, run),
        "seed": {
            "seed": trainer.seed,
            "data_seed": trainer.data_seed,
            "order_version": run.order_version,
            "order": launches[-1]["order"] if launches else None,
        },
        "beginning": dict(run.beginning),
        "launches": launches,
        "interruptions": _count_interruptions(launches),
        "progress": trainer.run_progress.state_dict(),
        "metrics": _metrics(trainer),
        "states": _states(trainer, known),
    }
    card["to_repeat"] = _needs(card, run)
    return _as_json(card)  # type: ignore[no-any-return]


def write_card(trainer: Any, known: KnownStates) -> None:
    """Write the card into the folder of the states that are known. The main process calls it.

    It holds what the user has passed: whatever fails there is logged, since the states stand.
    """
    try:
        known.refresh()
        write = functools.partial(files.write_json, value=create_card(trainer, known))
        files.replace_file(known.folder / CARD_FILE, write)
    except Exception as error:
        _logger.warning("The run card was not written: %s: %s", type(error).__name__, error)


def _hardware(trainer: Any) -> dict[str, Any]:
    device = trainer.device
    facts = {
        "machine": platform.machine(),
        "system": platform.system(),
        "device": device.type,
        "processes": trainer.engine.group.num_processes,
        "layout": trainer.engine.name,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
    }
    if device.type == "cuda":
        facts["device_name"] = torch.cuda.get_device_name(device)
    return facts


def _settings() -> dict[str, Any]:
    """Return the settings of torch by which the bits of a sum may change."""
    return {
        "threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def _parts(trainer: Any, run: Run) -> dict[str, Any]:
    parameters = list(trainer.model.parameters())
    trained = run.engine.prepared
    model, optimizer = (
        (trainer.model, trainer.optimizer)
        if trained is None
        else (trained.user_model, trained.user_optimizer)
    )
    acting = [_text(each) for each in trainer.callbacks if each.runs_in_replay]
    watching = [_text(each) for each in trainer.callbacks if not each.runs_in_replay]
    return {
        "class": _class_of(trainer),
        "model": _class_of(model),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
        "loss_func": None if trainer.loss_func is None else _text(trainer.loss_func),
        "optimizer": {"class": _class_of(optimizer), "defaults": dict(getattr(optimizer, "defaults", {}))},
        "callbacks": acting,
        # Savers, bars and trackers, which have no influence on the training.
        "watching_callbacks": watching,
    }


def _arguments(run: Run) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(run.arguments)]  # type: ignore[arg-type]
    return {name: getattr(run.arguments, name) for name in fields if name not in _NO_ARGUMENTS_OF_THE_CARD}


def _data(trainer: Any, run: Run) -> dict[str, Any]:
    """Return what is known of the data. Samples are read once a run: a card is written with every state."""
    if run.data_facts is None:
        arguments: Any = run.arguments
        facts = {"train_dataset": _facts_of(trainer, arguments.train_dataset)}
        facts["eval_dataset"] = {
            name: _facts_of(trainer, dataset) for name, dataset in named_sets(arguments.eval_dataset).items()
        }
        run.data_facts = facts
    return run.data_facts


def _facts_of(trainer: Any, dataset: Any) -> dict[str, Any]:
    source: Any = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    facts: dict[str, Any] = {"class": name_of_data(dataset), "length": length_of(source)}
    name = getattr(source, "name", None)
    if isinstance(name, str):
        facts["name"] = name
    if not is_map_style(source):
        return {**facts, "first_samples": None, "why": "the data is read without an index"}
    # Augmentations draw random numbers: here always the same ones, and the run's go on as they were.
    with preserving_random_state(trainer.device):
        seed_process(0, 0)
        try:
            twin = _copy_outside(source)
            samples = [twin[index] for index in range(min(FIRST_SAMPLES, len(source)))]
            return {**facts, "first_samples": _digest_of_samples(samples)}
        # Whatever a data set of the user's raises, the run goes on.
        except Exception as error:
            return {**facts, "first_samples": None, "why": f"reading raised {type(error).__name__}: {error}"}


def _copy_outside(source: Any) -> Any:
    """Return a copy that shares its contents.

    A data set may count its reads, or open a file at the first one, which workers must not inherit.
    """
    twin = copy.copy(source)
    inner = getattr(twin, "dataset", None)
    if inner is not None and "dataset" in getattr(twin, "__dict__", {}):
        twin.dataset = _copy_outside(inner)
    return twin


def _digest_of_samples(samples: list[Any]) -> str | None:
    if all(map(_is_plain, samples)):
        return digest_of_value(samples)
    digest = digest_of(samples)
    return None if digest is None else digest.hex()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (torch.Tensor, str, bytes, bool, int, float))


def _count_interruptions(launches: Sequence[Mapping[str, Any]]) -> int:
    """Return how often a call of `train` went on with the stage that another had begun."""
    stages = [launch["stage"] for launch in launches]
    return len(stages) - len(set(stages))


def _metrics(trainer: Any) -> dict[str, Any]:
    """Return the latest value of each metric, with its update."""
    return {
        record["name"]: {"value": record["value"], "update": record["update"]}
        for record in trainer.run_history.get_records()
    }


def _states(trainer: Any, known: KnownStates | None) -> dict[str, Any]:
    if known is None:
        newest = trainer.last_checkpoint
        if newest is None or not newest.parent.is_dir():
            return {}
        known = KnownStates(newest.parent)
        known.refresh()
    return {
        path.name: {"update": facts.progress["updates_completed"], "digest": facts.digest}
        for path, facts in known.of_run(str(trainer.run_id)).items()
    }


def _needs(card: Mapping[str, Any], run: Run) -> list[str]:
    """Return in sentences what is needed to repeat the run, and what may keep it from being exact."""
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    hardware, seed = card["hardware"], card["seed"]
    processes = dict.fromkeys(launch["num_processes"] for launch in card["launches"])
    numbers = " and then ".join(f"{each} process{'' if each == 1 else 'es'}" for each in processes)
    threads = card["settings"]["threads"]
    needs = [
        f"Install {versions}.",
        f"Start {numbers} on {hardware['device']} (layout: {hardware['layout']}; precision: "
        f"{hardware['mixed_precision']}; threads: {threads}).",
        "Read the same data: digests of the first samples stand under 'data'.",
    ]
    if seed["seed"] is None:
        needs.append(
            f"seed was None: call torch.manual_seed({seed['data_seed']}) before train for the order of the "
            "data. Nothing repeats other random numbers, so pass seed to the Trainer in later runs."
        )
    else:
        needs.append(f"Pass seed={seed['seed']} to the Trainer.")
    if "weights" in run.beginning:
        needs.append("Begin with the same weights: their digest is beginning.weights.")
    loader = run.train_loader
    if loader is not None and run.arguments is not None:
        needs += loader.limits_of_exactness(0, loader.group.size, run.arguments.seed_each_sample)
    return needs


def _class_of(value: Any) -> str | None:
    return None if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def _text(value: Any) -> str:
    """Return what a value is, without its address in memory, so that two runs show the same."""
    if isinstance(value, functools.partial):
        given = [*map(_text, value.args), *(f"{name}={_text(each)}" for name, each in value.keywords.items())]
        return f"{_text(value.func)}({', '.join(given)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
    try:
        # Two callbacks may differ after the part that a preview shows.
        shown = repr(value) if isinstance(value, TrainerCallback) else preview(value)
    # One value that cannot be shown is no reason to have no card.
    except Exception as error:
        return f"{_class_of(value)}, which raises {type(error).__name__} when it is shown"
    return _ADDRESS.sub("", shown)


def _as_json(value: Any, outer: tuple[int, ...] = ()) -> Any:
    """Return `value` with what JSON does not know as text.

    Args:
        outer: identities of what holds it, which may hold itself.
    """
    if id(value) in outer:
        return "the same again"
    inside = (*outer, id(value))
    if isinstance(value, Mapping):
        texts = (name if isinstance(name, str) else _text(name) for name in value)
        return dict(zip(texts, (_as_json(each, inside) for each in value.values()), strict=True))
    if isinstance(value, (list, tuple)):
        return [_as_json(each, inside) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else _text(value)
