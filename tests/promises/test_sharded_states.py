"""States of FSDP2: nothing in them is executed, and they go on with any number of processes.

Accelerate refuses FSDP2 on a CPU, so its state is set by hand (`tests/layouts.py`).
"""

import itertools
import json
import shutil
import struct
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils.data import TensorDataset

from accel_core import AccelWarning, CheckpointError, ConfigurationError, Trainer, verify_checkpoint
from accel_core.state import checkpoint
from accel_core.state.checkpoint import read_model_state, read_optimizer_state
from accel_core.state.files import write_json
from case_runner import compare, run_as_script, shared_folder
from layouts import fsdp2
from tiny import SaveAt

pytestmark = pytest.mark.slow
GLOBAL_BATCH = 12
UPDATES = 12


class Net(nn.Module):
    """Sizes that no number of processes divides, a shared weight, whole numbers, and a state that is no tensor."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 3)
        self.norm = nn.LayerNorm(7)
        self.repeated = self.middle
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.register_buffer("forwards", torch.tensor(0))
        self.note = "none"

    def forward(self, inputs):
        if self.training:
            self.forwards += 1
            self.note = f"forward {int(self.forwards)}"
        hidden = self.first(inputs).tanh() * self.frozen
        return self.last(self.norm(self.repeated(self.middle(hidden).tanh())))

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def adamw(model):
    matrices = [each for each in model.parameters() if each.ndim > 1]
    vectors = [each for each in model.parameters() if each.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.02}]
    return torch.optim.AdamW(groups, lr=0.05, amsgrad=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Rows(torch.optim.Optimizer):
    """Its states have other shapes than the parameters, one is a number, and some stand in a list."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05, "scale": torch.tensor(0.5)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                square = parameter.grad.square()
                rows = square.mean(-1) if parameter.ndim > 1 else square
                before = state.get("moments", [torch.zeros_like(rows), torch.zeros_like(square)])
                state["moments"] = [0.9 * before[0] + rows, 0.9 * before[1] + square]
                state["count"] = state.get("count", 0) + 1
                norm = state["moments"][0].sqrt() + state["moments"][1].sqrt().mean(-1) + 1e-3
                size = norm[:, None] if parameter.ndim > 1 else norm
                parameter -= group["lr"] * group["scale"].item() * parameter.grad / size / state["count"]


def rows(model):
    return Rows(each for each in model.parameters() if each.ndim > 1)


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "rows": rows}


def make_data(num_samples=60):
    generator = torch.Generator().manual_seed(num_samples)
    inputs = torch.randn(num_samples, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (num_samples,), generator=generator))


def make_trainer(optimizer, callbacks=(), seed=3):
    model = Net(seed)
    return Trainer(model, nn.CrossEntropyLoss(), OPTIMIZERS[optimizer](model), callbacks, seed=7)


def train(optimizer, updates, save_at=None, resume_from=None, trusts=False):
    callbacks = [SaveAt(*save_at)] if save_at else []
    trainer = make_trainer(optimizer, callbacks, seed=3 if resume_from is None else 4)
    trainer.trust_engine_files = trusts
    trainer.train(
        make_data(),
        max_num_train_steps=updates,
        per_device_batch_size=GLOBAL_BATCH // Accelerator().num_processes,
        create_scheduler_fn=lambda each: torch.optim.lr_scheduler.StepLR(each, 2, 0.7),
        gradient_clip_norm=1.0,
        resume_from=resume_from,
    )
    return trainer


def outcome_of(trainer):
    path = shared_folder() / "model.pt"
    trainer.save_checkpoint(path, save_optimizer=False)
    weights = torch.load(path, weights_only=True)["model_state_dict"]
    note = weights.pop("_extra_state")["note"]
    return {
        "weights": dict(weights),
        "note": int(note.split()[1]),
        "updates": trainer.run_progress.updates_completed,
    }


