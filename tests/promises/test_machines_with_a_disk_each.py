"""Two hosts with a disk each: saved by one, resumed by both, equal to one host.

They are two working folders of one host, or two network namespaces with mounts of their own.
"""

import re
import textwrap

import pytest

from hosts import two_hosts
from launching import launch

JOB = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveBestModelCallback, SaveTrainingStateCallback
    from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
    from accel_core.extending import check_is_shared

    shared, rank = sys.argv[1] in ("one host", "shared disk"), int(os.environ["RANK"])
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


@pytest.mark.slow
def test_a_stop_on_one_host_is_resumed_on_both_to_the_bit(tmp_path):
    assert run("two folders", tmp_path / "apart", "stop") == []
    apart = run("two folders", tmp_path / "apart", "go on")
    one = run("one host", tmp_path / "one", "through")
    assert apart == one and len(one) == 2


@pytest.mark.slow
def test_two_hosts_with_a_network_between_them_equal_one_to_the_bit(tmp_path, monkeypatch):
    script, disk, shared = (tmp_path / name for name in ("job.py", "disk", "shared"))
    script.write_text(textwrap.dedent(JOB))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for folder in (disk, shared):
        folder.mkdir()
    one = run("one host", tmp_path / "one", "through")
    with two_hosts() as hosts:
        both = hosts.launch(script, ["shared disk", shared, "through"])
        # The gradients of 24 updates have come through the cable, and there is no other way.
        assert min(hosts.received()) > 10_000
        stopped = hosts.launch(script, ["disk each", disk, "stop"], disks=disk)
        gone_on = hosts.launch(script, ["disk each", disk, "go on"], disks=disk)
    assert weights_in(both) == one and len(one) == 2
    assert weights_in(stopped) == [] and weights_in(gone_on) == one
    assert list((tmp_path / "disk_of_host_0").glob("host/states/*")) and not list(disk.iterdir())
    assert not (tmp_path / "disk_of_host_1" / "host" / "states").exists()
