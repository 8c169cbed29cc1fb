"""A script of two stages that is killed in either of them ends with the bits of one that was never stopped.

The script is the recipe of docs/stages.md. It kills all of its processes itself, at a chosen update of a
life.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launching import launch

SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path

    import torch
    from torch.utils.data import TensorDataset

    from accel_callbacks import ModelFreezer, SaveBestModelCallback, SaveTrainingStateCallback
    from accel_core import Trainer, TrainerCallback, latest_checkpoint

    folder, processes, killed_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


    class Killing(TrainerCallback):
        def on_optimizer_step_end(self, trainer):
            if trainer.run_progress.updates_completed == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)


    def create_model():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 2)]
        return torch.nn.Sequential(*layers)


    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
    model = create_model()
    callbacks = [
        SaveTrainingStateCallback(folder / "states", save_every_n_updates=3, keep_last=2),
        # The weights of the worst epoch, so that those at the end of a stage are others than the last ones.
        SaveBestModelCallback(folder / "best.pt", "train_loss_epoch", greater_is_better=True),
        Killing(),
    ]
    trainer = Trainer(
        model, torch.nn.functional.cross_entropy, torch.optim.AdamW(model.parameters(), lr=0.01), callbacks, seed=3
    )
    assert trainer.accelerator.num_processes == processes
    resume_from = latest_checkpoint(folder / "states")
    freezer = ModelFreezer(model)

    freezer.freeze()
    trainer.train(data, num_epochs=2, per_device_batch_size=4, resume_from=resume_from)
    freezer.unfreeze()
    trainer.train(
        data, num_epochs=2, per_device_batch_size=4, resume_from=resume_from, reset_run_history=False
    )
    if trainer.is_main_process:
        result = {
            "model": model.state_dict(),
            "history": trainer.run_history.to_records(),
            "progress": vars(trainer.run_progress),
        }
        torch.save(result, folder / "result.pt")
"""


def end_of(folder: Path, processes: int, kills: list[int]) -> dict[str, Any]:
    """What the script leaves, which is killed at these updates of its lives, one after the other."""
    for killed_at in kills:
        finished = launch(SCRIPT, processes=processes, args=[folder, processes, killed_at], check=False)
        assert finished.returncode != 0, finished.stdout
        assert not (folder / "result.pt").exists()
    launch(SCRIPT, processes=processes, args=[folder, processes, -1])
    return torch.load(folder / "result.pt")  # type: ignore[no-any-return]


def assert_same(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert json.dumps(result["history"]) == json.dumps(expected["history"])
    assert result["progress"] == expected["progress"]
    for name, tensor in expected["model"].items():
        assert torch.equal(result["model"][name], tensor), name


# An epoch has 13 updates on one process and 7 on two.
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("processes", "kills"),
    [
        (1, [5]),
        (1, [27]),  # Before the first save of the second stage, but for that at its beginning.
        (1, [40]),  # After the best weights of the first stage were replaced.
        (1, [17, 26, 44]),
        (2, [5]),
        (2, [9, 14, 23]),
    ],
)
def test_a_script_that_is_killed_in_either_stage_ends_with_the_same_bits(
    processes: int, kills: list[int], tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    expected = end_of(tmp_path / "whole", processes, [])
    assert_same(end_of(tmp_path / "killed", processes, kills), expected)
