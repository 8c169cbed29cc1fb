"""Tables of names of other libraries, each with a sentence on what to use here.

The names are those of pytorch-accelerated, Lightning, transformers, fastai, Keras and ignite.
"""

from __future__ import annotations

FOREIGN_METHODS = {
    "_create_accelerator": "create_accelerator",
    "_create_callback_handler": "the argument callbacks, and trainer.callbacks",
    "_prepare_model_optimizer_and_dataloaders": "prepare",
    "_create_run_config": "create_run_config",
    "_run_training": "run_training",
    "_run_evaluation": "evaluate",
    "_run_train_epoch": "run_train_epoch",
    "_run_eval_epoch": "run_eval_epoch",
    "_perform_forward_and_backward_passes": "run_train_step",
    "_clip_gradients": "clip_gradients",
    "_update_loss_tracker": "calculate_train_batch_loss, and return the loss to track",
    "_add_epoch_loss_to_run_history": "train_epoch_end or eval_epoch_end",
}
"""Methods of pytorch-accelerated's `Trainer` that its users override."""


FOREIGN_STEPS = {
    "training_step": "calculate_train_batch_loss",
    "validation_step": "calculate_eval_batch_loss",
    "predict_step": "calculate_predictions",
    "prediction_step": "calculate_predictions",
    "compute_loss": "calculate_train_batch_loss",
    "one_batch": "run_train_step",
    "train_step": "calculate_train_batch_loss",
    "test_step": "calculate_eval_batch_loss",
    "val_dataloader": "create_eval_dataloader",
    "get_train_dataloader": "create_train_dataloader",
    "get_eval_dataloader": "create_eval_dataloader",
}
"""Methods of Lightning, transformers, fastai and Keras. They may also be helpers of accel's method."""


FOREIGN_OPTIMIZERS = ("configure_optimizers", "create_optimizer", "create_optimizer_and_scheduler")
"""Methods of Lightning and transformers that make an optimizer, which a trainer of accel is given."""


