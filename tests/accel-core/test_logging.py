"""What the trainer decides, in the loggers under `accel_core`."""

import logging
import re
from pathlib import Path

import pytest

from launching import launch
from tiny import SaveAt, tiny_data, tiny_trainer


def test_decisions_are_logged_by_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "accel_core"):
        tiny_trainer(callbacks=[SaveAt(2, tmp_path / "state")]).train(
            tiny_data(), num_epochs=1, eval_dataset=tiny_data(5)
        )
        tiny_trainer().train(tiny_data(), num_epochs=1, resume_from=tmp_path / "state")
    told = {(record.name, record.levelname): record.getMessage() for record in caplog.records}
    assert "a single process" in told["accel_core.engine", "INFO"]
    assert "TensorDataset" in told["accel_core.loader", "DEBUG"]
    assert str(tmp_path / "state") in told["accel_core.saves", "INFO"]
    assert "after update 2" in told["accel_core.evaluations", "DEBUG"] + told["accel_core.resume", "INFO"]


def test_a_notice_has_the_time_and_is_not_printed_if_it_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = tiny_trainer()
    trainer.train(tiny_data(), num_epochs=1)
    trainer.save_training_state(tmp_path / "state")
    tiny_trainer().train(tiny_data(), num_epochs=1, resume_from=tmp_path / "state")
    notice = "is finished after 5 updates"
    assert re.search(rf"^\d\d:\d\d:\d\d The run in .* {notice}", capsys.readouterr().out, flags=re.MULTILINE)
    with caplog.at_level(logging.INFO, "accel_core"):
        tiny_trainer().train(tiny_data(), num_epochs=1, resume_from=tmp_path / "state")
    assert notice in caplog.text
    assert notice not in capsys.readouterr().out


@pytest.mark.slow
def test_each_of_two_processes_says_which_it_is() -> None:
    finished = launch(
        """
        import logging, torch
        from accelerate import Accelerator
        from torch.utils.data import TensorDataset
        from accel_core import Trainer
        logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
        model = torch.nn.Linear(4, 1)
        data = TensorDataset(torch.ones(16, 4), torch.ones(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(model, torch.nn.functional.mse_loss, optimizer, callbacks=[]).train(data, 1)
        """
    )
    for process in (0, 1):
        assert f"accel_core.engine [process {process} of 2] " in finished.stderr
