"""save_checkpoint and load_checkpoint: portable files of the plain model, complete or absent, that run no code."""

import os
import pickle

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from accel_core import CheckpointError, ConfigurationError, Trainer, TrainerCallback
from accel_core.extending import NotFiniteError, check_finite
from accel_core.state import files
from tiny import assert_same_tensors

DATA = TensorDataset(torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.ones(12, 1))


def create_trainer(*callbacks, model=None):
    torch.manual_seed(0)
    if model is None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=1)


def train(trainer, num_epochs=1):
    trainer.train(
        DATA,
        num_epochs,
        per_device_batch_size=4,
        create_scheduler_fn=lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    )
    return trainer


def assert_same_weights(model, other):
    assert_same_tensors(model.state_dict(), other.state_dict())


class TestPt:
    def test_it_holds_what_was_asked_for_and_loads_without_executing_anything(self, tmp_path):
        trainer = train(create_trainer())
        trainer.save_checkpoint(tmp_path / "model.pt", {"epoch": 3, "notes": ["a"]})
        content = torch.load(tmp_path / "model.pt", weights_only=True)
        saved = {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "notes"}
        assert set(content) == {*saved, "accel_origin"}
        assert content["accel_origin"]["run_id"] == trainer.run_id and content["accel_origin"]["update"] == 3
        assert set(create_trainer().load_checkpoint(tmp_path / "model.pt")) == saved
        plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        plain.load_state_dict(content["model_state_dict"])
        assert_same_weights(plain, trainer.model)

    @pytest.mark.parametrize(("optimizer", "scheduler"), [(True, False), (False, True), (False, False)])
    def test_optimizer_and_scheduler_can_be_left_out(self, tmp_path, optimizer, scheduler):
        train(create_trainer()).save_checkpoint(
            tmp_path / "m.pt", save_optimizer=optimizer, save_scheduler=scheduler
        )
        content = torch.load(tmp_path / "m.pt")
        assert ("optimizer_state_dict" in content, "scheduler_state_dict" in content) == (
            optimizer,
            scheduler,
        )

    def test_it_may_be_of_another_model_than_the_trainers(self, tmp_path):
        trainer, other = train(create_trainer()), create_trainer().model
        trainer.save_checkpoint(tmp_path / "other.pt", save_optimizer=False, model=other)
        trainer.load_checkpoint(tmp_path / "other.pt")
        assert_same_weights(trainer.model, other)

    def test_everything_comes_back_within_a_run_and_outside_of_one(self, tmp_path):
        trainer = train(create_trainer(), 2)
        trainer.save_checkpoint(tmp_path / "model.pt", {"note": "kept"})
        content, loaded = [], []

        class Load(TrainerCallback):
            def on_training_run_start(self, trainer):
                content.append(trainer.load_checkpoint(tmp_path / "model.pt"))
                loaded.append((trainer.optimizer.state_dict(), trainer.scheduler.state_dict()))

        other = create_trainer(Load())
        other.train(
            DATA, max_num_train_steps=1, create_scheduler_fn=lambda o: torch.optim.lr_scheduler.StepLR(o, 2)
        )
        assert content[0]["note"] == "kept"
        assert loaded[0][1]["last_epoch"] == 6
        assert loaded[0][0]["param_groups"] == content[0]["optimizer_state_dict"]["param_groups"]
        outside = create_trainer()
        with torch.no_grad():
            outside.model[0].weight.zero_()
        outside.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
        assert_same_weights(outside.model, trainer.model)
        assert outside.optimizer.state_dict()["state"] == {}

    def test_an_export_of_weights_alone_by_another_library_loads(self, tmp_path):
        model = torch.nn.Linear(3, 1)
        torch.save(
            {"model_state_dict": model.state_dict(), "optimizer_state_dict": {}}, tmp_path / "model.pt"
        )
        trainer = create_trainer(model=torch.nn.Linear(3, 1))
        trainer.load_checkpoint(tmp_path / "model.pt", load_optimizer=False)
        assert_same_weights(trainer.model, model)

    def test_what_could_not_be_read_again_is_refused_and_nothing_is_written(self, tmp_path):
        with pytest.raises(
            ConfigurationError, match=r"'model\.pt'.*'callback' is a builtin_function.*Keep tensors"
        ):
            create_trainer().save_checkpoint(tmp_path / "model.pt", {"callback": print})
        assert list(tmp_path.iterdir()) == []


