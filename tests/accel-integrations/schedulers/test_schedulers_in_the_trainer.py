"""Schedules in real runs: planned with the run's own numbers, equal on any number of processes, resumed and continued."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import Trainer, TrainerCallback, TrainerPlaceholderValues
from accel_integrations.schedulers import CosineLrScheduler, StatefulSchedulerBase, WSDLrScheduler
from launching import launch
from tiny import Rates, SaveAt


def train(create_scheduler_fn, callbacks=(), **kwargs):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    dataset = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
    recorder = Rates()
    trainer = Trainer(
        model,
        nn.MSELoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=(recorder, *callbacks),
        seed=1,
    )
    kwargs = {"num_epochs": 3, "per_device_batch_size": 4, **kwargs}
    trainer.train(dataset, create_scheduler_fn=create_scheduler_fn, **kwargs)
    return recorder.of_first_group, trainer


def expected_rates(scheduler, first=0):
    return [scheduler.get_updated_values(n)[0] for n in range(first, scheduler.num_updates)]


@pytest.mark.parametrize("scheduler_class", [CosineLrScheduler, WSDLrScheduler])
def test_each_update_uses_the_value_of_the_updates_before_it(scheduler_class):
    rates, trainer = train(scheduler_class.create_scheduler_fn(num_warmup_epochs=0.5))
    assert len(rates) == trainer.scheduler.num_updates == 30
    assert rates == expected_rates(trainer.scheduler)
    assert rates[5] == 0.1
    assert rates[4] < 0.1


def test_accumulation_is_counted_in_updates():
    rates, trainer = train(CosineLrScheduler.create_scheduler_fn(lr_min=0.0), gradient_accumulation_steps=4)
    assert len(rates) == trainer.scheduler.total_updates == 9
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_a_run_that_is_limited_in_updates_reaches_the_minimum():
    rates, trainer = train(CosineLrScheduler.create_scheduler_fn(lr_min=0.0), max_num_train_steps=17)
    assert len(rates) == 17
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("scheduler_class", [CosineLrScheduler, WSDLrScheduler])
def test_a_resumed_run_uses_the_same_rates(scheduler_class, tmp_path):
    create_scheduler_fn = scheduler_class.create_scheduler_fn(num_warmup_epochs=0.5)
    rates, _ = train(create_scheduler_fn, [SaveAt(13, tmp_path / "state")])
    resumed_rates, trainer = train(create_scheduler_fn, resume_from=tmp_path / "state")
    assert resumed_rates == rates[13:]
    assert trainer.scheduler.num_updates == 30


class FallingWeightDecay(StatefulSchedulerBase):
    def __init__(self, optimizer, num_update_steps):
        self.num_update_steps = num_update_steps
        super().__init__(optimizer, param_group_field="weight_decay")

    def get_updated_values(self, num_updates):
        return [base * (1 - num_updates / self.num_update_steps) for base in self.base_values]


def test_any_field_of_the_parameter_groups_follows_a_schedule_also_in_a_resumed_run(tmp_path):
    class RecordDecay(TrainerCallback):
        def __init__(self):
            self.values = []

        def on_optimizer_step_start(self, trainer):
            self.values.append(trainer.optimizer.param_groups[0]["weight_decay"])

    def run(*callbacks, **kwargs):
        recorder, model = RecordDecay(), nn.Linear(3, 1)
        dataset = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        trainer = Trainer(model, nn.MSELoss(), optimizer, callbacks=(recorder, *callbacks), seed=1)
        create_scheduler_fn = functools.partial(
            FallingWeightDecay, num_update_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS
        )
        trainer.train(
            dataset, num_epochs=2, per_device_batch_size=4, create_scheduler_fn=create_scheduler_fn, **kwargs
        )
        return recorder.values

    whole = run(SaveAt(13, tmp_path / "state"))
    assert whole == [0.5 * (1 - n / 20) for n in range(20)]
    assert run(resume_from=tmp_path / "state") == whole[13:]


def test_a_wsd_run_is_continued_for_longer_from_before_its_decay(tmp_path):
    rates, _ = train(
        WSDLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5), [SaveAt(27, tmp_path / "state")]
    )
    assert rates[27] == 0.1
    assert rates[28] < 0.1
    create_scheduler_fn = WSDLrScheduler.create_scheduler_fn(is_continuation_from_checkpoint=True)
    continued_rates, trainer = train(create_scheduler_fn, num_epochs=5, resume_from=tmp_path / "state")
    assert trainer.scheduler.get_decay_info() == [
        {"period_start": 27, "period_end": 50, "decay_steps": 2, "pre_decay_step": 48}
    ]
    assert continued_rates == expected_rates(trainer.scheduler, first=27)
    assert continued_rates[:22] == [0.1] * 22
    assert continued_rates[22] < 0.1


def test_lesson_4_two_processes_run_the_whole_schedule(tmp_path):
    script = """
        import json, sys
        import torch
        from accel_core import Trainer, TrainerCallback
        from accel_integrations.schedulers import CosineLrScheduler
        from torch import nn
        from torch.utils.data import TensorDataset

        class RecordRates(TrainerCallback):
            rates = []

            def on_optimizer_step_start(self, trainer):
                self.rates.append(trainer.optimizer.param_groups[0]["lr"])

        model = nn.Linear(3, 1)
        trainer = Trainer(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), callbacks=(RecordRates,), seed=1)
        dataset = TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
        create_scheduler_fn = CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, lr_min=0.0)
        trainer.train(dataset, num_epochs=3, per_device_batch_size=2, create_scheduler_fn=create_scheduler_fn)
        accelerator = trainer.accelerator
        assert (accelerator.num_processes, str(accelerator.distributed_type)) == (2, "DistributedType.MULTI_CPU")
        with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
            json.dump([*RecordRates.rates, trainer.optimizer.param_groups[0]["lr"]], file)
        accelerator.end_training()
    """
    launch(script, processes=2, args=[tmp_path])
    rates, trainer = train(CosineLrScheduler.create_scheduler_fn(num_warmup_epochs=0.5, lr_min=0.0))
    expected = [*rates, trainer.optimizer.param_groups[0]["lr"]]
    assert expected[-1] == 0.0
    for process in range(2):
        assert json.loads((tmp_path / f"{process}.json").read_text()) == expected
