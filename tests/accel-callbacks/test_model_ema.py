"""The average equals its closed form, is evaluated and exported like the model, resumes, and leaves training alone."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    EarlyStoppingCallback,
    MetricsCallback,
    ModelEmaCallback,
    SaveTrainingStateCallback,
    StepBasedEvaluationCallback,
)
from accel_core import AccelWarning, ConfigurationError, Trainer, TrainerCallback
from case_runner import run_as_script
from tiny import (
    Drawing,
    RecordWanted,
    SaveAt,
    assert_same_tensors,
    tiny_data,
    tiny_network,
    tiny_trainer,
    weights_of,
)


class Normed(nn.Module):
    """With dropout, statistics of batch norm, a mask, a table and a buffer that its state leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.drop = nn.Dropout(0.2)
        self.inner = tiny_network()
        self.register_buffer("mask", torch.tensor([0.0, -math.inf], dtype=torch.float64))
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.table = torch.ones(len(self.table) + 1)
        return self.inner(self.drop(self.norm(inputs)))


class Remember(TrainerCallback):
    """Keeps the state of the model, or of the average, after each update."""

    order = 30

    def __init__(self, ema: ModelEmaCallback | None = None) -> None:
        self.ema = ema
        self.states: list[dict[str, torch.Tensor]] = []

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        self.keep(trainer)

    def keep(self, trainer: Trainer) -> None:
        module: Any = trainer.get_model() if self.ema is None else self.ema.ema_model
        self.states.append({name: value.clone() for name, value in module.state_dict().items()})


def train(*callbacks: Any, model: nn.Module | None = None, epochs: int = 2, **kwargs: Any) -> Trainer:
    trainer = tiny_trainer(callbacks=callbacks, model=Normed() if model is None else model)
    kwargs = {"eval_dataset": tiny_data(13), "per_device_batch_size": 4, **kwargs}
    trainer.train(tiny_data(40), num_epochs=epochs, **kwargs)
    return trainer


# ---------------------------------------------------------------------- the average


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("warmup", [True, False])
def test_lesson_7_it_is_averaged_at_every_update_as_the_closed_form_says(
    warmup: bool, accumulation: int
) -> None:
    ema = ModelEmaCallback(0.8, warmup, save_path=None)
    values, averages = Remember(), Remember(ema)
    train(ema, values, averages, epochs=4, gradient_accumulation_steps=accumulation)
    assert len(values.states) == 1 + 4 * math.ceil(10 / accumulation)
    expected = values.states[0]
    for n, (value, average) in enumerate(zip(values.states, averages.states, strict=True)):
        decay = min(0.8, n / (9 + n)) if warmup else 0.8
        if n:
            expected = {name: decay * expected[name] + (1 - decay) * value[name] for name in value}
        for name in ("norm.weight", "norm.running_var", "inner.0.weight", "inner.2.bias"):
            assert torch.allclose(average[name], expected[name], rtol=1e-13, atol=1e-15), (n, name)
    assert (decay == 0.8) == (not warmup or accumulation == 1), "the warm-up is over in the longer run only"


@pytest.mark.parametrize(("gamma", "power", "decay"), [(1.0, 2 / 3, 0.8), (3.0, 0.75, 0.999)])
def test_the_warm_up_of_timm_gives_the_averages_of_timm(gamma: float, power: float, decay: float) -> None:
    class Beside(TrainerCallback):
        def on_training_run_start(self, trainer: Trainer) -> None:
            self.average = ModelEmaV3(
                trainer.model, decay, use_warmup=True, warmup_gamma=gamma, warmup_power=power
            )

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            self.average.update(trainer.model, step=trainer.run_progress.updates_completed)

    ema = ModelEmaCallback(decay, "timm", save_path=None, warmup_gamma=gamma, warmup_power=power)
    train(ema, beside := Beside(), model=tiny_network(), epochs=3)
    assert_same_tensors(ema.ema_model.state_dict(), beside.average.module.state_dict())