def chain(batch_size):
    """Save after 3 updates in the first launch, after 7 in the second; each goes on from the launch before."""
    folder = Path(sys.argv[3])
    found = {}
    for name in OPTIMIZERS:
        number = len(list(folder.glob(f"{name}_*")))
        save_at = (3 + 4 * number, folder / f"{name}_{Accelerator().num_processes}")
        before = next(iter(sorted(folder.glob(f"{name}_*"))), None)
        whole = train(name, UPDATES, save_at, before)
        rest = train(name, UPDATES, resume_from=save_at[1])
        found[name] = outcome_of(whole), outcome_of(rest)
    return found


def refuse(batch_size):
    """A model and an optimizer that are others than those of the state; weights stay as they were."""
    told = {}
    folder = Path(sys.argv[3]) / f"adamw_{Accelerator().num_processes}"
    for name in ("model", "optimizer"):
        trainer = make_trainer("adamw" if name == "model" else "sgd")
        if name == "model":
            trainer.model.further = nn.Linear(2, 2)
        before = {key: value.clone() for key, value in trainer.model.named_parameters()}
        try:
            trainer.train(make_data(), 1, per_device_batch_size=batch_size, resume_from=folder)
        except CheckpointError as error:
            told[name] = str(error)
        assert all(torch.equal(before[key], value) for key, value in Net().named_parameters())
    return told


def write_as_before(batch_size):
    """What an older torch makes: Accelerate writes, and the run says so; such states still load if trusted."""
    folder = shared_folder() / "state"
    kept = torch.distributed.checkpoint.HuggingFaceStorageWriter
    del torch.distributed.checkpoint.HuggingFaceStorageWriter
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AccelWarning)
            whole = outcome_of(train("adamw", 6, (3, folder)))
    finally:
        torch.distributed.checkpoint.HuggingFaceStorageWriter = kept
    told = [str(each.message) for each in caught if issubclass(each.category, AccelWarning)]
    try:
        train("adamw", 6, resume_from=folder)
        refused = None
    except ConfigurationError as error:
        refused = str(error)
    rest = outcome_of(train("adamw", 6, resume_from=folder, trusts=True))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.distcp"))
    return {"whole": whole, "rest": rest, "told": told, "refused": refused, "files": files}


