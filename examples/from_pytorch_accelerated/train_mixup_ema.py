"""Mixup, averaged weights and timm's schedule, moved from pytorch-accelerated to accel.

    python examples/from_pytorch_accelerated/train_mixup_ema.py

The trainer was a subclass of a hundred lines. What it did is there already, so its methods go:

    was                                                     is
    calculate_train_batch_loss with timm.data.Mixup         TimmTrainer(mixup_alpha=..., cutmix_alpha=...,
    label_smoothing=...) calculate_eval_batch_loss with eval_loss_fn             TimmTrainer evaluates with
    cross entropy; or eval_loss_func= training_run_start and train_epoch_end with ModelEmaV2
    ModelEmaCallback, which averages after every update create_scheduler, scheduler_step, eval_epoch_end
    create_scheduler_fn=timm_scheduler_fn(CosineLRScheduler, ...) two Accuracy metrics, computed and reset by
    hand        MetricsCallback: `accuracy` and `ema_model_accuracy` drop_last, since mixup wants even batches
    not needed: of an odd batch the last image is not mixed

Digits take the place of photographs, and a small network that of a ResNet-50, so that it runs in half a
minute.
"""

import timm
import timm.optim
from mnist import load_mnist
from timm.scheduler import CosineLRScheduler
from torch.utils.data import random_split
from torchmetrics import Accuracy

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    MetricsCallback,
    ModelEmaCallback,
    SaveBestModelCallback,
)
from accel_core import TrainerPlaceholderValues
from accel_integrations.timm_adapter import TimmTrainer, timm_scheduler_fn


def main(
    lr=4e-3,
    batch_size=64,
    num_epochs=5,
    smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    bce_target_thresh=0.2,
):
    train_dataset, eval_dataset = random_split(load_mnist(), [4000, 1000])
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)

    trainer = TimmTrainer(
        model=model,
        optimizer=timm.optim.create_optimizer_v2(
            model, opt="lookahead_AdamW", lr=lr, weight_decay=0.01
        ),
        num_classes=10,
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        label_smoothing=smoothing,
        binary_targets=True,
        binary_target_threshold=bce_target_thresh,
        callbacks=[
            MetricsCallback(
                {"accuracy": Accuracy(task="multiclass", num_classes=10)}
            ),
            ModelEmaCallback(decay=0.98),
            *DEFAULT_CALLBACKS,
            SaveBestModelCallback(
                watch_metric="accuracy", greater_is_better=True
            ),
        ],
    )

    trainer.train(
        per_device_batch_size=batch_size,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        num_epochs=num_epochs,
        create_scheduler_fn=timm_scheduler_fn(
            CosineLRScheduler,
            t_initial=TrainerPlaceholderValues.NUM_EPOCHS,
            lr_min=1e-6,
            warmup_t=1,
            warmup_lr_init=1e-4,
        ),
    )


if __name__ == "__main__":
    main()
