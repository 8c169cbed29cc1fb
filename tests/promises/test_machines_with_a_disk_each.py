"""Two processes that see different disks, by working folders of their own: saved by one, resumed by both, equal to one machine."""

import re

import pytest

from launching import launch

JOB = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch.utils.data import TensorDataset
    from accel_callbacks import SaveBestModelCallback, SaveTrainingStateCallback
    from accel_core import ConfigurationError, Trainer, TrainerCallback, latest_checkpoint
    from accel_core.extending import check_is_shared

    shared, rank = sys.argv[1] == "one machine", int(os.environ["RANK"])
    host = Path(sys.argv[2]) / ("host" if shared else f"host_{rank}")
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


def run(kind, folder, what):
    finished = launch(JOB, processes=2, args=[kind, folder, what], env={"TMPDIR": str(folder)})
    return sorted(re.findall(r"^weights .*$", finished.stdout, re.M))


@pytest.mark.slow
def test_a_stop_on_one_machine_is_resumed_on_both_to_the_bit(tmp_path):
    for name in ("apart", "one"):
        (tmp_path / name).mkdir()
    assert run("two machines", tmp_path / "apart", "stop") == []
    apart = run("two machines", tmp_path / "apart", "go on")
    one = run("one machine", tmp_path / "one", "through")
    assert apart == one and len(one) == 2