CASES = {"chain": chain, "refusals": refuse, "before": write_as_before}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def outcomes(folder, tmp_path_factory):
    """Of two processes, and of three that go on from them."""
    return {
        processes: compare(
            CASES, __file__, processes, tmp_path_factory.mktemp(f"cases_{processes}"), args=[folder]
        )
        for processes in (2, 3)
    }


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_number_of_processes_goes_on_to_the_bit(outcomes, processes, optimizer):
    for result in outcomes[processes].of("chain"):
        whole, rest = result[optimizer]
        torch.testing.assert_close(rest, whole, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_then_three_then_one_process_end_like_one(outcomes, folder, optimizer):
    alone = outcome_of(train(optimizer, UPDATES))
    for result in outcomes[3].of("chain"):
        assert_equal(result[optimizer][0], alone)
    last = outcome_of(train(optimizer, UPDATES, resume_from=folder / f"{optimizer}_3"))
    assert_equal(last, alone)


def files_of(folder):
    states = sorted(path for path in folder.iterdir() if path.is_dir())
    assert len(states) == len(OPTIMIZERS) * 2
    return list(itertools.chain.from_iterable(sorted(state.rglob("*")) for state in states))


def test_nothing_in_the_files_is_executed(outcomes, folder):
    """Each byte of a sharded file belongs to a tensor of a plain type, and no other file names a function."""
    kinds = set()
    for path in files_of(folder):
        kinds.add(path.suffix)
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            header.pop("__metadata__")
            ends = [each["data_offsets"][1] for each in header.values()]
            assert len(content) == 8 + length + max(ends)
            assert all(name.startswith(("model.", "optimizer")) for name in header)
            assert {each["dtype"] for each in header.values()} <= {"F32", "I64"}
        elif path.suffix == ".pt":
            assert get_unsafe_globals_in_checkpoint(path) == []
    assert kinds == {"", ".safetensors", ".pt", ".json", ".jsonl"}


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_writes_its_parts_and_each_part_is_written_once(outcomes, folder, processes):
    state = folder / f"adamw_{processes}"
    shards = sorted((state / "engine").iterdir())
    assert len(shards) == processes
    num_values = 0
    for shard in shards:
        with safetensors.safe_open(shard, framework="pt") as file:
            num_values += sum(file.get_tensor(name).numel() for name in file.offset_keys())
    whole = read_optimizer_state(state)["state"].values()
    tensors = [value for each in whole for value in each.values()]
    # One name of the shared weight too.
    tensors += [value for value in read_model_state(state).values() if torch.is_tensor(value)]
    assert num_values == sum(tensor.numel() for tensor in tensors)


def test_whole_tensors_of_a_sharded_state_are_those_of_an_export(outcomes, folder):
    """Both name a shared weight twice."""
    state = read_model_state(folder / "adamw_2")
    assert torch.equal(state["middle.weight"], state["repeated.weight"])
    assert state["_extra_state"] == {"note": f"forward {int(state['forwards'])}"}
    assert state.keys() == Net().state_dict().keys()


def test_every_file_is_checked_by_its_digest(outcomes, folder):
    assert verify_checkpoint(folder) == {
        folder / f"{name}_{processes}": None for name in OPTIMIZERS for processes in (2, 3)
    }
    state = json.loads((folder / "adamw_2" / "trainer_state.json").read_text())
    assert sum(name.startswith("engine/") for name in state["digests"]) == 2


def test_a_version_that_knows_no_shards_says_that_another_has_written_them(outcomes, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", checkpoint.WHOLE_FORMAT_VERSION)
    assert verify_checkpoint(folder / "adamw_2") == {
        folder / "adamw_2": "has the format 3, not 1 to 2; use the version of accel that wrote it"
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_a_state_of_another_model_or_optimizer_is_refused_before_anything_changes(outcomes, processes):
    for told in outcomes[processes].of("refusals"):
        assert "holds the state of another model than Net: it has no: ['further.bias'" in told["model"]
        assert "The SGD of this run cannot load its state from" in told["optimizer"]


def test_an_older_torch_writes_as_before_and_says_so_and_such_states_still_load(outcomes):
    main, other = outcomes[2].of("before")
    for result in (main, other):
        torch.testing.assert_close(result["rest"], result["whole"], rtol=0, atol=0)
        assert "trainer.trust_engine_files = True" in result["refused"]
        assert result["files"]
    assert len(main["told"]) == 1 and "cannot write sharded safetensors" in main["told"][0]
    assert other["told"] == []


def test_one_process_refuses_what_an_engine_has_pickled(tmp_path, outcomes, folder):
    """The way of states of DeepSpeed and of older versions."""
    state = tmp_path / "state"
    shutil.copytree(folder / "adamw_2", state)
    (state / "sharded.pt").rename(tmp_path / "sharded.pt")
    content = json.loads((state / "trainer_state.json").read_text())
    del content["files"]["sharded.pt"], content["digests"]["sharded.pt"]
    write_json(state / "trainer_state.json", {k: v for k, v in content.items() if k != "sha256"}, True)
    with pytest.raises(CheckpointError, match="saved with an engine that shards"):
        train("adamw", UPDATES, resume_from=state)


if __name__ == "__main__":
    run_as_script(
        CASES,
        # Torch and Accelerate warn of their own calls of each other.
        ignore=".*",
        # Weights that layers share go with the whole model.
        create_accelerator=partial(fsdp2, num_parameters=10_000),
        distributed_type=DistributedType.FSDP,
    )
