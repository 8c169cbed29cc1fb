"""The calls that compute outputs: joined in one piece, or a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..checks.values import check_callable, check_choice
from ..data.loader import ShardedDataLoader
from ..data.order import shard_of
from ..errors import ConfigurationError
from ..processes.collectives import gather_on_main, run_on_main
from . import preparing
from .predictions import collect_predictions, join, join_over_processes, to_cpu
from .run import Run
from .steps import Step, report_left_out
from .train_arguments import EvaluationArguments
from .trainer_parts import TrainerParts


def calculation(trainer: TrainerParts, outputs: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """Return what computes the outputs of a batch: `outputs` of what the trainer's method gives."""
    check_callable("outputs", outputs, "Pass a function of the outputs of one batch, or leave it out.")
    if outputs is None:
        return trainer.calculate_predictions
    return lambda batch: outputs(trainer.calculate_predictions(batch))


def predict(
    trainer: TrainerParts, arguments: EvaluationArguments, on: str, outputs: Callable[[Any], Any] | None
) -> Any:
    """Return what `Trainer.predict` promises. Every process takes part."""
    check_choice("on", on, ("all", "main"))
    calculate = calculation(trainer, outputs)
    with preparing.running(trainer, Run(trainer.engine)) as run:
        loader = _begin(trainer, run, arguments)
        with preparing.evaluating(trainer, run):
            parts = collect_predictions(calculate, run, loader)
        report_left_out(loader)
        group, padding = run.engine.group, trainer.prediction_padding
        if on == "all":
            return join_over_processes(parts, group, padding, arguments.data_is_sharded)
        gathered = [parts] if group.is_single else group.one_of_each_copy(gather_on_main(parts))
        joined: list[Any] = []
        # An error of the main process is raised on all, but its result, which `append` hides, is not sent.
        run_on_main(
            lambda: joined.append(join(gathered, padding, arguments.data_is_sharded)), trainer.is_main_process
        )
        return joined[0] if joined else None


def iterate(trainer: TrainerParts, arguments: EvaluationArguments) -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield what `Trainer.iterate_predictions` promises."""
    with preparing.running(trainer, Run(trainer.engine)) as run:
        loader = _begin(trainer, run, arguments)
        _check_positions(loader)
        is_recording = torch.is_grad_enabled()
        with preparing.evaluating(trainer, run):
            first = 0
            steps = run.eval_steps(loader)
            totals = loader.plan()
            for number, step in enumerate(steps):
                # A padding step computes for engines whose forward needs every process, and is thrown away.
                is_computed = not step.is_padding or run.engine.has_collective_forward
                output = None
                if is_computed and step.batch is not None:
                    output = to_cpu(trainer.calculate_predictions(step.batch))
                size = _size(step, output)
                total = size if totals is None else totals[number][0]
                start = first + (0 if loader.group.is_single else shard_of(total, loader.group).start)
                first += total
                if step.is_padding:
                    continue
                try:
                    # The loop of the caller computes with gradients if it did before.
                    with torch.set_grad_enabled(is_recording):
                        yield torch.arange(start, start + size), output
                # The caller has left its loop, which is no error of the run.
                except GeneratorExit:
                    return


def _begin(trainer: TrainerParts, run: Run, arguments: EvaluationArguments) -> ShardedDataLoader:
    given = {"": arguments}
    loader = preparing.begin_evaluation(
        trainer, run, trainer._training_run, given, arguments.collate_fn, computes_loss=False
    )[""]
    loader.check_order()
    return loader


def _check_positions(loader: ShardedDataLoader) -> None:
    """Raise unless each process knows the places of its samples without asking the others."""
    if not loader.group.is_single and (not loader.is_sized or loader.batch_size is None):
        raise ConfigurationError(
            f"iterate_predictions cannot tell the places of samples in {loader!r} on several processes, "
            "since the sizes of its batches are not known beforehand. Pass data with __getitem__ and "
            "__len__, or use predict."
        )


def _size(step: Step, output: Any) -> int:
    if step.num_samples is not None:
        return step.num_samples
    if step.planned_items is not None:
        return int(step.planned_items)
    while isinstance(output, (dict, list, tuple)) and output:
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return 0 if output is None else len(output)
