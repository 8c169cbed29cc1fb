"""No address of a store becomes a folder of this machine named `s3:`."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from accel_callbacks import (
    ModelEmaCallback,
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from accel_core import (
    ConfigurationError,
    InMemoryRunHistory,
    Trainer,
    best_checkpoint,
    latest_checkpoint,
    verify_checkpoint,
)
from accel_core.extending import check_path
from accel_integrations.schedulers import WSDCheckpointCallback


def create_trainer():
    model = torch.nn.Linear(2, 1)
    return Trainer(model, torch.nn.functional.mse_loss, torch.optim.SGD(model.parameters()), callbacks=())


def train(address):
    data = TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    create_trainer().train(data, 1, resume_from=address)


WAYS = {
    "save_dir": SaveTrainingStateCallback,
    "save_dir of decays": WSDCheckpointCallback,
    "folder": latest_checkpoint,
    "folder of the best": best_checkpoint,
    "path of a table": lambda address: InMemoryRunHistory().to_csv(address),
    "resume_from": train,
    "input_dir": lambda address: create_trainer().load_training_state(address),
}


TAKEN = {
    "path": verify_checkpoint,
    "save_path": SaveBestModelCallback,
    "save_path of averages": lambda address: ModelEmaCallback(save_path=address),
    "save_path of an export": lambda address: create_trainer().save_checkpoint(address),
    "checkpoint_path": lambda address: create_trainer().load_checkpoint(address),
    "mirror": lambda address: SaveTrainingStateCallback(mirror=address),
}
"""What takes an address, but none that has lost a slash."""


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://bucket/run.pt", Path("memory://run")])
@pytest.mark.parametrize("way", WAYS)
def test_an_address_is_refused_with_the_way_out(way, address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = way.split(" ")[0]
    with pytest.raises(ConfigurationError, match=rf"^{name} is .*address of a store.*[Pp]ass "):
        WAYS[way](address)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", TAKEN)
def test_an_address_as_a_path_is_refused_where_one_as_text_is_taken(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = way.split(" ")[0]
    with pytest.raises(
        ConfigurationError, match=rf"^{name} is Path\('memory:/run'\).*loses a slash.*Pass it as text"
    ):
        TAKEN[way](Path("memory://run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["C:/runs/1", "C:\\runs", "a:b", "update: 3/x", "runs/s3:/x", "./run"])
def test_paths_with_colons_are_none(path):
    assert check_path("path", path, "") == Path(path)