FOREIGN_ATTRIBUTES = {
    # pytorch-accelerated
    "callback_handler": "Use trainer.callbacks.",
    "_accelerator": "Use trainer.accelerator.",
    "_train_dataloader": "Use trainer.train_dataloader.",
    "_eval_dataloader": "Use trainer.eval_dataloader.",
    "_loss_tracker": "Use trainer.train_loss or trainer.eval_loss.",
    # what trains and evaluates
    "fit": "Use train(train_dataset, num_epochs, eval_dataset=...).",
    "run": "Use train(train_dataset, num_epochs).",
    "validate": "Use evaluate(dataset).",
    "test": "Use evaluate(dataset).",
    "compile": "Pass the loss and the optimizer to Trainer, and torch.compile(model) as its model.",
    "fit_one_cycle": "Use train with create_scheduler_fn=partial(OneCycleLR, max_lr=..., "
    "total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS).",
    "fine_tune": "Use ModelFreezer of accel_callbacks, and train.",
    "freeze": "Use ModelFreezer of accel_callbacks.",
    "freeze_to": "Use ModelFreezer of accel_callbacks.",
    "unfreeze": "Use ModelFreezer or UnfreezeCallback of accel_callbacks.",
    "lr_find": "Use find_learning_rate of accel_callbacks.",
    "hyperparameter_search": "Call train in your own loop; OptunaPruningCallback ends hopeless trials.",
    "get_preds": "Use predict(dataset).",
    "predict_on_batch": "Use calculate_predictions(batch), or predict(dataset).",
    "manual_backward": "Use backward_step(loss), then step_optimizer(optimizer).",
    # where a run stands
    "global_step": "Use trainer.run_progress.updates_completed.",
    "current_epoch": "Use trainer.run_progress.current_epoch.",
    "max_epochs": "Use trainer.run_config.num_epochs.",
    "max_steps": "Use trainer.run_config.max_num_train_steps.",
    "estimated_stepping_batches": "Use trainer.run_config.num_update_steps.",
    "should_stop": "Use request_stop(reason), and read trainer.stop_reason.",
    "state": "Use trainer.run_progress and trainer.run_history.",
    "control": "Use request_stop(reason).",
    "args": "Use trainer.run_config.",
    # what was measured
    "callback_metrics": "Use trainer.run_history.get_latest_metric(name).",
    "logged_metrics": "Use trainer.run_history.get_latest_metric(name).",
    "recorder": "Use trainer.run_history, and plot_history of accel_callbacks.",
    "history": "Use trainer.run_history.",
    "log": "Return 'log': {name: value} from a step, or use trainer.run_history.update_metric(name, value).",
    "log_dict": "Return 'log': {name: value} from a step.",
    "log_metrics": "Use trainer.run_history, or LogMetricsCallback.",
    "logger": "Use TrackerCallback of accel_callbacks.",
    "loggers": "Use TrackerCallback of accel_callbacks.",
    "summary": "Use print(trainer.describe()).",
    "show_results": "Use predict(dataset).",
    # parts
    "dls": "Use trainer.train_dataloader and trainer.eval_dataloader.",
    "val_dataloaders": "Use trainer.eval_dataloaders.",
    "datamodule": "Use trainer.train_dataset and trainer.eval_dataset.",
    "opt": "Use trainer.optimizer.",
    "optimizers": "Use trainer.optimizer.",
    "lr_scheduler": "Use trainer.scheduler.",
    "lr_schedulers": "Use trainer.scheduler.",
    "strategy": "Use trainer.engine.",
    "add_callback": "Use trainer.callbacks.add_callback(callback).",
    "add_cb": "Use trainer.callbacks.add_callback(callback).",
    "remove_callback": "Use trainer.callbacks.clear_callbacks(), and add those that stay.",
    "add_event_handler": "Write a TrainerCallback, and pass it to Trainer.",
    # files
    "save": "Use save_checkpoint(path).",
    "export": "Use save_checkpoint('model.safetensors').",
    "load": "Use load_checkpoint(path).",
    "save_model": "Use save_checkpoint(path); TransformersTrainer has save_pretrained(folder).",
    "save_weights": "Use save_checkpoint('model.safetensors').",
    "load_weights": "Use load_checkpoint(path).",
    "save_state": "Use save_training_state(folder).",
    "push_to_hub": "Use trainer.get_model().push_to_hub(name) for a model of transformers.",
    # processes
    "is_global_zero": "Use trainer.is_main_process.",
    "is_world_process_zero": "Use trainer.is_main_process.",
    "is_local_process_zero": "Use trainer.accelerator.is_local_main_process.",
    "global_rank": "Use trainer.accelerator.process_index.",
    "local_rank": "Use trainer.accelerator.local_process_index.",
    "world_size": "Use trainer.accelerator.num_processes.",
    "to_fp16": "Pass accelerator=Accelerator(mixed_precision='fp16') to Trainer.",
    "to_bf16": "Pass accelerator=Accelerator(mixed_precision='bf16') to Trainer.",
    **{name: f"Use {here}." for name, here in FOREIGN_METHODS.items()},
}
"""Attributes of a trainer of other libraries."""


_EPOCHS = "Pass num_epochs to train."
_UPDATES = "Pass max_num_train_steps, a number of updates, to train."
_DATA = "Pass train_dataset to train."
_EVAL_DATA = "Pass eval_dataset to train."
_BATCH_SIZE = "Pass per_device_batch_size to train, evaluate or predict."
_EVAL_BATCH_SIZE = "Pass eval_per_device_batch_size to train."
_HARDWARE = "Start the script by accelerate launch, or pass accelerator=Accelerator(...) to Trainer."
_PRECISION = "Pass accelerator=Accelerator(mixed_precision='bf16') to Trainer."
_CALLBACKS = "Pass callbacks to Trainer."
_TRACKER = "Add a TrackerCallback of accel_callbacks to the callbacks."
_METRICS = "Add a MetricsCallback of accel_callbacks to the callbacks, or PredictionMetricsCallback."
_RATE = "Give it to the optimizer: AdamW(model.parameters(), lr=...)."
_SCHEDULE = "Pass create_scheduler_fn to train."
_LIMIT = "Add LimitBatchesCallback(num_batches) to the callbacks."
_WORKERS = "Pass train_dataloader_kwargs={'num_workers': ...} to train."
_STATES = "Add SaveTrainingStateCallback(folder) of accel_callbacks to the callbacks."
_EVALUATIONS = (
    "Pass eval_every_n_epochs to train, or add StepBasedEvaluationCallback(eval_every_n_updates=...)."
)

