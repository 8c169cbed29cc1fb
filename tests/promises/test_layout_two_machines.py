"""DDP on two machines: equal to one process and to one machine, with one disk and a disk each.

The machines are two network namespaces with mounts of their own, and once two working folders of this host. Two
launchers on this host stand for two machines in `tests/documents/test_launch_configs.py`.
"""

import re
import textwrap
from pathlib import Path

import pytest

from case_runner import read_outcome, run_as_script
from hosts import two_hosts
from launching import launch
from layout_promises import GoesOnAnywhere, Layout, LayoutPromises

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]
"""Each job on two hosts may take 200 seconds, as `Hosts.launch` says."""
LAYOUT = Layout("DDP")
CASES = LAYOUT.cases(is_first=True)

JOB = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveBestModelCallback, SaveTrainingStateCallback
    from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
    from accel_core.extending import check_is_shared

    shared, rank = sys.argv[1] == "one host", int(os.environ["RANK"])
    host = Path(sys.argv[2]) / (f"host_{rank}" if sys.argv[1] == "two folders" else "host")
    host.mkdir(exist_ok=True)
    os.chdir(host)

    class Story(TrainerCallback):
        loaded = None
        def on_optimizer_step_end(self, trainer):
            if sys.argv[3] == "stop" and rank == 1 and trainer.run_progress.updates_completed == 10:
                os.kill(os.getpid(), signal.SIGTERM)
        def on_checkpoint_loaded(self, trainer, path):
            self.loaded = path
        def state_dict(self):
            return {"rank": rank}
        def load_state_dict(self, state):
            assert state == {"rank": rank}

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    story = Story()
    callbacks = [SaveTrainingStateCallback("states", save_every_n_updates=4), SaveBestModelCallback("best.pt"), story]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks, seed=3)
    points = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(points, points.sum(1, keepdim=True))
    try:
        trainer.train(data, 3, data, per_device_batch_size=4, resume_from=latest_checkpoint("states"))
    except SystemExit:
        assert sys.argv[3] == "stop"
        sys.exit()
    assert (sys.argv[3] == "go on") == (story.loaded is not None)
    values = [value for parameter in model.parameters() for value in parameter.flatten().tolist()]
    print("weights", rank, trainer.run_progress.updates_completed, values, flush=True)
    assert (host / "states").exists() == (shared or rank == 0)
    assert not list(Path(os.environ["TMPDIR"]).glob("accel_state_*"))
    try:
        check_is_shared(Path("probe"), trainer.is_main_process)
    except ConfigurationError as error:
        assert not shared and "the processes [1] do not see" in str(error) and "a disk that they share" in str(error)
    else:
        assert shared
    trainer.accelerator.wait_for_everyone()  # The main process removes its probe after the others have seen it.
    assert not list(host.glob("probe/*"))
"""


def weights_in(finished):
    return sorted(re.findall(r"^weights .*$", finished.stdout, re.M))


def run(kind, folder, what):
    folder.mkdir(exist_ok=True)
    return weights_in(launch(JOB, processes=2, args=[kind, folder, what], env={"TMPDIR": str(folder)}))


def test_a_stop_on_one_of_two_folders_is_resumed_on_both_to_the_bit(tmp_path):
    assert run("two folders", tmp_path / "apart", "stop") == []
    apart = run("two folders", tmp_path / "apart", "go on")
    one = run("one host", tmp_path / "one", "through")
    assert apart == one and len(one) == 2


@pytest.fixture
def layout():
    return LAYOUT


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Both hosts see one disk."""
    folder = tmp_path_factory.mktemp("shared")
    with two_hosts() as hosts:
        hosts.launch(Path(__file__), [2, folder], env={"PYTHONPATH": str(Path(__file__).parents[1])})
        # The gradients have come through the cable, and there is no other way.
        assert min(hosts.received()) > 10_000
    return read_outcome(CASES, 2, folder)


class TestTwoMachinesWithOneDisk(LayoutPromises, GoesOnAnywhere):
    """All that is promised."""


def test_a_stop_on_one_of_two_hosts_with_a_disk_each_is_resumed_on_both_to_the_bit(tmp_path):
    script, disk = tmp_path / "job.py", tmp_path / "disk"
    script.write_text(textwrap.dedent(JOB))
    disk.mkdir()
    one = run("one host", tmp_path / "one", "through")
    with two_hosts() as hosts:
        environment = {"TMPDIR": str(tmp_path)}
        stopped = hosts.launch(script, ["disk each", disk, "stop"], disks=disk, env=environment)
        gone_on = hosts.launch(script, ["disk each", disk, "go on"], disks=disk, env=environment)
        assert min(hosts.received()) > 10_000
    assert weights_in(stopped) == [] and weights_in(gone_on) == one and len(one) == 2
    assert list((tmp_path / "disk_of_host_0").glob("host/states/*")) and not list(disk.iterdir())
    assert not (tmp_path / "disk_of_host_1" / "host" / "states").exists()


if __name__ == "__main__":
    run_as_script(CASES)