class TestSafetensors:
    def test_it_holds_the_weights_that_any_program_can_read(self, tmp_path):
        trainer = train(create_trainer())
        trainer.save_checkpoint(tmp_path / "model.safetensors")
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        assert tensors.keys() == trainer.model.state_dict().keys()
        other = create_trainer()
        assert set(other.load_checkpoint(tmp_path / "model.safetensors")) == {"model_state_dict"}
        assert_same_weights(other.model, trainer.model)


class Tied(torch.nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(3, 1)

    def forward(self, points):
        return self.head(self.second(self.first(points)))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
class TestBoth:
    def test_tied_weights_come_back_and_stay_tied(self, name, tmp_path):
        trainer = train(create_trainer(model=Tied()))
        trainer.save_checkpoint(tmp_path / name)
        other = create_trainer(model=Tied())
        other.load_checkpoint(tmp_path / name)
        assert_same_weights(other.model, trainer.model)
        assert other.model.first.weight is other.model.second.weight

    def test_a_compiled_model_is_exported_under_the_names_of_the_plain_one(self, name, tmp_path):
        plain = torch.nn.Linear(3, 1)
        trainer = create_trainer(model=torch.compile(plain, backend="eager"))
        trainer.save_checkpoint(tmp_path / name)
        content = trainer.load_checkpoint(tmp_path / name)
        assert set(content["model_state_dict"]) == {"weight", "bias"}
        other = create_trainer(model=torch.nn.Linear(3, 1))
        other.load_checkpoint(tmp_path / name)
        assert_same_weights(other.model, plain)

    def test_the_file_is_replaced_as_a_whole_or_not_at_all(self, name, tmp_path, monkeypatch):
        trainer = create_trainer()
        trainer.save_checkpoint(tmp_path / name)
        before = (tmp_path / name).read_bytes()

        def fail(path):
            raise OSError(28, "No space left on device")

        train(trainer)
        monkeypatch.setattr(files, "sync", fail)
        with pytest.raises(CheckpointError, match=rf"{name}' .*not be written.*untouched.*No space left"):
            trainer.save_checkpoint(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
        assert os.listdir(tmp_path) == [name]

    def test_folders_are_made_where_they_are_missing(self, name, tmp_path):
        create_trainer().save_checkpoint(tmp_path / "a" / "b" / name)
        assert (tmp_path / "a" / "b" / name).is_file()

    def test_a_damaged_file_is_an_error_that_names_it(self, name, tmp_path):
        trainer = create_trainer()
        trainer.save_checkpoint(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"", b"garbage" * 100):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{name}' .*not be read.*another checkpoint"):
                trainer.load_checkpoint(tmp_path / name)

    def test_code_in_a_file_does_not_run(self, name, tmp_path):
        class Malicious:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "was_run"),))

        (tmp_path / name).write_bytes(pickle.dumps({"model_state_dict": Malicious()}))
        with pytest.raises(CheckpointError, match=name):
            create_trainer().load_checkpoint(tmp_path / name)
        if name.endswith(".pt"):
            torch.save({"model_state_dict": Malicious()}, tmp_path / name)
            with pytest.raises(CheckpointError, match="damaged or holds objects"):
                create_trainer().load_checkpoint(tmp_path / name)
        assert not (tmp_path / "was_run").exists()

    def test_the_weights_of_another_model_are_refused(self, name, tmp_path):
        create_trainer().save_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name}' .*another model than Linear"):
            create_trainer(model=torch.nn.Linear(3, 1)).load_checkpoint(tmp_path / name)

    def test_weights_that_are_not_finite_are_not_exported(self, name, tmp_path):
        trainer = create_trainer()
        with torch.no_grad():
            trainer.model[2].bias.fill_(float("nan"))
        with pytest.raises(CheckpointError, match=r"'2\.bias' is not finite.*lower learning rate"):
            trainer.save_checkpoint(tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_a_missing_file_is_an_error_that_names_it(self, name, tmp_path):
        with pytest.raises(CheckpointError, match=name):
            create_trainer().load_checkpoint(tmp_path / name)


class LargestMemory(TorchDispatchMode):
    """Notes how many bytes the largest memory has that is taken within."""

    largest = 0

    def __init__(self, module):
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in module.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if torch.is_tensor(each) and each.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, each.untyped_storage().nbytes())
        return result