def test_it_is_averaged_after_every_nth_update_of_the_call_only(tmp_path: Path) -> None:
    def averages(**kwargs: Any) -> ModelEmaCallback:
        ema = ModelEmaCallback(0.8, warmup=False, save_path=None, every_n_updates=4)
        train(ema, values, *([] if kwargs else [SaveAt(6, tmp_path / "state")]), **kwargs)
        return ema

    values = Remember()
    ema = averages()
    assert ema.num_updates == 5
    expected = values.states[0]
    for update in (4, 8, 12, 16, 20):
        expected = {name: 0.8 * expected[name] + 0.2 * values.states[update][name] for name in expected}
    assert torch.allclose(ema.ema_model.norm.weight, expected["norm.weight"], rtol=1e-13)
    resumed = averages(resume_from=tmp_path / "state")
    assert_same_tensors(resumed.ema_model.state_dict(), ema.ema_model.state_dict())


@pytest.mark.parametrize("own", [None, {"": tiny_data(9), "far": tiny_data(5)}])
def test_it_is_evaluated_in_mid_epoch_if_wanted_on_the_data_of_that_evaluation(own: Any) -> None:
    found: list[dict[str, float]] = []

    class ByHand(TrainerCallback):
        order = 40

        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            if trainer.run_progress.updates_completed % 5 == 0:
                beside = Trainer(copy.deepcopy(ema.ema_model), nn.functional.cross_entropy, None, [])
                found.append(beside.evaluate(tiny_data(13) if own is None else own, 4))

    ema = ModelEmaCallback(0.8, save_path=None, evaluate_in_mid_epoch=True)
    history = train(ema, StepBasedEvaluationCallback(5, own), ByHand()).run_history
    for prefix in ("", "far_") if own else ("",):
        values = history.get_metric_values(f"{prefix}ema_model_intermediate_eval_loss_epoch")
        assert values == [each[f"{prefix}evaluation_loss"] for each in found]
        assert len(values) == 4
    assert len(history.get_metric_values("ema_model_eval_loss_epoch")) == 2
    without = train(ModelEmaCallback(0.8, save_path=None), StepBasedEvaluationCallback(5, own)).run_history
    rest = [r for r in history.to_records() if "ema_model_intermediate" not in r["name"]]
    assert rest == without.to_records()


def test_it_is_exported_by_its_best_evaluation_in_mid_epoch(tmp_path: Path) -> None:
    name = "ema_model_intermediate_eval_loss_epoch"
    ema = ModelEmaCallback(
        0.5,
        save_path=tmp_path / "e.pt",
        watch_metric=name,
        greater_is_better=True,
        evaluate_in_mid_epoch=True,
    )
    values = train(ema, StepBasedEvaluationCallback(3)).run_history.get_metric_values(name)
    assert ema.best_metric == max(values) == torch.load(tmp_path / "e.pt")[name]
    assert values.index(max(values)) not in (len(values) - 1,)


def test_whole_numbers_and_values_that_are_not_finite_are_copied() -> None:
    ema = ModelEmaCallback(save_path=None)
    trainer = train(ema, averages := Remember(ema))
    assert [int(state["norm.num_batches_tracked"]) for state in averages.states] == list(range(21))
    assert all(torch.equal(state["mask"], trainer.model.mask) for state in averages.states)


def test_a_table_that_grows_grows_in_the_average_too() -> None:
    ema = ModelEmaCallback(evaluate_during_training=False, save_path=None)
    trainer = train(ema, max_num_train_steps=3, eval_dataset=None)
    assert torch.equal(ema.ema_model.table, trainer.model.table)


