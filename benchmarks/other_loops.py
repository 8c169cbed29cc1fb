"""The loops of other libraries, as their documentation shows them, without what only they do (sanity checks, saving).

They live in an environment of their own: `hatch env create bench-others`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from loops import Loop
from torch.utils.data import DataLoader, default_collate
from workloads import Task


def _loader(task: Task, data: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=task.workload.batch_size, shuffle=False)


def pytorch_accelerated(task: Task) -> float | None:
    from pytorch_accelerated.callbacks import ProgressBarCallback
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer

    workload = task.workload
    callbacks = [
        callback for callback in DEFAULT_CALLBACKS if workload.bar or callback is not ProgressBarCallback
    ]
    trainer = Trainer(task.model, task.loss_func, task.optimizer, callbacks=callbacks)
    as_they_come = {"shuffle": False, "num_workers": 0}
    if workload.kind == "eval":
        trainer.evaluate(task.train_data, workload.batch_size, dataloader_kwargs=as_they_come)
        return float(trainer.run_history.get_latest_metric("evaluation_loss"))
    trainer.train(
        task.train_data,
        workload.epochs,
        task.eval_data,
        workload.batch_size,
        train_dataloader_kwargs=as_they_come,
        eval_dataloader_kwargs=as_they_come,
    )
    return None


def lightning(task: Task) -> float | None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            loss = task.loss_func(self.model(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_index: int) -> None:
            self.log("eval_loss", task.loss_func(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return task.optimizer

    trainer = pl.Trainer(
        max_epochs=task.workload.epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=task.workload.bar,
        num_sanity_val_steps=0,
    )
    if task.workload.kind == "eval":
        return float(
            trainer.validate(Module(), _loader(task, task.train_data), verbose=False)[0]["eval_loss"]
        )
    trainer.fit(
        Module(),
        _loader(task, task.train_data),
        None if task.eval_data is None else _loader(task, task.eval_data),
    )
    return None


def transformers(task: Task) -> float | None:
    from transformers import Trainer, TrainingArguments

    class Given(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return task.loss_func(model(inputs["inputs"]), inputs["targets"])

        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return task.loss_func(model(inputs["inputs"]), inputs["targets"]), None, None

        def _get_train_sampler(self, *args: Any) -> None:
            return None

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs, targets = default_collate(samples)
        return {"inputs": inputs, "targets": targets}

    workload = task.workload
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=workload.batch_size,
            per_device_eval_batch_size=workload.batch_size,
            num_train_epochs=workload.epochs,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            disable_tqdm=not workload.bar,
            save_strategy="no",
            logging_strategy="epoch",
            eval_strategy="no" if task.eval_data is None else "epoch",
            remove_unused_columns=False,
        )
        schedule = torch.optim.lr_scheduler.ConstantLR(task.optimizer, factor=1.0)
        trainer = Given(
            task.model,
            arguments,
            collate,
            task.train_data,
            task.eval_data,
            optimizers=(task.optimizer, schedule),
        )
        if workload.kind == "eval":
            return float(trainer.evaluate(task.train_data)["eval_loss"])
        trainer.train()
    return None


def fastai(task: Task) -> float | None:
    from fastai.callback.core import Callback, CancelValidException
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class SkipValidation(Callback):
        def before_validate(self) -> None:
            raise CancelValidException

    loader = _loader(task, task.train_data)
    eval_loader = loader if task.eval_data is None else _loader(task, task.eval_data)
    learner = Learner(
        DataLoaders(loader, eval_loader, device=torch.device("cpu")),
        task.model,
        task.loss_func,
        opt_func=lambda parameters, **kwargs: OptimWrapper(opt=task.optimizer),
        lr=0.01,
        cbs=[SkipValidation()] if task.eval_data is None and task.workload.kind == "train" else [],
        train_bn=True,
    )
    if not task.workload.bar:
        learner.remove_cb(ProgressCallback)
        learner.logger = lambda *args: None
    if task.workload.kind == "eval":
        return float(learner.validate(dl=loader)[0])
    learner.fit(task.workload.epochs)
    return None


def ignite(task: Task) -> float | None:
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import ProgressBar
    from ignite.metrics import Average, Loss

    loader = _loader(task, task.train_data)
    evaluator = create_supervised_evaluator(task.model, {"loss": Loss(task.loss_func)})
    if task.workload.kind == "eval":
        return float(evaluator.run(loader).metrics["loss"])
    trainer = create_supervised_trainer(task.model, task.optimizer, task.loss_func)
    Average().attach(trainer, "train_loss")
    if task.workload.bar:
        ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    if task.eval_data is not None:
        eval_loader = _loader(task, task.eval_data)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: evaluator.run(eval_loader))
    trainer.run(loader, max_epochs=task.workload.epochs)
    return None


def poutyne(task: Task) -> float | None:
    from poutyne import Model

    model = Model(task.model, task.optimizer, task.loss_func, device="cpu")
    loader = _loader(task, task.train_data)
    if task.workload.kind == "eval":
        return float(model.evaluate_generator(loader, verbose=False))
    eval_loader = None if task.eval_data is None else _loader(task, task.eval_data)
    model.fit_generator(loader, eval_loader, epochs=task.workload.epochs, verbose=task.workload.bar)
    return None


def skorch(task: Task) -> float | None:
    from skorch import NeuralNet
    from skorch.helper import predefined_split

    workload = task.workload
    net = NeuralNet(
        task.model,
        torch.nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=0.01,
        optimizer__momentum=0.9,
        max_epochs=workload.epochs,
        batch_size=workload.batch_size,
        train_split=None if task.eval_data is None else predefined_split(task.eval_data),
        iterator_train__shuffle=False,
        verbose=0,
    )
    net.initialize()
    if workload.kind == "eval":
        net.history.new_epoch()
        net.run_single_epoch(
            net.get_iterator(task.train_data), training=False, prefix="valid", step_fn=net.validation_step
        )
        batches = net.history[-1, "batches", :, ("valid_loss", "valid_batch_size")]
        return sum(loss * size for loss, size in batches) / sum(size for _, size in batches)
    if workload.bar:
        from skorch.callbacks import ProgressBar

        net.set_params(callbacks=[("bar", ProgressBar())])
    net.fit(task.train_data, y=None)
    return None


OTHER_LOOPS: dict[str, Loop] = {
    "pytorch-accelerated": pytorch_accelerated,
    "lightning": lightning,
    "transformers": transformers,
    "fastai": fastai,
    "ignite": ignite,
    "poutyne": poutyne,
    "skorch": skorch,
}
