"""The guide for users of pytorch-accelerated has every public name of 0.1.61, and what it says of each is true."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import accel_callbacks
import accel_core
import accel_integrations.schedulers

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs" / "migration.md"
SCRIPTS = REPOSITORY / "examples" / "from_pytorch_accelerated"

PUBLIC_NAMES = {
    "pytorch_accelerated": "Trainer TrainerPlaceholderValues notebook_launcher set_seed __version__",
    "trainer": "Trainer DEFAULT_CALLBACKS TrainerPlaceholderValues TrainerWithTimmScheduler replace_trainer_placeholder_values",
    "Trainer": """train evaluate create_train_dataloader create_eval_dataloader get_default_train_dl_kwargs
        get_default_eval_dl_kwargs create_scheduler calculate_train_batch_loss calculate_eval_batch_loss backward_step
        optimizer_step scheduler_step optimizer_zero_grad training_run_start train_epoch_start train_epoch_end eval_epoch_start
        eval_epoch_end training_run_epoch_end training_run_end evaluation_run_start evaluation_run_end gather print
        save_checkpoint load_checkpoint save_training_state load_training_state get_model device run_config run_history
        callback_handler scheduler optimizer model train_dataset eval_dataset collate_fn _accelerator _train_dataloader
        _eval_dataloader _loss_tracker _pad_uneven_eval_batches _create_accelerator _create_callback_handler
        _prepare_model_optimizer_and_dataloaders _create_run_config _run_training _run_evaluation _run_train_epoch
        _run_eval_epoch _perform_forward_and_backward_passes _clip_gradients _update_loss_tracker
        _add_epoch_loss_to_run_history _check_eval_batch_size""",
    "TrainerPlaceholderValues": """NUM_EPOCHS NUM_UPDATE_STEPS_PER_EPOCH PER_PROCESS_NUM_UPDATE_STEPS_PER_EPOCH
        TRAIN_DATALOADER_LEN EVAL_DATALOADER_LEN""",
    "callbacks": """TrainerCallback CallbackHandler StopTrainingError CallbackMethodNotImplementedError get_default_callbacks
        LogMetricsCallback ProgressBarCallback PrintProgressCallback SaveBestModelCallback EarlyStoppingCallback
        TerminateOnNaNCallback MoveModulesToDeviceCallback LimitBatchesCallback ModelEmaCallback ConvertSyncBatchNormCallback
        StepBasedEvaluationCallback LimitEvalStepsCallback SaveTrainingStateCallback WSDCheckpointCallback""",
    "TrainerCallback": "on_stop_training_error",
    "CallbackHandler": "add_callbacks add_callback clear_callbacks callback_list call_event",
    "tracking": "RunHistory InMemoryRunHistory LossTracker",
    "RunHistory": """get_metric_names get_metric_values get_latest_metric set_metric_name_prefix metric_name_prefix update_metric
        delete_metric current_epoch _increment_epoch _set_epoch reset""",
    "LossTracker": "update reset average",
    "run_config": "TrainerRunConfig",
    "TrainerRunConfig": "num_local_update_steps_per_epoch to_dict",
    "schedulers": """SchedulerBase StatefulSchedulerBase CosineLrScheduler WSDLrScheduler
        wsd_scheduler.estimate_checkpoint_steps""",
    "finetuning": "ModelFreezer Layer LayerGroup BN_MODULES",
    "utils": """LimitBatches LIMIT_BATCHES_ENV_VAR DataLoaderSlice local_process_zero_only local_process_zero_first
        world_process_zero_only ModelEma worker_init_fn remove_padding""",
}

EVENTS = """on_init_end on_training_run_start on_train_epoch_start on_train_step_start on_train_step_end on_train_epoch_end
    on_eval_epoch_start on_eval_step_start on_eval_step_end on_eval_epoch_end on_training_run_epoch_end on_training_run_end
    on_evaluation_run_start on_evaluation_run_end"""

ARGUMENTS_KEPT = {
    accel_core.Trainer: "model, loss_func, optimizer, callbacks, run_history=None",
    accel_core.Trainer.train: """train_dataset, num_epochs, eval_dataset=None, per_device_batch_size=8, max_num_train_steps=None,
        gradient_accumulation_steps=1, gradient_clip_value=None, create_scheduler_fn=None, train_dataloader_kwargs=None,
        eval_dataloader_kwargs=None, reset_run_history=True, collate_fn=None, resume_from=None""",
    accel_core.Trainer.evaluate: "dataset=None, per_device_batch_size=8, dataloader_kwargs=None, collate_fn=None",
    accel_core.Trainer.create_train_dataloader: "batch_size, train_dl_kwargs=None",
    accel_core.Trainer.create_eval_dataloader: "batch_size, eval_dl_kwargs=None",
    accel_core.Trainer.get_default_train_dl_kwargs: "batch_size",
    accel_core.Trainer.get_default_eval_dl_kwargs: "batch_size",
    accel_core.Trainer.gather: "tensor, padding_value=None",
    accel_core.Trainer.save_checkpoint: "save_path, checkpoint_kwargs=None, save_optimizer=True, save_scheduler=True",
    accel_core.Trainer.load_checkpoint: "checkpoint_path, load_optimizer=True, load_scheduler=True",
    accel_core.Trainer.save_training_state: "output_dir, checkpoint_kwargs=None",
    accel_core.Trainer.load_training_state: "input_dir",
    accel_core.Trainer.get_model: "keep_torch_compile=True",
    accel_core.LimitBatchesCallback: "num_batches",
    accel_core.LimitBatches: "num_batches",
    accel_callbacks.SaveBestModelCallback: """save_path='best_model.pt', watch_metric='eval_loss_epoch', greater_is_better=False,
        reset_on_train=True, save_optimizer=True, save_scheduler=True, load_saved_checkpoint=True""",
    accel_callbacks.EarlyStoppingCallback: """early_stopping_patience=1, early_stopping_threshold=0.01,
        watch_metric='eval_loss_epoch', greater_is_better=False, reset_on_train=True""",
    accel_callbacks.ModelFreezer: "model, freeze_batch_norms=False",
    accel_callbacks.ModelFreezer.freeze: "from_index=0, to_index=-2, set_modules_as_eval=False",
    accel_callbacks.ModelFreezer.unfreeze: "from_index=-1, to_index=0, set_modules_as_training=True",
    accel_integrations.schedulers.SchedulerBase: "optimizer, param_group_field='lr'",
    accel_integrations.schedulers.CosineLrScheduler: """optimizer, total_num_epochs, num_update_steps_per_epoch, k_decay=1.0,
        lr_min=1e-06, min_lr_ratio=None, num_warmup_epochs=0, warmup_starting_lr=1e-06, warmup_starting_lr_ratio=None,
        num_cooldown_epochs=0""",
    accel_integrations.schedulers.WSDLrScheduler: """optimizer, num_epochs=None, num_update_steps_per_epoch=None,
        total_steps=None, num_warmup_steps=0, decay_phase_ratio=0.1, lr_min=1e-06, warmup_starting_lr=1e-06,
        use_inverse_sqrt_decay=True, num_checkpoints=1, is_continuation_from_checkpoint=False""",
}


def rows():
    """Old name, what stands in the second column, and the third."""
    tables = GUIDE.read_text().partition("## Every public name")[2]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in tables.splitlines()
        if line.startswith("| `")
    ]
    return [(old.strip("`"), new.strip("`"), told) for old, new, told in cells]


def test_every_public_name_is_in_the_table_once():
    listed = [old for old, _, _ in rows()]
    assert len(listed) == len(set(listed))
    wanted = {f"{owner}.{name}" for owner, names in PUBLIC_NAMES.items() for name in names.split()}
    assert wanted <= set(listed)


@pytest.fixture
def trained():
    """Attributes that exist only on an instance are looked up here."""
    model = torch.nn.Linear(2, 2)
    trainer = accel_core.Trainer(
        model, torch.nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), []
    )
    trainer.train(TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1])), num_epochs=1)
    return {
        accel_core.Trainer: trainer,
        accel_core.RunHistory: trainer.run_history,
        accel_core.CallbackList: trainer.callbacks,
    }


@pytest.mark.parametrize(("old", "new", "told"), rows(), ids=lambda value: value.split(".")[-1][:40])
def test_what_the_table_says_of_a_name_is_true(old, new, told, trained):
    if new == "gone":
        assert len(told.split()) >= 3, "says what there is instead"
        return
    parts, module = new.split("."), None
    for number in range(len(parts), 0, -1):
        name = ".".join(parts[:number])
        if importlib.util.find_spec(parts[0]) and _is_module(name):
            module, parts = importlib.import_module(name), parts[number:]
            break
    found = module
    for part in parts:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(trained.get(found, found), part)
    if told.startswith("kept"):
        assert old.rsplit(".", 1)[-1] == new.rsplit(".", 1)[-1]


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("function", ARGUMENTS_KEPT, ids=lambda function: function.__qualname__)
def test_arguments_and_defaults_are_those_of_before(function):
    parameters = [
        parameter for parameter in inspect.signature(function).parameters.values() if parameter.name != "self"
    ]
    for ours, theirs in zip(parameters, ARGUMENTS_KEPT[function].split(","), strict=False):
        name, _, default = theirs.strip().partition("=")
        assert ours.name == name
        assert ours.kind is ours.POSITIONAL_OR_KEYWORD
        assert not default or repr(ours.default) == default


@pytest.mark.parametrize("event", EVENTS.split())
def test_every_event_is_kept(event):
    assert event in accel_core.callbacks.callback_list.EVENTS


def test_the_guide_lists_the_scripts_that_there_are():
    # Those that need images of their own are not among the examples.
    table = GUIDE.read_text().partition("read images from a disk")[0]
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", table, flags=re.MULTILINE))
    assert listed == {path.name for path in SCRIPTS.glob("*.py")} - {"mnist.py"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "mnist.py")
)
def test_a_script_that_was_moved_runs(script, tmp_path):
    finished = subprocess.run(
        [sys.executable, SCRIPTS / script], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    losses = [float(value) for value in re.findall(r"train loss ([\d.]+)", finished.stdout)]
    assert len(losses) >= 4 and losses[-1] < losses[0]
    if script.startswith("train_with_metrics"):
        assert float(re.search(r"evaluation accuracy ([\d.]+)", finished.stdout).group(1)) > 0.88


def test_an_export_of_pytorch_accelerated_loads(tmp_path):
    """The keys of its `save_checkpoint`, with what a callback has added."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    content = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "eval_loss_epoch": 0.5,
    }
    torch.save(content, tmp_path / "best_model.pt")
    other = torch.nn.Linear(2, 2)
    trainer = accel_core.Trainer(other, None, torch.optim.SGD(other.parameters(), lr=1.0), callbacks=[])
    assert trainer.load_checkpoint(tmp_path / "best_model.pt")["eval_loss_epoch"] == 0.5
    assert torch.equal(other.weight, model.weight)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1


def test_a_scheduler_of_timm_leads_to_its_adapter():
    """TrainerWithTimmScheduler took it as it is; taken for one that needs a metric, it would get the loss as its epoch."""
    timm_scheduler = pytest.importorskip("timm.scheduler")
    model = torch.nn.Linear(2, 2)
    trainer = accel_core.Trainer(
        model, torch.nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), []
    )
    data = TensorDataset(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(accel_core.ConfigurationError, match=r"timm_scheduler_fn\(CosineLRScheduler"):
        trainer.train(
            data,
            num_epochs=1,
            eval_dataset=data,
            create_scheduler_fn=lambda optimizer: timm_scheduler.CosineLRScheduler(optimizer, t_initial=4),
        )
