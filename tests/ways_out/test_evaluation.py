"""Each way out that an error about evaluation names works: the mistake is made, then what the message says instead.

A new message about evaluation needs a row here: the texts of all three packages are read.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from timm.scheduler import PlateauLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from accel_callbacks import (
    EarlyStoppingCallback,
    LimitBatchesCallback,
    MetricsCallback,
    ModelEmaCallback,
    PredictionMetricsCallback,
    StepBasedEvaluationCallback,
    find_batch_size,
)
from accel_core import Trainer, TrainerCallback
from accel_integrations.timm_adapter import timm_scheduler_fn
from case_runner import run_as_script
from tiny import Stream, tiny_data, tiny_network, tiny_trainer
from ways_out import (
    ABOUT_EVALUATION,
    Row,
    check_told,
    make_mistake_and_ways_out,
    name_of,
    texts_of_errors,
    told,
)

DATA, OTHER = tiny_data(16), tiny_data(7)
ACCURACY = MulticlassAccuracy(2)


def train(*callbacks: Any, data: Any = DATA, trainer: Any = None, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=callbacks) if trainer is None else trainer
    trainer.train(data, **{"num_epochs": 1, "eval_dataset": OTHER, "per_device_batch_size": 4, **kwargs})
    return trainer


def on_event(event: str, act: Callable[[Trainer], Any]) -> TrainerCallback:
    """A callback that acts in one event."""

    def method(self: Any, trainer: Trainer, **kwargs: Any) -> None:
        act(trainer)

    return type("Acts", (TrainerCallback,), {event: method})()


def with_step(step: Any, **methods: Any) -> Trainer:
    """A trainer with a loss step of its own, for training and evaluation."""
    own = {"calculate_train_batch_loss": step, "calculate_eval_batch_loss": step, **methods}
    return tiny_trainer(type("OwnTrainer", (Trainer,), own))


def predicting(calculate: Any, **attributes: Any) -> Any:
    trainer = tiny_trainer(type("OwnTrainer", (Trainer,), {"calculate_predictions": calculate}))
    vars(trainer).update(attributes)
    return trainer.predict(OTHER, 4)


def default_loss(self: Trainer, batch: Any) -> dict[str, Any]:
    outputs = self.model(batch[0])
    return {"loss": nn.functional.cross_entropy(outputs, batch[1]), "batch_size": len(outputs)}


def with_outputs(self: Trainer, batch: Any) -> dict[str, Any]:
    return {**default_loss(self, batch), "model_outputs": self.model(batch[0])}


MAPPINGS = [{"inputs": inputs, "targets": target} for inputs, target in DATA]


def mapping_loss(self: Trainer, batch: Any) -> dict[str, Any]:
    return with_outputs(self, (batch["inputs"], batch["targets"]))


class Words:
    """A loader of another kind than torch's: ready batches, of which it does not say how large they are."""

    batch_size = None

    def __iter__(self) -> Iterator[Any]:
        return iter([("words", torch.tensor(1.0))] * 2)