FOREIGN_ARGUMENTS = {
    **dict.fromkeys(("max_epochs", "epochs", "n_epoch", "n_epochs", "num_train_epochs"), _EPOCHS),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps"), _UPDATES),
    **dict.fromkeys(("dls", "train_dataloader", "train_dataloaders", "train_loader", "dataloader"), _DATA),
    **dict.fromkeys(("x", "y"), "Pass train_dataset=TensorDataset(x, y) to train."),
    "datamodule": "Pass its data as train_dataset and eval_dataset to train.",
    **dict.fromkeys(
        ("val_dataloaders", "val_dataloader", "val_loader", "valid_dl", "validation_data"), _EVAL_DATA
    ),
    "validation_split": "Split the data by torch.utils.data.random_split, and pass eval_dataset to train.",
    **dict.fromkeys(("batch_size", "bs", "per_device_train_batch_size", "train_batch_size"), _BATCH_SIZE),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size"), _EVAL_BATCH_SIZE),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), _WORKERS),
    "shuffle": "Pass train_dataloader_kwargs={'shuffle': ...} to train.",
    "data_collator": "Pass collate_fn to train.",
    **dict.fromkeys(("accumulate_grad_batches", "n_acc"), "Pass gradient_accumulation_steps to train."),
    **dict.fromkeys(
        ("gradient_clip_val", "max_grad_norm", "clip_grad_norm", "grad_clip"),
        "Pass gradient_clip_norm to train.",
    ),
    **dict.fromkeys(("lr", "learning_rate", "lr_max", "weight_decay", "wd"), _RATE),
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_scheduler_type", "warmup_steps"), _SCHEDULE),
    **dict.fromkeys(("opt", "opt_func", "optim", "optimizers"), "Pass an optimizer to Trainer."),
    **dict.fromkeys(("loss", "loss_fn", "criterion"), "Pass loss_func to Trainer."),
    "args": "Pass what TrainingArguments holds to train, or to callbacks.",
    **dict.fromkeys(("cbs", "cb"), _CALLBACKS),
    **dict.fromkeys(("metrics", "compute_metrics"), _METRICS),
    **dict.fromkeys(("logger", "loggers", "log_with", "report_to"), _TRACKER),
    **dict.fromkeys(
        ("devices", "num_nodes", "num_processes", "strategy", "device", "gpus", "use_cpu", "no_cuda"),
        _HARDWARE,
    ),
    **dict.fromkeys(("precision", "mixed_precision", "fp16", "bf16"), _PRECISION),
    **dict.fromkeys(
        ("check_val_every_n_epoch", "val_check_interval", "eval_steps", "eval_strategy"), _EVALUATIONS
    ),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "fast_dev_run", "overfit_batches"), _LIMIT),
    **dict.fromkeys(("default_root_dir", "output_dir", "save_steps", "save_total_limit"), _STATES),
    **dict.fromkeys(
        ("ckpt_path", "resume_from_checkpoint"),
        "Pass resume_from=latest_checkpoint('checkpoints') to train.",
    ),
    "deterministic": "Call torch.use_deterministic_algorithms(True), and pass seed to Trainer.",
    **dict.fromkeys(
        ("enable_progress_bar", "disable_tqdm", "verbose"),
        "Leave ProgressBarCallback out of the callbacks.",
    ),
    **dict.fromkeys(("tokenizer", "processing_class"), "Tokenize in the data set or in collate_fn."),
    "save_per_node": "Leave it out: the main process writes, once for the job.",
}
"""Arguments of constructors and of methods that train, evaluate or predict in other libraries."""


