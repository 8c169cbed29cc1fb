"""What each layout of docs/distributed.md promises: the cases, and the tests of what they give.

A file of tests names the layout, starts its cases on several processes, and lets its class have the tests:

    LAYOUT = Layout("FSDP2")
    CASES = LAYOUT.cases()

    @pytest.fixture(scope="module")
    def layout(): return LAYOUT

    @pytest.fixture(scope="module")
    def outcome(tmp_path_factory): return compare(CASES, __file__, 2, tmp_path_factory.mktemp("cases"))

    class TestFsdp2(LayoutPromises, GoesOnAnywhere): ...

Weights, losses, metrics and learning rates of each update are compared, on every process, with one process that
takes the same batches.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import MetricsCallback
from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_core.state.files import read_tensors
from case_runner import Cases, Outcome, shared_folder
from tiny import SaveAt

GLOBAL_BATCH = 12
"""Samples of a step on all processes, whatever their number is."""
NUM_SAMPLES, NUM_EPOCHS, ACCUMULATION = 61, 3, 2
"""The last window of an epoch is short, and its last step has one sample: the other processes have none."""
SAVED_AT = 5
"""Of 9 updates: in the middle of the second epoch."""
EVALUATED = (61, 13, 5, 3, 1)
HALVED = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)


def create_network(dtype: torch.dtype) -> nn.Sequential:
    layers = [nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(dtype)


def make_data(num_samples: int, dtype: torch.dtype) -> TensorDataset:
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


class Rates(TrainerCallback):
    """Puts the learning rate into the history."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        trainer.run_history.update_metric("rate", trainer.optimizer.param_groups[0]["lr"])


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout, and what its runs are made of."""

    name: str
    """In `trainer.describe()`."""
    create_model: Callable[[torch.dtype], nn.Module] = create_network
    create_accelerator: Callable[[], Accelerator] = Accelerator
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    """Relative and absolute. Adaptive optimizers magnify that processes add in another order."""
    resumes_to_the_bit: bool = True
    suffix: str = ""
    """Of the names of the cases, where a file has several of a layout."""

    def create_trainer(
        self,
        callbacks: Sequence[TrainerCallback] = (),
        seed: int = 3,
        trainer_class: type[Trainer] = Trainer,
        loss_func: nn.Module | None = None,
    ) -> Trainer:
        torch.manual_seed(seed)
        model, loss_func = self.create_model(self.dtype), loss_func or nn.CrossEntropyLoss()
        optimizer = torch.optim.AdamW([*model.parameters(), *loss_func.parameters()], lr=0.02)
        accuracy = MetricsCallback({"accuracy": MulticlassAccuracy(3, average="micro")})
        accelerator = self.create_accelerator()
        callbacks = [accuracy, *callbacks]
        return trainer_class(model, loss_func, optimizer, callbacks, accelerator=accelerator, seed=7)

    def run(self, trainer: Trainer, resume_from: Path | None = None, **kwargs: Any) -> dict[str, Any]:
        """Train, and return all that must not depend on the number of processes."""
        trainer.train(
            make_data(NUM_SAMPLES, self.dtype),
            NUM_EPOCHS,
            eval_dataset=make_data(13, self.dtype),
            per_device_batch_size=GLOBAL_BATCH // trainer.data_group.size,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_clip_norm=0.5,
            create_scheduler_fn=HALVED,
            resume_from=resume_from,
            **kwargs,
        )
        path = shared_folder() / "model.safetensors"
        trainer.save_checkpoint(path)
        records = trainer.run_history.to_records()
        assert {"train_loss_epoch", "eval_loss_epoch", "accuracy", "rate"} <= {r["name"] for r in records}
        return {
            "weights": read_tensors(path),
            "history": {f"{r['name']} {r['epoch']}/{r['update']}": r["value"] for r in records},
            "updates": trainer.run_progress.updates_completed,
        }

    def state_in(self, folder: Path) -> Path:
        return folder / f"state{self.suffix}".replace(" ", "_")

    def train(self, batch_size: int) -> dict[str, Any]:
        """The state stays in the folder of the launch, where other launches find it."""
        folder = shared_folder() if Accelerator().num_processes == 1 else Path(sys.argv[2])
        return self.run(self.create_trainer([Rates(), SaveAt(SAVED_AT, self.state_in(folder))]))

    def predict(self, batch_size: int) -> Any:
        """Sizes at which processes have no sample, before and after training."""
        trainer = self.create_trainer([Rates()])
        size = {"per_device_batch_size": GLOBAL_BATCH // trainer.data_group.size}
        before = [trainer.evaluate(make_data(number, self.dtype), **size) for number in (13, 1)]
        self.run(trainer)
        after = [trainer.evaluate(make_data(number, self.dtype), **size) for number in EVALUATED]
        predicted = [trainer.predict(make_data(number, self.dtype), **size) for number in EVALUATED]
        assert all("evaluation_accuracy" in values for values in [*before, *after])
        return before, after, predicted

    def go_on(self, folder: Path, trusts: bool = False) -> dict[str, Any]:
        """Go on from the state of a launch, in a trainer that has other weights."""
        trainer = self.create_trainer([Rates()], seed=4)
        trainer.trust_engine_files = trusts
        return self.run(trainer, self.state_in(folder))

    def resume(self, batch_size: int) -> dict[str, Any]:
        """On as many processes; and what is said to who does not trust the files of the engine."""
        folder, refused = Path(sys.argv[2]), None
        try:
            rest = self.go_on(folder)
        except ConfigurationError as error:
            refused = str(error)
            rest = self.go_on(folder, trusts=True)
        return {"rest": rest, "refused": refused, "files": sorted(os.listdir(self.state_in(folder)))}

    def resume_from_others(self, batch_size: int) -> list[dict[str, Any]]:
        """The states of earlier launches, whose folders are the further arguments of the script."""
        return [self.go_on(Path(folder)) for folder in sys.argv[3:]]

    def describe(self, batch_size: int) -> str:
        return self.create_trainer().describe()

    def cases(self, is_first: bool = False) -> Cases:
        """Return the cases; `is_first` leaves out the states of other launches."""
        found = {
            "training": self.train,
            "predictions": self.predict,
            "resume": self.resume,
            "describe": self.describe,
        }
        if not is_first:
            found["resume from others"] = self.resume_from_others
        return {self.case(name): case for name, case in found.items()}

    def case(self, name: str) -> str:
        return f"{name}{self.suffix}"

    def assert_equal(self, actual: Any, expected: Any) -> None:
        torch.testing.assert_close(actual, expected, rtol=self.tolerance, atol=self.tolerance)


@functools.cache
def on_one_process(layout: Layout, case: str) -> Any:
    """What a case of a layout gives on this process. It takes the batches of any number of them."""
    return {"training": layout.train, "predictions": layout.predict}[case](GLOBAL_BATCH)


class TrainingPromises:
    """Equal to one process, and resumed on as many processes to the bit."""

    def test_weights_losses_and_metrics_of_training_equal_one_process(self, layout, outcome):
        expected = on_one_process(layout, "training")
        assert expected["updates"] == 9
        for result in outcome.of(layout.case("training")):
            layout.assert_equal(result, expected)

    def test_a_run_resumed_on_as_many_processes_has_the_same_bits(self, layout, outcome):
        tolerance = 0 if layout.resumes_to_the_bit else layout.tolerance
        both = zip(outcome.of(layout.case("resume")), outcome.of(layout.case("training")), strict=True)
        for resumed, whole in both:
            torch.testing.assert_close(resumed["rest"], whole, rtol=0, atol=tolerance)

    def test_describe_names_it(self, layout, outcome):
        for text in outcome.of(layout.case("describe")):
            assert f"processes: {outcome.processes}, layout: {layout.name}" in text


class LayoutPromises(TrainingPromises):
    """Evaluated and predicted with as on one process, too."""

    def test_evaluations_and_predictions_equal_one_process_for_any_size(self, layout, outcome):
        for result in outcome.of(layout.case("predictions")):
            layout.assert_equal(result, on_one_process(layout, "predictions"))


class GoesOnAnywhere:
    """Resumed on another number of processes. Nothing in the files has to be trusted."""

    def test_a_state_goes_on_on_one_process(self, layout, outcome):
        layout.assert_equal(layout.go_on(outcome.folder), on_one_process(layout, "training"))

    def test_a_state_is_loaded_without_trust(self, layout, outcome):
        assert [result["refused"] for result in outcome.of(layout.case("resume"))] == [
            None
        ] * outcome.processes


def assert_others_went_on(layout: Layout, outcome: Outcome) -> None:
    """The states of earlier launches, on other numbers of processes, end like one process."""
    for results in outcome.of(layout.case("resume from others")):
        assert results
        for result in results:
            layout.assert_equal(result, on_one_process(layout, "training"))