def test_training_is_not_changed_by_one_bit() -> None:
    def outcome(*callbacks: Any) -> tuple[Any, ...]:
        metrics = MetricsCallback({"accuracy": MulticlassAccuracy(2).double()}, on="both")
        arguments = {"eval_dataset": Drawing(13), "eval_dataloader_kwargs": {"num_workers": 0}}
        trainer = train(metrics, *callbacks, epochs=3, **arguments)
        records = [
            record
            for record in trainer.run_history.to_records()
            if not record["name"].startswith("ema_model_")
        ]
        return (
            records,
            trainer.model.state_dict(),
            torch.get_rng_state().tolist(),
            trainer.eval_loss.state_dict(),
        )

    records, state, random, eval_loss = outcome()
    ema_records, ema_state, ema_random, ema_eval_loss = outcome(ModelEmaCallback(0.5, save_path=None))
    assert ema_records == records
    assert_same_tensors(ema_state, state)
    assert ema_random == random
    assert ema_eval_loss == eval_loss


def test_nothing_waits_for_the_device_after_an_update() -> None:
    """`item()` and `bool()` of a tensor are `_local_scalar_dense`; a copy from the host would be `_to_copy`."""
    called: list[str] = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    class Listened(ModelEmaCallback):
        def on_optimizer_step_end(self, trainer: Trainer) -> None:
            with Listening():
                super().on_optimizer_step_end(trainer)

    train(Listened(save_path=None), epochs=1)
    assert "_foreach_lerp_" in called
    assert not {"_local_scalar_dense", "_to_copy"} & set(called)


def test_frozen_parameters_are_in_the_average_to_the_bit() -> None:
    model = tiny_network()
    model[0].requires_grad_(False)
    ema = ModelEmaCallback(save_path=None)
    trainer = train(ema, model=model)
    assert torch.equal(ema.ema_model[0].weight, trainer.model[0].weight)


def test_the_average_is_a_module_of_its_own_in_eval_mode_and_without_gradients() -> None:
    ema = ModelEmaCallback(save_path=None)
    assert ema.ema_model is None
    trainer = train(ema)
    average: Any = ema.ema_model
    assert type(average) is Normed and average is not trainer.model
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_a_second_run_begins_with_the_weights_that_it_begins_with() -> None:
    ema = ModelEmaCallback(save_path=None)
    trainer = train(ema, averages := Remember(ema))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train(tiny_data(), num_epochs=1)
    assert_same_tensors(averages.states[21], before)
    assert ema.num_updates == 5


# ---------------------------------------------------------------------- evaluation and export


def evaluate(model: Any, **kwargs: Any) -> dict[str, float]:
    metrics = MetricsCallback({"accuracy": MulticlassAccuracy(2).double()})
    trainer = Trainer(copy.deepcopy(model), nn.functional.cross_entropy, None, [metrics], **kwargs)
    return trainer.evaluate(tiny_data(13), per_device_batch_size=4)


def test_it_is_evaluated_after_each_epoch_with_the_same_metrics() -> None:
    found = []

    class ByHand(TrainerCallback):
        order = 30

        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            found.append(evaluate(ema.ema_model))

    ema = ModelEmaCallback(0.9, save_path=None)
    history = train(
        ema, ByHand(), MetricsCallback({"accuracy": MulticlassAccuracy(2).double()}), epochs=3
    ).run_history
    assert history.get_metric_values("ema_model_eval_loss_epoch") == [
        values["evaluation_loss"] for values in found
    ]
    assert history.get_metric_values("ema_model_accuracy") == [
        values["evaluation_accuracy"] for values in found
    ]
    assert history.get_metric_values("eval_loss_epoch") != history.get_metric_values(
        "ema_model_eval_loss_epoch"
    )
    assert len(history.get_metric_values("accuracy")) == 3


@pytest.mark.parametrize(("greater_is_better", "best"), [(False, 2), (True, 3)])
def test_it_is_exported_when_its_watched_metric_is_best(
    tmp_path: Path, greater_is_better: bool, best: int
) -> None:
    path = tmp_path / "ema.pt"
    ema = ModelEmaCallback(save_path=path, watch_metric="wanted", greater_is_better=greater_is_better)
    averages = Remember(ema)
    train(ema, averages, RecordWanted(3.0, 1.0, 4.0, 2.0), epochs=4)
    content = torch.load(path)
    assert content.keys() == {"accel_origin", "model_state_dict", "wanted"}
    assert content["wanted"] == ema.best_metric == {2: 1.0, 3: 4.0}[best]
    assert ema.best_metric_epoch == best
    assert_same_tensors(content["model_state_dict"], averages.states[10 * best])
    assert tiny_trainer(model=Normed()).load_checkpoint(path)["wanted"] == ema.best_metric