FOREIGN_EVENTS = {
    "on_stop_training_error": "on_training_run_end, and read trainer.stop_reason",
    "on_fit_start": "on_training_run_start",
    "on_train_start": "on_training_run_start",
    "on_fit_end": "on_training_run_end",
    "on_train_end": "on_training_run_end",
    "on_train_begin": "on_training_run_start",
    "on_epoch_begin": "on_train_epoch_start",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_training_run_epoch_end",
    "on_train_batch_start": "on_train_step_start",
    "on_train_batch_begin": "on_train_step_start",
    "on_train_batch_end": "on_train_step_end",
    "on_batch_begin": "on_train_step_start",
    "on_batch_end": "on_train_step_end",
    "on_step_begin": "on_train_step_start",
    "on_substep_end": "on_train_step_end",
    "on_after_backward": "on_train_step_end",
    "on_validation_start": "on_eval_epoch_start",
    "on_validation_epoch_start": "on_eval_epoch_start",
    "on_validation_batch_start": "on_eval_step_start",
    "on_validation_batch_end": "on_eval_step_end",
    "on_validation_epoch_end": "on_eval_epoch_end",
    "on_validation_end": "on_eval_epoch_end",
    "on_test_start": "on_evaluation_run_start",
    "on_test_begin": "on_evaluation_run_start",
    "on_test_epoch_end": "on_eval_epoch_end",
    "on_test_end": "on_evaluation_run_end",
    "on_test_batch_end": "on_eval_step_end",
    "on_prediction_step": "on_eval_step_end",
    "on_before_optimizer_step": "on_optimizer_step_start",
    "on_pre_optimizer_step": "on_optimizer_step_start",
    "on_optimizer_step": "on_optimizer_step_end",
    "on_before_zero_grad": "on_optimizer_step_end",
    "on_step_end": "on_optimizer_step_end",
    "on_save": "on_checkpoint_saved",
    "on_log": "on_training_run_epoch_end, and read trainer.run_history",
    "on_keyboard_interrupt": "on_exception",
    "on_save_checkpoint": "state_dict",
    "on_load_checkpoint": "load_state_dict",
    "on_evaluate": "on_eval_epoch_end",
}
"""Names of pytorch-accelerated, Lightning, transformers and Keras, and what to use here."""


FOREIGN_HOOKS = {
    "setup": "on_training_run_start",
    "teardown": "on_training_run_end",
    "before_fit": "on_training_run_start",
    "after_fit": "on_training_run_end",
    "before_epoch": "on_train_epoch_start",
    "after_epoch": "on_training_run_epoch_end",
    "before_train": "on_train_epoch_start",
    "after_train": "on_train_epoch_end",
    "before_batch": "on_train_step_start",
    "after_batch": "on_train_step_end",
    "after_pred": "on_train_step_end",
    "after_loss": "on_train_step_end",
    "after_backward": "on_train_step_end",
    "before_step": "on_optimizer_step_start",
    "after_step": "on_optimizer_step_end",
    "before_validate": "on_eval_epoch_start",
    "after_validate": "on_eval_epoch_end",
}
"""Methods of callbacks of fastai and Lightning. They may also be helpers of an event of accel."""


FOREIGN_CALLBACKS = {
    "EarlyStopping": "EarlyStoppingCallback of accel_callbacks",
    "EarlyStoppingCallback": "EarlyStoppingCallback of accel_callbacks",
    "ModelCheckpoint": "SaveBestModelCallback or SaveTrainingStateCallback of accel_callbacks",
    "SaveModelCallback": "SaveBestModelCallback of accel_callbacks",
    "LearningRateMonitor": "TrainingStatisticsCallback of accel_callbacks, which records the rates",
    "TensorBoardCallback": "TrackerCallback of accel_callbacks",
    "WandbCallback": "TrackerCallback of accel_callbacks",
    "MLflowCallback": "TrackerCallback of accel_callbacks",
    "TQDMProgressBar": "ProgressBarCallback of accel_callbacks",
    "RichProgressBar": "ProgressBarCallback of accel_callbacks",
    "ProgressCallback": "ProgressBarCallback of accel_callbacks",
    "PrinterCallback": "PrintProgressCallback of accel_core",
    "Timer": "MaxTimeCallback of accel_callbacks",
    "WeightAveraging": "ModelEmaCallback of accel_callbacks",
    "EMAWeightAveraging": "ModelEmaCallback of accel_callbacks",
    "StochasticWeightAveraging": "ModelAverageCallback of accel_callbacks",
    "MixUp": "TimmTrainer(mixup_alpha=...) of accel_integrations",
    "CutMix": "TimmTrainer(cutmix_alpha=...) of accel_integrations",
    "GradientAccumulation": "gradient_accumulation_steps of train",
    "GradientClip": "gradient_clip_norm of train",
    "CSVLogger": "HistoryFileCallback of accel_callbacks",
    "MoveModulesToDeviceCallback": "nothing: the trainer moves the modules among its attributes itself",
}
"""Classes of callbacks of other libraries by name, and what does their work here."""
