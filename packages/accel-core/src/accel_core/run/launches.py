"""What a run began with, and how each call of `train` has read the data. The training states hold both.

By them `Trainer.replay` knows whether it begins as the run did, and `samples_of` which samples an update saw.
"""

from __future__ import annotations

from typing import Any

from torch.nn.parameter import is_lazy

from ..data.recorded_order import record_order
from ..engines.trained import without_wrappers
from ..state.digests import digest_of_value
from ..state.random import capture_random_state
from .run import Run
from .stages import Start
from .trainer_parts import TrainerParts


def note_launch(trainer: TrainerParts, run: Run, start: Start) -> None:
    """Note what this call of `train` begins with. No communication."""
    before = start.run_before
    if start.state is not None:
        run.beginning = start.state.get("beginning", {})
        # A state of an older version knows of none, so what was seen before it is not known.
        run.launches = start.state.get("launches", [])
    elif before is not None:
        run.beginning, run.launches = before.beginning, before.launches
    else:
        run.beginning = describe_beginning(trainer, run)
    # The counters of a state are restored later.
    progress = trainer.run_progress.state_dict() if start.state is None else start.state["run_progress"]
    config = trainer.run_config
    launch = {
        "stage": progress["stage"],
        "updates_completed": progress["updates_completed"],
        "order_epoch": progress["order_epoch"],
        "samples_completed_in_epoch": progress["samples_completed_in_epoch"],
        "num_processes": config.num_processes,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "order": record_order(run.loader_to_train),
    }
    run.launches = [*run.launches, launch]


def describe_beginning(trainer: TrainerParts, run: Run) -> dict[str, Any]:
    """Return digests of what the trainer holds before its first update, on the main process.

    An engine that spreads the parameters has no whole ones to hash, and a lazy module has none yet.
    """
    beginning: dict[str, Any] = {
        "order_epoch": trainer.run_progress.order_epoch,
        "random": digest_of_value(capture_random_state(trainer.device)),
    }
    trained = run.engine.trained
    modules = {} if trained is None else dict(trained.modules)
    modules = {"": without_wrappers(trainer.model), **modules}
    tensors = [tensor for module in modules.values() for tensor in module.parameters()]
    if run.engine.shards_parameters or any(map(is_lazy, tensors)) or not trainer.is_main_process:
        return beginning
    beginning["weights"] = digest_of_value(
        {name: dict(module.state_dict()) for name, module in modules.items()}
    )
    return beginning
