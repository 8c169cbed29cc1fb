"""Send a run to TensorBoard or another experiment tracker.

    # TensorBoard, into outputs/16_trackers.
    python examples/16_trackers.py
    # Also mlflow, trackio, aim, comet, clearml, dvclive or swanlab.
    python examples/16_trackers.py --tracker wandb

A tracker is one callback. It sends the hyper-parameters, the running loss, the
learning rates and every record of the run history. Here these are the losses and
the accuracy of each epoch. All values share one axis, that of updates.

It prints the losses and the accuracy of each epoch, and the command that shows
the run in a browser. For TensorBoard it reads the files back, and prints the
number of values of each metric. The last accuracy is that of the run history, at
least 93%.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback, TrackerCallback
from accel_core import Trainer

FOLDER = Path("outputs/16_trackers")
PROJECT = "digits"
HOW_TO_LOOK = {
    "tensorboard": f"tensorboard --logdir {FOLDER}",
    "mlflow": "mlflow server",
    "trackio": f"trackio show --project {PROJECT}",
    "aim": f"aim up --repo {FOLDER}",
}
"""The other trackers print the address of the run themselves."""


def read_tensorboard(folder):
    """Return the values of each name as pairs of update and value."""
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    events = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tracker", default="tensorboard", help="its name")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    )
    train_data, eval_data = random_split(
        data, [0.8, 0.2], generator=torch.Generator().manual_seed(0)
    )
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = Trainer(
        model,
        nn.functional.cross_entropy,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        callbacks=(
            MetricsCallback(
                {
                    "accuracy": MulticlassAccuracy(
                        num_classes=10, average="micro"
                    )
                }
            ),
            TrackerCallback(
                args.tracker,
                PROJECT,
                config={"hidden_size": 128, "optimizer": "AdamW"},
                logging_dir=FOLDER,
                log_every_n_updates=10,
            ),
            *DEFAULT_CALLBACKS,
        ),
        seed=0,
    )
    history = trainer.train(
        train_data,
        num_epochs=args.epochs,
        eval_dataset=eval_data,
        per_device_batch_size=32,
    )

    if args.tracker in HOW_TO_LOOK:
        trainer.print(f"Look at it with: {HOW_TO_LOOK[args.tracker]}")
    if args.tracker == "tensorboard" and trainer.is_main_process:
        tracked = read_tensorboard(
            next((FOLDER / PROJECT).glob(f"*_{trainer.run_id}"))
        )
        for name, values in sorted(tracked.items()):
            print(
                f"{name:20}{len(values):4} values, the last at update "
                f"{values[-1][0]}: {values[-1][1]:.4g}"
            )
        of_tracker, of_history = (
            tracked["accuracy"][-1][1],
            history.get_latest_metric("accuracy"),
        )
        print(
            f"Accuracy in the tracker: {of_tracker:.2%}, in the run "
            f"history: {of_history:.2%}"
        )


if __name__ == "__main__":
    main()
