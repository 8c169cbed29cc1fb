"""ModelEmaCallback: keep an exponential moving average of the model, evaluate and export it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from accel_core import ConfigurationError
from accel_core.extending import check_flag, check_positive, preview

from .averaging import AveragingCallback
from .ema_decay import check_decay

if TYPE_CHECKING:
    from accel_core import Trainer


class ModelEmaCallback(AveragingCallback):
    """Average the weights over the updates. The average is often better than the weights of any update.

    After update n, counted from 1, each parameter's average is `d * average + (1 - d) * parameter`, where d
    is `decay`, or less in a warm-up. It begins with the weights that the run begins with. Buffers of
    floating-point numbers (the statistics of batch norm) are averaged alike; all others, and those that hold
    values that are not finite (masks), are copied.

    After each epoch the average is evaluated like the model, with the same metrics:
    `ema_model_eval_loss_epoch`, `ema_model_accuracy`. It is exported whenever the watched metric was better
    than ever before, or once at the end of the run if it is not evaluated. Training is bit-identical with
    and without this callback, and nothing waits for the device after an update. Averages and the best value
    are saved with the training state; each new call of `train` begins with new ones.

    Source:
        `warmup=True`: `tf.train.ExponentialMovingAverage` of TensorFlow, argument `num_updates`.
        `warmup="timm"`: `timm.utils.ModelEmaV3`, arguments `warmup_gamma` and `warmup_power`.
    """

    model_name = "ema_model"
    averages_buffers = True

    def __init__(
        self,
        decay: float = 0.999,
        warmup: bool | str = True,
        evaluate_during_training: bool = True,
        save_path: str | Path | None = "ema_model.pt",
        watch_metric: str = "ema_model_eval_loss_epoch",
        greater_is_better: bool = False,
        *,
        every_n_updates: int = 1,
        evaluate_in_mid_epoch: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
    ) -> None:
        """Hold how to average.

        Args:
            decay: part of the average that an averaging keeps; 0.999 averages over about the last thousand.
            warmup: forget the beginning faster, so that the average is of use in short runs too. True keeps
                at most `n / (9 + n)` at the n-th averaging, `"timm"` at most
                `1 - (1 + (n - 1) / warmup_gamma) ** -warmup_power`, False always `decay`.
            evaluate_during_training: evaluate after each epoch, if `train` has an `eval_dataset`.
            save_path: path or address of the export, which holds weights and the value of `watch_metric`;
                None exports nothing.
            watch_metric: name of the metric in the run history.
            greater_is_better: the best value is the greatest, and not the smallest.
            every_n_updates: average after every n-th update only, counted from the beginning of the call of
                `train`. A decay of `decay ** n` then averages over as many updates as `decay` over all.
            evaluate_in_mid_epoch: evaluate after evaluations in mid-epoch too, on the same data, as
                `ema_model_intermediate_eval_loss_epoch`.
            warmup_gamma: larger values make the warm-up of timm longer.
            warmup_power: 2/3 for runs of a million updates, 3/4 for shorter ones.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        super().__init__(
            every_n_updates, evaluate_during_training, save_path, watch_metric, greater_is_better
        )
        self.decay = check_decay(decay)
        if not isinstance(warmup, bool) and warmup != "timm":
            raise ConfigurationError(
                f"warmup is {preview(warmup)}, but must be True, False or 'timm'. Use True for a short "
                "warm-up."
            )
        self.warmup = warmup
        way_out = "Leave it out for the warm-up of timm."
        self.warmup_gamma = check_positive("warmup_gamma", warmup_gamma, way_out)
        self.warmup_power = check_positive("warmup_power", warmup_power, way_out)
        if warmup != "timm" and (warmup_gamma, warmup_power) != (1.0, 2 / 3):
            raise ConfigurationError(
                f"warmup is {warmup}, but warmup_gamma and warmup_power belong to warmup='timm'. Pass "
                "warmup='timm', or leave both out."
            )
        self.evaluate_in_mid_epoch = check_flag("evaluate_in_mid_epoch", evaluate_in_mid_epoch)

    @property
    def ema_model(self) -> nn.Module | None:
        """The averaged model, unwrapped, in eval mode and without gradients; None before the first run.

        It is None with FSDP2 and tensor parallelism too, where each process averages the parts that it holds.
        """
        return self.averaged_model

    def calculate_decay(self, num_updates: int) -> float:
        """Return the part of the average that the next averaging keeps, when `num_updates` are in it."""
        if self.warmup == "timm":
            return min(self.decay, 1 - (1 + num_updates / self.warmup_gamma) ** -self.warmup_power)
        return min(self.decay, (1 + num_updates) / (10 + num_updates)) if self.warmup else self.decay

    def average_in(self, averages: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        """Move the averages towards the values."""
        # AveragedModel would wait for the device to count, and average whole numbers.
        get_ema_multi_avg_fn(self.calculate_decay(self.num_updates))(averages, values, self.num_updates)

    def on_evaluation_end(self, trainer: Trainer, is_intermediate: bool, metric_prefix: str) -> None:
        """Evaluate the average after each epoch in which the model is, and in mid-epoch if wanted."""
        if is_intermediate and self.evaluate_in_mid_epoch:
            self.evaluate(trainer, f"{self.model_name}_intermediate_eval", is_intermediate=True)
        super().on_evaluation_end(trainer, is_intermediate, metric_prefix)
