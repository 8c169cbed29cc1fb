"""The user's own model object: what becomes of it in a run and afterwards, and kinds of it that are out of the ordinary."""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from accel_callbacks import ModelEmaCallback
from accel_core import ConfigurationError, Trainer
from case_runner import run_as_script, shared_folder
from tiny import SaveAt, tiny_data, tiny_network, tiny_trainer, weights_of

DATA = tiny_data(16, torch.float32)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 2)

    def forward(self, inputs):
        return self.inner(inputs)


def train(trainer, **kwargs):
    return trainer.train(DATA, **{"num_epochs": 2, "per_device_batch_size": 4, **kwargs})


# ---------------------------------------------------------------- after a run in lower precision


def own_forward(model):
    """Set `forward` on the object, as hooks do."""
    before = model.forward
    model.forward = lambda inputs: before(inputs)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("make", [lambda model: model, own_forward, compiled])
def test_after_a_run_in_lower_precision_the_model_computes_as_before(make):
    model = make(Net())
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    trainer = tiny_trainer(model=model, accelerator=accelerator)
    in_run = trainer.calculate_train_batch_loss
    precisions = []

    def watching(batch):
        output = in_run(batch)
        weight = model.get_parameter("inner.weight" if hasattr(model, "inner") else "0.weight")
        full = nn.functional.linear(batch[0], weight, model.inner.bias)
        precisions.append(torch.equal(output["model_outputs"], full))
        return output

    trainer.calculate_train_batch_loss = watching
    for _ in range(2):
        train(trainer)
        inputs = torch.randn(7, 5)
        expected = nn.functional.linear(inputs, model.inner.weight, model.inner.bias)
        assert torch.equal(model(inputs), expected)
        assert torch.equal(trainer.get_model()(inputs), expected)
    assert precisions == [False] * 16, "each run computes in bf16"
    assert not torch.equal(trainer.predict(torch.utils.data.TensorDataset(inputs)), expected)


def test_after_a_run_in_lower_precision_the_model_can_be_pickled_copied_and_trained_by_another():
    model = Net()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    train(tiny_trainer(model=model, accelerator=accelerator))
    before = set(vars(Net()))
    assert set(vars(model)) == before
    pickle.dumps(model)
    torch.save(model, io.BytesIO())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.inner.weight.zero_()
        copied.inner.bias.zero_()
    assert not copied(torch.ones(1, 5)).any()
    train(tiny_trainer(model=model, accelerator=accelerator))
    assert set(vars(model)) == before


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model = Net()

    class Failing(Trainer):
        def train_epoch_start(self):
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        train(tiny_trainer(Failing, model=model, accelerator=Accelerator(mixed_precision="bf16", cpu=True)))
    assert set(vars(model)) == set(vars(Net()))


