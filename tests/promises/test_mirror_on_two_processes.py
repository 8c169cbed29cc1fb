"""Two processes that are killed and lose their disk go on from the mirror, to the bit: one of them downloads."""

import re
import shutil

import pytest

from launching import launch, start, wait_until

JOB = """
    import os, signal, sys, time
    from pathlib import Path
    import torch
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveTrainingStateCallback
    from accel_core import Trainer, TrainerCallback, latest_checkpoint
    from accel_core.state.store import Store

    folder, is_killed = Path(sys.argv[1]), sys.argv[2] == "killed"
    rank = int(os.environ["RANK"])
    get = Store.get

    def counted(self, name, local):
        with (folder / "downloads").open("a") as file:
            file.write(f"{rank} {name}\\n")
        time.sleep(0.05)
        get(self, name, local)

    Store.get = counted
    newest = latest_checkpoint(f"file://{folder}/mirror", cache=folder / "states")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
    saver = SaveTrainingStateCallback(
        folder / "states", save_every_n_updates=4, keep_last=2, mirror=f"file://{folder}/mirror"
    )

    class Story(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if is_killed and trainer.run_progress.updates_completed == 10:
                (folder / f"at_10_of_{rank}").touch()
                time.sleep(600)

    trainer = Trainer(
        model, torch.nn.functional.mse_loss, torch.optim.AdamW(model.parameters(), lr=0.01), [saver, Story()], seed=3
    )
    points = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    trainer.train(
        TensorDataset(points, points.sum(1, keepdim=True)), 2, per_device_batch_size=4, resume_from=newest
    )
    values = [value for parameter in model.parameters() for value in parameter.flatten().tolist()]
    print("weights", rank, newest and newest.name, values, flush=True)
"""


def weights_of(output):
    found = re.findall(r"weights (\d) (\S+) (\[.*\])", output)
    assert len(found) == 2 and found[0][2] == found[1][2]
    return found[0][1], found[0][2]


@pytest.mark.slow
def test_two_processes_that_lose_their_disk_go_on_from_the_mirror(tmp_path):
    mirror = tmp_path / "lost" / "mirror"
    for name in ("lost", "whole"):
        (tmp_path / name).mkdir()
    with start(JOB, processes=2, args=[tmp_path / "lost", "killed"]) as running:
        wait_until(lambda: len(list((tmp_path / "lost").glob("at_10_of_*"))) == 2, running)
        wait_until(lambda: list(mirror.glob("update_00000008-*/trainer_state.json")), running)
        running.kill()
    shutil.rmtree(tmp_path / "lost" / "states")
    finished = launch(JOB, processes=2, args=[tmp_path / "lost", "goes on"])
    newest, weights = weights_of(finished.stdout)
    assert newest == "update_00000008"
    downloads = (tmp_path / "lost" / "downloads").read_text().splitlines()
    # Each file once, all by one process.
    assert len({line.split()[0] for line in downloads}) == 1
    assert len({line.split()[1] for line in downloads}) == len(downloads)
    whole = launch(JOB, processes=2, args=[tmp_path / "whole", "whole"])
    assert weights_of(whole.stdout) == ("None", weights)