class Ignoring(nn.Module):
    """Takes words, of which it makes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, words: Any) -> torch.Tensor:
        return self.bias * 1.0


def counting_four(self: Trainer, batch: Any) -> dict[str, Any]:
    outputs = self.model(batch[0])
    return {"loss": (outputs - batch[1]) ** 2, "model_outputs": outputs, "batch_size": 4}


def one_target(samples: Any) -> Any:
    inputs, targets = zip(*samples, strict=True)
    return torch.stack(inputs), torch.stack([*targets, *targets])


def double_loss(self: Trainer, batch: Any) -> dict[str, Any]:
    outputs = self.model(batch[0])
    return {
        "loss": nn.functional.cross_entropy(torch.cat([outputs, outputs]), batch[1]),
        "batch_size": len(outputs),
    }


def plateau(**kwargs: Any) -> dict[str, Any]:
    return {"create_scheduler_fn": ReduceLROnPlateau, **kwargs}


def confusion(self: Any, trainer: Trainer, batch: Any, batch_output: Any) -> None:
    self.matrix.update(batch_output["model_outputs"], batch[1])


KEEPS_MATRIX = type(
    "Keeps", (TrainerCallback,), {"matrix": MulticlassConfusionMatrix(2), "on_eval_step_end": confusion}
)
STEPS = functools.partial(StepLR, step_size=1)


def save(trainer: Trainer) -> None:
    trainer.save_training_state(f"{trainer.run_id}/state")


def ragged(self: Trainer, batch: Any) -> torch.Tensor:
    return torch.ones(len(batch[0]), len(batch[0]))


def parts(self: Trainer, batch: Any) -> Any:
    return [torch.ones(len(batch[0])) for _ in range(len(batch[0]))]


def _by_plateau(kind: Any, **kwargs: Any) -> Trainer:
    return train(create_scheduler_fn=timm_scheduler_fn(kind, **kwargs), scheduler_step_every="epoch")


ROWS: tuple[Row, ...] = (
    Row(
        "Two callbacks record '",
        lambda: train(ModelEmaCallback(), ModelEmaCallback(save_path=None)),
        (lambda: train(ModelEmaCallback(), ModelEmaCallback(0.9, True, False, save_path=None)),),
    ),
    Row(
        "but must be a torchmetrics Metric, a MetricCollection",
        lambda: MetricsCallback({"accuracy": 3}),
        (lambda: train(MetricsCallback({"accuracy": MulticlassAccuracy(num_classes=2)})),),
    ),
    Row(
        " the metrics are given batch[1] as targets",
        lambda: _measure_mappings(),
        (
            lambda: _measure_mappings(
                update=lambda metric, batch, output: metric.update(output["model_outputs"], batch["targets"])
            ),
        ),
    ),
    Row(
        " the metrics need 'model_outputs'",
        lambda: _measure(default_loss),
        (
            lambda: _measure(with_outputs),
            lambda: _measure(
                default_loss, update=lambda metric, batch, output: metric.update(batch[1], batch[1])
            ),
        ),
    ),
    Row(
        "but must give a number, a vector or a dict.",
        lambda: train(MetricsCallback(MulticlassConfusionMatrix(2))),
        (lambda: train(KEEPS_MATRIX()),),
    ),
    Row(
        "but must be a dict of functions by name.",
        lambda: PredictionMetricsCallback(len),  # type: ignore[arg-type]
        (
            lambda: train(
                PredictionMetricsCallback(
                    {"roc_auc": lambda outputs, targets: roc_auc_score(targets, outputs[:, 1])}
                )
            ),
        ),
    ),
    Row(
        "but PredictionMetricsCallback measures evaluations only",
        lambda: PredictionMetricsCallback({"size": lambda a, b: 1.0}, on="train"),
        (
            lambda: train(PredictionMetricsCallback({"size": lambda a, b: 1.0}, on="eval")),
            lambda: train(MetricsCallback(ACCURACY, on="train")),
        ),
    ),
    Row(
        ", but must be one number. Return float(value)",
        lambda: train(PredictionMetricsCallback({"two": lambda a, b: [1.0, 2.0]})),
        (
            lambda: train(PredictionMetricsCallback({"one": lambda a, b: float(np.float32(1))})),
            lambda: train(PredictionMetricsCallback({"first": lambda a, b: 1.0, "second": lambda a, b: 2.0})),
        ),
    ),
    Row(
        "Two evaluation sets record ",
        lambda: _measure_sets("far_accuracy", "far"),
        (lambda: _measure_sets("other", "far"), lambda: _measure_sets("far_accuracy", "near")),
    ),
    Row(
        "so the run history would have two values of it per epoch.",
        lambda: train(MetricsCallback(ACCURACY), MetricsCallback(MulticlassAccuracy(2))),
        (
            lambda: train(MetricsCallback(ACCURACY), MetricsCallback(MulticlassAccuracy(2), prefix="my_")),
            lambda: train(MetricsCallback(ACCURACY), MetricsCallback({"other": MulticlassAccuracy(2)})),
        ),
    ),
    Row(
        "eval_every_n_updates is None",
        lambda: StepBasedEvaluationCallback(None),  # type: ignore[arg-type]
        (train,),
    ),
    Row(
        "StepBasedEvaluationCallback has nothing to evaluate on",
        lambda: train(StepBasedEvaluationCallback(2), eval_dataset=None),
        (
            lambda: train(StepBasedEvaluationCallback(2)),
            lambda: train(StepBasedEvaluationCallback(2, OTHER), eval_dataset=None),
            lambda: train(eval_dataset=None),
        ),
    ),
    Row(
        "but must be the name of a metric, such as 'eval_loss_epoch'",
        lambda: EarlyStoppingCallback(watch_metric=3),  # type: ignore[arg-type]
        (lambda: train(EarlyStoppingCallback(watch_metric="eval_loss_epoch")),),
    ),
    Row(
        " watches 'eval_loss_epoch', but train got no eval_dataset",
        lambda: train(EarlyStoppingCallback(), eval_dataset=None),
        (
            lambda: train(EarlyStoppingCallback()),
            lambda: train(EarlyStoppingCallback(watch_metric="train_loss_epoch"), eval_dataset=None),
        ),
    ),
    Row(
        " watches 'eval_loss_epoch', but the evaluation sets are called ",
        lambda: train(EarlyStoppingCallback(), eval_dataset={"far": OTHER}),
        (
            lambda: train(
                EarlyStoppingCallback(watch_metric="far_eval_loss_epoch"), eval_dataset={"far": OTHER}
            ),
        ),
    ),
    Row(
        ", but the run history has only ",
        lambda: train(EarlyStoppingCallback(watch_metric="eval_los_epoch")),
        (lambda: train(EarlyStoppingCallback(watch_metric="eval_loss_epoch")),),
    ),
    Row(
        "but eval_only or intermediate_only leave training as it is",
        lambda: LimitBatchesCallback(2, eval_only=True, overfit=True),
        (
            lambda: train(LimitBatchesCallback(2, eval_only=True)),
            lambda: train(LimitBatchesCallback(2, overfit=True)),
        ),
    ),
    Row(
        "optimizer is None, but train needs one.",
        lambda: train(trainer=Trainer(tiny_network(), nn.functional.cross_entropy, None, [])),
        (
            train,
            lambda: Trainer(tiny_network(), nn.functional.cross_entropy, None, []).evaluate(OTHER),
        ),
    ),
    Row(
        " was called inside a run of the same trainer",
        lambda: train(on_event("on_optimizer_step_end", lambda trainer: trainer.evaluate(OTHER))),
        (
            lambda: train().evaluate(OTHER),
            lambda: train(
                on_event(
                    "on_optimizer_step_end",
                    lambda trainer: trainer.run_eval_epoch(
                        OTHER, metric_prefix="other", is_intermediate=True
                    ),
                )
            ),
        ),
    ),
    Row(
        "predict was given data that a ",
        lambda: tiny_trainer().predict(DataLoader(DATA, batch_size=4, shuffle=True)),
        (
            lambda: tiny_trainer().predict(DATA, 4),
            lambda: tiny_trainer().predict(DataLoader(DATA, batch_size=4, shuffle=False)),
        ),
    ),
    Row(
        ", but the default loss step needs (inputs, targets).",
        lambda: train(data=MAPPINGS),
        (
            lambda: train(data=MAPPINGS, eval_dataset=MAPPINGS, trainer=with_step(mapping_loss)),
            lambda: train(data=DATA),
        ),
    ),
    Row(
        " is not known. Override calculate_train_batch_loss",
        lambda: _train_words(),
        (
            lambda: _train_words(
                calculate_train_batch_loss=counting_four, calculate_eval_batch_loss=counting_four
            ),
        ),
    ),
    Row(
        "so it is not known what the loss is the mean of.",
        lambda: _train_doubled(default_double_loss),
        (lambda: _train_doubled(double_loss), train),
    ),
    Row(
        " data sets, whose metrics would have no names",
        lambda: train(eval_dataset=[OTHER, DATA]),
        (
            lambda: train(eval_dataset={"": OTHER, "shifted": DATA}),
            lambda: train(eval_dataset=ConcatDataset([OTHER, DATA])),
        ),
    ),
    Row(
        "but each value must be a whole evaluation set.",
        lambda: train(eval_dataset=dict(zip("xy", OTHER.tensors, strict=True))),
        (lambda: train(eval_dataset={"": TensorDataset(*OTHER.tensors)}),),
    ),
    Row(
        "stands in the names of other metrics",
        lambda: train(eval_dataset={"train": OTHER}),
        (lambda: train(eval_dataset={"train_set": OTHER}),),
    ),
    Row(
        " Use the names of eval_dataset.",
        lambda: train(eval_dataset={"far": OTHER}, eval_per_device_batch_size={"fa": 2}),
        (lambda: train(eval_dataset={"far": OTHER}, eval_per_device_batch_size={"far": 2}),),
    ),
    Row(
        "eval_dataset is None, so there is nothing to evaluate on. Pass eval_dataset to train.",
        lambda: train(on_event("on_train_epoch_end", Trainer.run_eval_epoch), eval_dataset=None),
        (lambda: train(on_event("on_train_epoch_end", lambda t: t.run_eval_epoch(metric_prefix="more"))),),
    ),
    Row(
        " batches of the data are None, so there is nothing to predict.",
        lambda: tiny_trainer().predict(OTHER, 4, collate_fn=lambda samples: None),
        (lambda: tiny_trainer().predict(OTHER, 4),),
    ),
    Row(
        "but must return tensors with a first dimension of samples",
        lambda: predicting(lambda self, batch: 3.0),
        (
            lambda: predicting(lambda self, batch: {"rows": self.model(batch[0])}),
            lambda: predicting(lambda self, batch: (self.model(batch[0]), ["name"] * len(batch[0]))),
            lambda: predicting(lambda self, batch: [1.0] * len(batch[0])),
        ),
    ),
    Row(
        " parts for different batches, but it must have the same parts for each.",
        lambda: predicting(parts),
        (lambda: predicting(lambda self, batch: torch.stack(parts(self, batch))[:, :1]),),
    ),
    Row(
        "which cannot be joined on the first dimension. Pad them to one shape",
        lambda: predicting(ragged),
        (
            lambda: predicting(
                lambda self, batch: nn.functional.pad(ragged(self, batch), (0, 4 - len(batch[0])))
            ),
            lambda: predicting(ragged, prediction_padding=0.0),
        ),
    ),
    Row(
        " was called outside of a run, but needs what a run has prepared.",
        lambda: tiny_trainer().run_eval_epoch(OTHER),
        (
            lambda: tiny_trainer().evaluate(OTHER),
            lambda: train(
                on_event("on_train_epoch_end", lambda t: t.run_eval_epoch(OTHER, metric_prefix="more"))
            ),
        ),
    ),
    Row(
        "but what it returns has none. Call gather_with_grad(tensor) for a loss",
        lambda: train(trainer=with_step(_gathering(lambda trainer, rows: trainer.gather(rows)))),
        (
            lambda: train(
                trainer=with_step(_gathering(lambda trainer, rows: trainer.gather_with_grad(rows)))
            ),
            lambda: train(trainer=with_step(_gathering(lambda trainer, rows: trainer.gather(rows.detach())))),
        ),
    ),
    Row(
        ", but must be a number or a tensor of one element.",
        lambda: train().run_history.update_metric("two", torch.ones(2)),
        (lambda: [train().run_history.update_metric(name, 1.0) for name in ("first", "second")],),
    ),
    Row(
        "save_training_state was called between two sets of an evaluation in mid-epoch",
        lambda: train(
            StepBasedEvaluationCallback(2),
            on_event("on_eval_epoch_end", save),
            eval_dataset={"": OTHER, "far": OTHER},
        ),
        tuple(
            functools.partial(
                lambda event: train(
                    StepBasedEvaluationCallback(2),
                    on_event(event, save),
                    eval_dataset={"": OTHER, "far": OTHER},
                ),
                event,
            )
            for event in ("on_optimizer_step_end", "on_evaluation_end")
        ),
    ),
    Row(
        "scheduler_step_every is 'evaluation', but eval_dataset is None",
        lambda: train(eval_dataset=None, create_scheduler_fn=STEPS, scheduler_step_every="evaluation"),
        (
            lambda: train(create_scheduler_fn=STEPS, scheduler_step_every="evaluation"),
            lambda: train(eval_dataset=None, create_scheduler_fn=STEPS, scheduler_step_every="epoch"),
        ),
    ),
    Row(
        "scheduler_metric is 'eval_loss_epoch', but the evaluation sets are called ",
        lambda: train(eval_dataset={"far": OTHER}, **plateau()),
        (lambda: train(eval_dataset={"far": OTHER}, **plateau(scheduler_metric="far_eval_loss_epoch")),),
    ),
    Row(
        "scheduler_metric is 'eval_loss_epoch', which ",
        lambda: train(eval_dataset=None, **plateau()),
        (
            lambda: train(**plateau()),
            lambda: train(eval_dataset=None, **plateau(scheduler_metric="train_loss_epoch")),
        ),
    ),
    Row(
        ", but must be a string. Pass the name of a metric of the run history",
        lambda: train(scheduler_metric=3),
        (lambda: train(**plateau(scheduler_metric="eval_loss_epoch")),),
    ),
    Row(
        "eval_at_start is True, but eval_dataset is None",
        lambda: train(eval_at_start=True, eval_dataset=None),
        (lambda: train(eval_at_start=True), lambda: train(eval_dataset=None)),
    ),
    Row(
        "dataset is None, and no run before had an eval_dataset.",
        lambda: tiny_trainer().evaluate(),
        (lambda: tiny_trainer().evaluate(OTHER),),
    ),
    Row(
        " of the arguments of train. Leave out the rest",
        lambda: find_batch_size(tiny_trainer(), DATA, 4, eval_dataset=OTHER),
        (lambda: find_batch_size(tiny_trainer(), DATA, 4),),
    ),
    Row(
        "The run history has no metric {}, only {}.",
        lambda: train().run_history.get_latest_metric("eval_los_epoch"),
        (lambda: train().run_history.get_latest_metric("eval_loss_epoch"),),
    ),
    Row(
        "run_config is known from the first run on.",
        lambda: tiny_trainer().run_config,
        (lambda: train().run_config, lambda: _evaluated().run_config),
    ),
    Row(
        "unless scheduler_metric names another. Pass mode=",
        lambda: timm_scheduler_fn(PlateauLRScheduler),
        tuple(functools.partial(_by_plateau, PlateauLRScheduler, mode=mode) for mode in ("min", "max")),
    ),
    Row(
        "plateau_mode is not given, so ",
        lambda: timm_scheduler_fn("plateau", num_epochs=2),
        tuple(
            functools.partial(_by_plateau, "plateau", num_epochs=2, plateau_mode=mode)
            for mode in ("min", "max")
        ),
    ),
)


def _measure_mappings(**kwargs: Any) -> Trainer:
    trainer = with_step(mapping_loss)
    trainer.callbacks.add_callback(MetricsCallback(MulticlassAccuracy(2), **kwargs))
    return train(data=MAPPINGS, eval_dataset=MAPPINGS, trainer=trainer)


def _measure(step: Any, **kwargs: Any) -> Trainer:
    trainer = with_step(step)
    trainer.callbacks.add_callback(MetricsCallback(MulticlassAccuracy(2), **kwargs))
    return train(trainer=trainer)


def _measure_sets(metric: str, name: str) -> Trainer:
    metrics = {"accuracy": MulticlassAccuracy(2), metric: MulticlassAccuracy(2)}
    return train(MetricsCallback(metrics), eval_dataset={"": OTHER, name: OTHER})


def default_double_loss(self: Trainer, batch: Any) -> dict[str, Any]:
    inputs = torch.cat([batch[0], batch[0]])
    return Trainer.calculate_train_batch_loss(self, (inputs, batch[1]))


def _train_doubled(step: Any) -> Trainer:
    return train(trainer=with_step(step), collate_fn=one_target)


def _train_words(**own: Any) -> Trainer:
    model = Ignoring()
    kind = type("OwnTrainer", (Trainer,), own)
    trainer = kind(model, nn.functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), [])
    return train(data=Words(), eval_dataset=None, trainer=trainer)


def _evaluated() -> Trainer:
    trainer = tiny_trainer()
    trainer.evaluate(OTHER)
    return trainer


def _gathering(gather: Callable[[Trainer, torch.Tensor], torch.Tensor]) -> Any:
    def step(self: Trainer, batch: Any) -> dict[str, Any]:
        output = with_outputs(self, batch)
        gathered = gather(self, output["model_outputs"])
        return {**output, "loss": output["loss"] + 0.0 * gathered.sum()}

    return step


# ---------------------------------------------------------------------- on two processes


def uneven(trainer: Trainer) -> torch.Tensor:
    return torch.ones(2, 1 + trainer.accelerator.process_index)


def padded(trainer: Trainer) -> torch.Tensor:
    return nn.functional.pad(uneven(trainer), (0, 1 - trainer.accelerator.process_index))


def gather_shapes(batch_size: int) -> list[str]:
    def at_end(act: Any) -> Any:
        return lambda: train(on_event("on_optimizer_step_end", act))

    return told(
        at_end(lambda trainer: trainer.gather(uneven(trainer))),
        at_end(lambda trainer: trainer.gather(uneven(trainer), padding_value=0.0)),
    )


def gather_grad_shapes(batch_size: int) -> list[str]:
    def stepping(rows: Any) -> Any:
        return lambda: train(
            trainer=with_step(_gathering(lambda trainer, _: trainer.gather_with_grad(rows(trainer))))
        )

    return told(stepping(uneven), stepping(padded))


def collective_in_a_step(batch_size: int) -> list[str]:
    def rows(trainer: Trainer) -> torch.Tensor:
        return torch.ones(1 + trainer.accelerator.process_index, 2)

    def evaluate(call: Any) -> Any:
        return lambda: tiny_trainer(callbacks=[on_event("on_eval_step_end", call)]).evaluate(DATA, 4)

    return told(
        evaluate(lambda trainer: trainer.accelerator.gather(rows(trainer))),
        evaluate(lambda trainer: trainer.gather(rows(trainer))),
    )


def iterate_a_stream(batch_size: int) -> list[str]:
    return told(
        lambda: list(tiny_trainer().iterate_predictions(Stream(OTHER), 4)),
        lambda: list(tiny_trainer().iterate_predictions(OTHER, 4)),
        lambda: tiny_trainer().predict(Stream(OTHER), 4),
    )


ON_PROCESSES = {
    "which differ beyond the first dimension. Pass padding_value": gather_shapes,
    "differ beyond the first dimension. Pad the shorter ones before.": gather_grad_shapes,
    " was called inside a step with the shapes ": collective_in_a_step,
    "iterate_predictions cannot tell the places of samples in ": iterate_a_stream,
}
CASES = ON_PROCESSES


# ---------------------------------------------------------------------- the tests


def test_every_error_about_evaluation_has_a_row() -> None:
    known = [*(row.text for row in ROWS), *ON_PROCESSES]
    texts = [text for text in texts_of_errors(".") if ABOUT_EVALUATION.search(text)]
    assert len(texts) >= 40
    assert [text for text in texts if not any(each in text for each in known)] == []
    assert [each for each in known if not any(each in text for text in texts)] == []


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_what_an_error_about_evaluation_says_instead_works(row: Row) -> None:
    make_mistake_and_ways_out(row)


@pytest.mark.slow
@pytest.mark.parametrize("text", ON_PROCESSES)
def test_what_an_error_on_two_processes_says_instead_works(outcome: Any, text: str) -> None:
    for said in outcome.of(text):
        check_told(text, said)


if __name__ == "__main__":
    run_as_script(CASES)