class TestFinite:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
    )
    def test_one_element_that_is_not_finite_is_found_wherever_it_stands(self, dtype):
        for size in (1, 2, 31, 33, 4097):
            for place in {0, size // 2, size - 1}:
                module = torch.nn.Module()
                module.weight = torch.nn.Parameter(torch.randn(size, dtype=dtype))
                module.turned = torch.nn.Parameter(torch.randn(3, size, dtype=dtype).t())
                module.empty = torch.nn.Parameter(torch.zeros(0, dtype=dtype))
                check_finite(module)
                for parameter in (module.weight, module.turned[:, 1]):
                    before = parameter[place].item()
                    for value in (float("nan"), float("inf"), -float("inf")):
                        with torch.no_grad():
                            parameter[place] = value
                        with pytest.raises(NotFiniteError, match="is not finite"):
                            check_finite(module)
                    with torch.no_grad():
                        parameter[place] = before

    def test_looking_for_it_makes_no_tensor_of_the_size_of_a_parameter(self):
        module = torch.nn.Linear(50, 50)
        with LargestMemory(module) as results:
            check_finite(module)
        assert 0 < results.largest <= 8


def test_a_file_without_the_weights_of_a_model_is_told(tmp_path):
    torch.save({"state": {}}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"other.pt' has no 'model_state_dict'.*save_checkpoint.*another file"
    ):
        create_trainer().load_checkpoint(tmp_path / "other.pt")


class TestPartOfTheModel:
    """`create_model_state` and `load_model_state` decide what is saved of the model."""

    class HeadTrainer(Trainer):
        def create_model_state(self, model):
            return model[2].state_dict()

        def load_model_state(self, model, state):
            model[2].load_state_dict(state)

    def create(self):
        model = create_trainer().model
        for parameter in model[:2].parameters():
            parameter.requires_grad_(False)
        model[1].eval()
        optimizer = torch.optim.AdamW(model[2].parameters(), lr=0.01)
        return self.HeadTrainer(model, torch.nn.functional.mse_loss, optimizer, (), seed=1)

    def test_an_export_holds_that_part_alone(self, tmp_path):
        trainer = train(self.create())
        trainer.save_checkpoint(tmp_path / "head.safetensors")
        assert set(safetensors.torch.load_file(tmp_path / "head.safetensors")) == {"weight", "bias"}
        other = self.create()
        other.load_checkpoint(tmp_path / "head.safetensors")
        assert torch.equal(other.model[2].weight, trainer.model[2].weight)

    def test_a_training_state_holds_that_part_alone_and_resumes(self, tmp_path):
        stopped = train(self.create())
        stopped.save_training_state(tmp_path / "state")
        assert set(safetensors.torch.load_file(tmp_path / "state" / "model.safetensors")) == {
            "weight",
            "bias",
        }
        resumed, straight = self.create(), train(self.create(), num_epochs=2)
        resumed.train(
            DATA,
            2,
            per_device_batch_size=4,
            create_scheduler_fn=lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
            resume_from=tmp_path / "state",
        )
        assert torch.equal(resumed.model[2].weight, straight.model[2].weight)

    def test_a_state_that_does_not_fit_is_told(self, tmp_path):
        torch.save({"model_state_dict": {"other": torch.zeros(1)}}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match=r"other\.pt' .*another model than Sequential"):
            self.create().load_checkpoint(tmp_path / "other.pt")


def test_a_flag_that_is_no_flag_is_refused_and_no_file_is_written(tmp_path):
    trainer = create_trainer()
    path = tmp_path / "model.pt"
    for name in ("save_optimizer", "save_scheduler"):
        with pytest.raises(ConfigurationError, match=f"^{name} is 'no', but must be one of"):
            trainer.save_checkpoint(path, **{name: "no"})
    assert not path.exists()
    trainer.save_checkpoint(path)
    for name in ("load_optimizer", "load_scheduler"):
        with pytest.raises(ConfigurationError, match=f"^{name} is 'no', but must be one of"):
            trainer.load_checkpoint(path, **{name: "no"})