def test_a_forward_that_is_new_since_the_run_before_is_trained():
    model = Net()
    trainer = tiny_trainer(model=model, accelerator=Accelerator(mixed_precision="bf16", cpu=True))
    train(trainer)
    model.forward = lambda inputs: model.inner(inputs) * 0.0
    assert trainer.evaluate(DATA)["evaluation_loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert not trainer.predict(DATA).any()


def test_a_shared_accelerator_keeps_no_model_alive():
    accelerator = Accelerator(cpu=True)

    def of_one_run():
        model = tiny_network(torch.float32)
        train(tiny_trainer(model=model, accelerator=accelerator), eval_dataset=DATA)
        return weakref.ref(model)

    references = [of_one_run() for _ in range(3)]
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("of_whole", [True, False])
def test_the_average_of_a_model_whose_forward_was_set_on_the_object_is_evaluated_with_its_own_weights(
    precision, of_whole
):
    plain, other = Net(), Net()
    own_forward(other if of_whole else other.inner)
    losses, outputs = [], []
    for model in (plain, other):
        ema = ModelEmaCallback(decay=0.9, warmup=False, save_path=None)
        accelerator = Accelerator(mixed_precision=precision, cpu=True)
        trainer = tiny_trainer(model=model, callbacks=[ema], accelerator=accelerator)
        history = train(trainer, eval_dataset=DATA)
        losses.append(
            [history.get_metric_values(name) for name in ("ema_model_eval_loss_epoch", "eval_loss_epoch")]
        )
        inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        inner = ema.ema_model.inner
        assert torch.equal(ema.ema_model(inputs), nn.functional.linear(inputs, inner.weight, inner.bias))
        outputs.append(ema.ema_model(inputs))
        assert model.training
    assert losses[0] == losses[1]
    assert torch.equal(*outputs)
    assert not torch.equal(inner.weight, model.inner.weight)


def test_an_average_of_a_lazy_model_asks_for_a_forward_pass():
    model = nn.Sequential(nn.LazyLinear(2))
    ema = ModelEmaCallback(save_path=None)
    with pytest.raises(
        ConfigurationError, match=r"ModelEmaCallback.*'0.weight' has no values.*Call the model once"
    ):
        train(tiny_trainer(model=model, callbacks=[ema]))


# ---------------------------------------------------------------- lazy and compiled parts


def test_a_lazy_model_with_buffers_is_trained_as_by_hand():
    def lazy():
        model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))
        # Their first values are drawn in the first forward pass.
        model.register_forward_pre_hook(lambda module, inputs: torch.manual_seed(0) and None)
        return model

    model, other = lazy(), lazy()
    train(tiny_trainer(model=model), eval_dataset=DATA, train_dataloader_kwargs={"shuffle": False})
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        for inputs, targets in torch.utils.data.DataLoader(DATA, batch_size=4):
            nn.functional.cross_entropy(other(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_lazy_model_is_evaluated_before_it_is_trained():
    model = nn.Sequential(nn.LazyLinear(2))
    trainer = tiny_trainer(model=model)
    trainer.evaluate(DATA)
    train(trainer)
    assert model[0].weight.shape == (2, 5)


def network(compiles=()):
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    model.load_state_dict(STATE)
    for number in compiles:
        model[number] = torch.compile(model[number], backend="eager")
    return model


STATE = nn.Sequential(
    nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)
).state_dict()


# Dynamo looks at gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("saves", "loads"), [((1,), ()), ((), (1,)), ((0, 2), (1,))])
def test_exports_and_states_are_those_of_the_model_before_parts_of_it_were_compiled(tmp_path, saves, loads):
    ema = ModelEmaCallback(save_path=tmp_path / "ema.pt")
    trainer = tiny_trainer(model=network(saves), callbacks=[ema, SaveAt(3, tmp_path / "state")])
    train(trainer)
    for name in ("export.pt", "export.safetensors"):
        trainer.save_checkpoint(tmp_path / name)
        other = tiny_trainer(model=network(loads))
        other.load_checkpoint(tmp_path / name)
        assert torch.equal(weights_of(trainer), weights_of(other))
    for name in ("export.pt", "ema.pt"):
        assert torch.load(tmp_path / name, weights_only=True)["model_state_dict"].keys() == STATE.keys()
    resumed_ema = ModelEmaCallback(save_path=None)
    resumed = tiny_trainer(model=network(loads), callbacks=[resumed_ema])
    train(resumed, resume_from=tmp_path / "state")
    assert torch.equal(weights_of(trainer), weights_of(resumed))
    for average, value in zip(resumed_ema.ema_model.parameters(), ema.ema_model.parameters(), strict=True):
        assert torch.equal(average, value)


def test_an_export_with_the_names_of_compiled_parts_is_read(tmp_path):
    model = network((1,))
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "export.pt")
    with torch.no_grad():
        other = network()
        next(other[1].parameters()).zero_()
    tiny_trainer(model=other).load_checkpoint(tmp_path / "export.pt")
    assert torch.equal(next(other[1].parameters()), next(model[1].parameters()))


# ---------------------------------------------------------------- on two processes


def lower_precision_on_processes(batch_size):
    model = Net()
    trainer = tiny_trainer(model=model, accelerator=Accelerator(mixed_precision="bf16"))
    train(trainer, per_device_batch_size=batch_size)
    first = weights_of(trainer).clone()
    train(trainer, per_device_batch_size=batch_size)
    inputs = torch.randn(3, 5)
    is_full = torch.equal(model(inputs), nn.functional.linear(inputs, model.inner.weight, model.inner.bias))
    folder = shared_folder()
    trainer.save_training_state(folder / "state")
    return {
        "is_full": is_full,
        "is_clean": set(vars(model)) == set(vars(Net())),
        "weights": [first, weights_of(trainer)],
    }


CASES = {"lower_precision": lower_precision_on_processes}


@pytest.mark.slow
def test_after_runs_in_lower_precision_on_two_processes_the_model_is_as_before(outcome):
    first, second = outcome.of("lower_precision")
    assert first["is_full"]
    assert first["is_clean"]
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    torch.testing.assert_close(
        first["weights"], outcome.alone("lower_precision")["weights"], rtol=0.02, atol=0.02
    )


if __name__ == "__main__":
    run_as_script(CASES, create_accelerator=functools.partial(Accelerator, mixed_precision="bf16"))