@pytest.mark.parametrize("arguments", [{"evaluate_during_training": False}, {"eval_dataset": None}])
def test_where_it_is_not_evaluated_it_is_exported_at_the_end(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    path = tmp_path / "ema.safetensors"
    own = {key: arguments.pop(key) for key in [*arguments] if key.startswith("evaluate")}
    ema = ModelEmaCallback(save_path=path, **own)
    history = train(ema, **arguments).run_history
    assert not any(name.startswith("ema_model") for name in history.get_metric_names())
    trainer = tiny_trainer(model=Normed())
    trainer.load_checkpoint(path)
    assert_same_tensors(trainer.model.state_dict(), ema.ema_model.state_dict())


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(ModelEmaCallback(save_path=None))
    assert list(tmp_path.iterdir()) == []


def test_an_average_that_is_not_finite_is_reported_and_not_written(tmp_path: Path) -> None:
    class Poisoned(RecordWanted):
        def on_training_run_epoch_end(self, trainer: Trainer) -> None:
            super().on_training_run_epoch_end(trainer)
            with torch.no_grad():
                next(iter(ema.ema_model.parameters())).fill_(math.nan)

    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt", watch_metric="wanted")
    with pytest.warns(AccelWarning, match="is not finite"):
        train(ema, Poisoned(1.0), epochs=1)
    assert not (tmp_path / "ema.pt").exists()
    assert ema.best_metric is None


def test_the_trainer_evaluates_it_when_it_is_put_in_place_of_the_model() -> None:
    ema = ModelEmaCallback(save_path=None)
    trainer = train(ema)
    trainer.model = ema.ema_model
    latest = trainer.run_history.get_latest_metric("ema_model_eval_loss_epoch")
    assert trainer.evaluate(per_device_batch_size=4)["evaluation_loss"] == latest


def test_who_watches_its_metric_or_saves_may_be_listed_before_it(tmp_path: Path) -> None:
    """A saver that came first would save the average of the update before, and a watcher would not find the metric."""
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt")
    saver = SaveTrainingStateCallback(tmp_path, save_every_n_updates=7, save_at_end=False, keep_last=1)
    stopping = EarlyStoppingCallback(watch_metric="ema_model_eval_loss_epoch", early_stopping_threshold=100.0)
    trainer = train(saver, stopping, ema, averages := Remember(ema), epochs=5)
    assert "ema_model_eval_loss_epoch" in str(trainer.stop_reason)
    saved = torch.load(tmp_path / "update_00000014/process_00000.pt")["callbacks"]["ModelEmaCallback"]
    assert saved["num_updates"] == 14
    assert_same_tensors(saved["ema_model"], averages.states[14])


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("update", [13, 20])
def test_lesson_7_a_resumed_run_has_the_same_averages_metrics_and_best_value(
    tmp_path: Path, update: int
) -> None:
    ema = ModelEmaCallback(0.9, save_path=tmp_path / "whole.pt")
    whole = train(ema, SaveAt(update, tmp_path / "state"), epochs=4)
    resumed_ema = ModelEmaCallback(0.9, save_path=tmp_path / "resumed.pt")
    resumed = train(resumed_ema, epochs=4, resume_from=tmp_path / "state")
    assert_same_tensors(resumed_ema.ema_model.state_dict(), ema.ema_model.state_dict())
    assert resumed.run_history.to_records() == whole.run_history.to_records()
    assert (resumed_ema.num_updates, resumed_ema.best_metric) == (ema.num_updates, ema.best_metric)
    assert_same_tensors(
        torch.load(tmp_path / "resumed.pt")["model_state_dict"],
        torch.load(tmp_path / "whole.pt")["model_state_dict"],
    )


def test_a_resumed_run_exports_nothing_worse_than_before(tmp_path: Path) -> None:
    path = tmp_path / "ema.pt"
    arguments = {"save_path": path, "watch_metric": "wanted"}
    train(ModelEmaCallback(**arguments), RecordWanted(1.0, 2.0, 3.0), SaveAt(15, tmp_path / "state"))
    before = path.read_bytes()
    train(
        ModelEmaCallback(**arguments), RecordWanted(1.0, 2.0, 3.0), epochs=3, resume_from=tmp_path / "state"
    )
    assert path.read_bytes() == before


def test_a_state_without_averages_begins_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(values := Remember(), SaveAt(13, tmp_path / "state"))
    ema = ModelEmaCallback(decay=0.0, save_path=None)
    train(ema, max_num_train_steps=13, resume_from=tmp_path / "state", model=Normed())
    assert re.search("no averages.*ModelEmaCallback.*weights", capsys.readouterr().out)
    average: Any = ema.ema_model
    assert torch.equal(average.inner[0].weight, values.states[13]["inner.0.weight"])
    assert not torch.equal(average.inner[0].weight, whole.model.inner[0].weight)


# ---------------------------------------------------------------------- what wraps the model


def test_a_compiled_model_is_averaged_evaluated_and_exported_under_its_own_names(tmp_path: Path) -> None:
    plain = ModelEmaCallback(save_path=tmp_path / "plain.pt")
    compiled = ModelEmaCallback(save_path=tmp_path / "compiled.pt")
    expected = train(plain, model=tiny_network()).run_history
    history = train(compiled, model=torch.compile(tiny_network(), backend="eager")).run_history
    assert history.to_records() == expected.to_records()
    found, wanted = (torch.load(tmp_path / name)["model_state_dict"] for name in ("compiled.pt", "plain.pt"))
    assert_same_tensors(found, wanted)


def test_under_mixed_precision_the_average_computes_with_its_own_weights() -> None:
    """Accelerate puts a forward of its own into the model; a copy must not keep that of the model."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    ema = ModelEmaCallback(0.99, warmup=False, save_path=None)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    trainer = tiny_trainer(callbacks=[ema], model=model, lr=1.0, accelerator=accelerator)
    data = tiny_data(37, torch.float32), tiny_data(13, torch.float32)
    trainer.train(data[0], num_epochs=1, eval_dataset=data[1])
    found = trainer.run_history.get_latest_metric("ema_model_eval_loss_epoch")
    with torch.no_grad():
        expected = [
            nn.functional.cross_entropy(module(data[1].tensors[0]), data[1].tensors[1]).item()
            for module in (ema.ema_model, trainer.model)
        ]
    assert found == pytest.approx(expected[0], rel=1e-2)
    assert found != pytest.approx(expected[1], rel=5e-2)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("decay", [1.0, -0.1, "0.9", True, None, math.nan])
def test_a_decay_that_is_none_is_reported(decay: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^decay is .*number from 0 to below 1.*Use 0\.999 "):
        ModelEmaCallback(decay)


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"warmup": "tim"}, ("warmup is 'tim'", "'timm'", "Use True")),
        ({"warmup": None}, ("warmup is None", "Use True")),
        ({"warmup_power": 0.75}, ("warmup is True", "Pass warmup='timm'")),
        ({"warmup": "timm", "warmup_gamma": 0}, ("warmup_gamma is 0", "Leave it out")),
        ({"warmup": "timm", "warmup_power": -1.0}, ("warmup_power is -1.0", "Leave it out")),
        ({"every_n_updates": 0}, ("every_n_updates is 0", "Use 1")),
    ],
)
def test_arguments_of_averaging_are_checked(kwargs: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        ModelEmaCallback(**kwargs)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_an_unknown_metric_is_reported_with_those_that_there_are() -> None:
    ema = ModelEmaCallback(watch_metric="ema_accuracy")
    with pytest.raises(
        ConfigurationError, match=r"ModelEmaCallback.*'ema_accuracy'.*\['ema_model_eval_loss_epoch', "
    ):
        train(ema)


def test_parameters_of_half_precision_are_reported() -> None:
    data = tiny_data(8, torch.bfloat16)
    trainer = tiny_trainer(callbacks=[ModelEmaCallback(save_path=None)], model=nn.Linear(5, 2).bfloat16())
    with pytest.warns(AccelWarning, match="ModelEmaCallback.*bfloat16.*float32.*mixed_precision"):
        trainer.train(data, num_epochs=1)


def test_a_model_that_cannot_be_copied_is_reported() -> None:
    model = tiny_network()
    model.lock = (value for value in ())
    before = weights_of(trainer := tiny_trainer(callbacks=[ModelEmaCallback()], model=model))
    with pytest.raises(
        ConfigurationError, match=r"ModelEmaCallback.* Sequential.*__deepcopy__.*leave ModelEmaCallback out"
    ):
        trainer.train(tiny_data(), num_epochs=1)
    assert torch.equal(weights_of(trainer), before)


def test_sharded_models_are_refused() -> None:
    trainer = tiny_trainer()
    # Before the trainer has an engine, which it keeps.
    trainer.accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ConfigurationError, match=r"ModelEmaCallback.* DEEPSPEED .*Use DDP or FSDP2"):
        ModelEmaCallback().on_training_run_start(trainer)


# ---------------------------------------------------------------------- processes


def train_with_average(batch_size: int) -> dict[str, Any]:
    """Without dropout and batch norm, which are not the same on two processes."""
    ema = ModelEmaCallback(0.9, save_path=None)
    metrics = MetricsCallback({"accuracy": MulticlassAccuracy(2, average="micro").double()})
    trainer = train(ema, metrics, model=tiny_network(), epochs=3, per_device_batch_size=batch_size)
    records = {record["name"]: record["value"] for record in trainer.run_history.to_records()}
    return {"records": records, "state": dict(ema.ema_model.state_dict())}


def resume_with_average(batch_size: int) -> dict[str, Any]:
    """Batch norm in train mode, so that the buffers of the processes differ."""
    folder = Path(RESUMES) / f"{batch_size}"

    def run(**kwargs: Any) -> tuple[Any, ...]:
        ema = ModelEmaCallback(0.9, save_path=folder / "ema.pt")
        callbacks = [SaveAt(3, folder / "state")] if not kwargs else []
        trainer = train(ema, *callbacks, epochs=3, per_device_batch_size=batch_size, **kwargs)
        return dict(ema.ema_model.state_dict()), trainer.run_history.to_records()

    whole = run()
    exported = torch.load(folder / "ema.pt")["model_state_dict"]
    resumed = run(resume_from=folder / "state")
    files = sorted(folder.glob("state/process_*.pt"))
    saved = [list(torch.load(file)["callbacks"]["ModelEmaCallback"]["ema_model"]) for file in files]
    return {"whole": whole, "resumed": resumed, "exported": dict(exported), "saved": saved}


RESUMES = ""
CASES = {"average": train_with_average, "resume": resume_with_average}


@pytest.mark.slow
def test_two_processes_have_the_average_and_the_metrics_of_one(outcome: Any) -> None:
    alone = outcome.alone("average")
    first, second = outcome.of("average")
    assert_same_tensors(first["state"], second["state"])
    assert first["records"] == second["records"]
    assert first["records"] == pytest.approx(alone["records"], rel=1e-12)
    for name, value in alone["state"].items():
        assert torch.allclose(first["state"][name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit_and_save_the_parameters_once(outcome: Any) -> None:
    results = outcome.of("resume")
    for result in results:
        assert_same_tensors(result["resumed"][0], result["whole"][0])
        assert result["resumed"][1] == result["whole"][1]
        assert_same_tensors(result["exported"], results[0]["exported"])
    saved = results[0]["saved"]
    assert "inner.0.weight" in saved[0]
    assert saved[1] == ["mask", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


if __name__ == "__main__":
    import sys

    RESUMES = sys.argv[2]
    run_as_script(CASES)
