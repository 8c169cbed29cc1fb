"""Shard a model over the processes by FSDP2 or DeepSpeed.

    # One process.
    python examples/17_sharded_models.py
    # Two on a CPU, each with the whole model.
    ACCELERATE_USE_CPU=true accelerate launch \
        --config_file examples/configs/two_cpu_processes.yaml \
        examples/17_sharded_models.py
    # A part of the model on each of eight GPUs, by FSDP2.
    accelerate launch --config_file examples/configs/fsdp2.yaml \
        --num_processes 8 examples/17_sharded_models.py
    # The same by DeepSpeed's ZeRO-2.
    accelerate launch --config_file examples/configs/deepspeed_zero2.yaml \
        --num_processes 8 examples/17_sharded_models.py
    # Add this to any of them to continue from the end of epoch 4.
    --resume --epochs 8

The script is the same as for one process. Without `--resume` it starts again, and
removes the training states of the run before.

Each update has two steps, and its gradients are clipped by their norm over all
processes. Each process writes its part of a training state. The export has the
whole weights, which any program can read.

It prints the engine and the losses of each epoch. It measures the test accuracy,
at least 90%, twice: by the trainer, and by plain PyTorch with the exported
weights. Both are the same.
"""

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import (
    DEFAULT_CALLBACKS,
    MetricsCallback,
    SaveTrainingStateCallback,
)
from accel_core import Trainer, latest_checkpoint

OUTPUT = Path("outputs/17_sharded_models")
GLOBAL_BATCH_SIZE = 64
GRADIENT_ACCUMULATION_STEPS = 2


def create_model():
    """Return a model whose inner layers have a million weights each: fsdp2.yaml
    makes a shard of what is as large.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 1024),
        *(nn.ReLU(), nn.Linear(1024, 1024)),
        *(nn.ReLU(), nn.Linear(1024, 1024)),
        *(nn.ReLU(), nn.Linear(1024, 10)),
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest training state",
    )
    args = parser.parse_args()

    digits = load_digits()
    images, labels = (
        torch.tensor(digits.data, dtype=torch.float32) / 16,
        torch.tensor(digits.target),
    )
    train_data, test_data = (
        TensorDataset(images[:1397], labels[:1397]),
        TensorDataset(images[1397:], labels[1397:]),
    )
    model = create_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        callbacks=(
            MetricsCallback(
                {
                    "accuracy": MulticlassAccuracy(
                        num_classes=10, average="micro"
                    )
                }
            ),
            SaveTrainingStateCallback(OUTPUT / "checkpoints", keep_last=1),
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    if not args.resume and trainer.is_main_process:
        shutil.rmtree(OUTPUT / "checkpoints", ignore_errors=True)
    # The files of DeepSpeed can execute code when they are read, so they have
    # to be trusted: these are our own.
    trainer.trust_engine_files = True
    num_processes = trainer.accelerator.num_processes
    trainer.print(
        f"Processes: {num_processes}, engine: "
        f"{trainer.accelerator.distributed_type.value}"
    )
    trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=test_data,
        per_device_batch_size=GLOBAL_BATCH_SIZE
        // GRADIENT_ACCUMULATION_STEPS
        // num_processes,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
        gradient_clip_norm=1.0,
        resume_from=latest_checkpoint(OUTPUT / "checkpoints")
        if args.resume
        else None,
    )
    # All processes take part, as each holds a part of the weights.
    trainer.save_checkpoint(OUTPUT / "model.safetensors")

    trainer.print(
        f"Test accuracy: "
        f"{trainer.run_history.get_latest_metric('accuracy'):.2%}"
    )
    if trainer.is_main_process:
        exported = create_model()
        exported.load_state_dict(load_file(OUTPUT / "model.safetensors"))
        with torch.no_grad():
            hits = exported(images[1397:]).argmax(dim=1) == labels[1397:]
        print(f"By the export: {hits.double().mean():.2%}")


if __name__ == "__main__":
    main()
